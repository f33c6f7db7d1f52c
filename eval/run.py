"""Evaluate a checkpoint on benchmarks with lmms-eval, in one process or in one per GPU.

    python -m eval.run --model-path checkpoints/llava-v1.5-7b --benchmarks vqa
    accelerate launch --num_processes 8 -m eval.run --model-path checkpoints/llava-v1.5-7b --benchmarks all

Each benchmark writes OUTPUT/NAME/result.json and samples.jsonl. After an interruption run the same command again:
finished benchmarks are skipped, and answers are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from eval.adapter import DTYPES, AnswerLog, PreflightError, load_adapter, rank_and_count, shared
from eval.benchmarks import ALL, GROUPS, Benchmark
from eval.hub import LOCK, TaskData
from eval.judge import set_judge
from eval.plan import Plan, announcement, judge_of, make_plan, summary, training_of
from eval.scores import UnscoredError, evaluate_task, find_submission, headline_of, scores_and_samples
from llava.command import RunRecord, command_parser
from llava.conversation import conv_templates
from patch_aligned.results.run import (
    Harness,
    RunData,
    RunFileError,
    RunResult,
    RunSettings,
    rows_sha256,
    write_run,
)

LIBRARIES = ("torch", "transformers", "datasets", "pillow", "patch-aligned-llava")
ANSWERS = "answers"


def argument_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command_parser("eval.run", __doc__)
    add = parser.add_argument
    add("--model-path", required=True, help="folder of the checkpoint")
    add("--model-base", help="the LLM that a stage-1 projector or a LoRA adapter belongs to")
    add("--model-name", help="its name in tables; default: from its folder")
    add("--benchmarks", default=ALL, help=f"names, with commas, or {', '.join(GROUPS)}, {ALL}; default: %(default)s")
    add("--without", default="", help="names to leave out of these, with commas")
    add("--output", type=Path, help="folder of the runs; default: runs/eval/NAME")
    add("--batch-size", type=positive, default=8, help="rows per process and call; default: %(default)s")
    add("--limit", type=int, help="number of rows of each benchmark, for a trial")
    add("--max-new-tokens", type=positive, help="of an answer; default: as the task defines it")
    add("--seed", type=int, default=0, help="of scorers that guess; answers are greedy; default: %(default)s")
    add("--conversation", default="auto", choices=["auto", *sorted(conv_templates)],
        help="template; default: as trained, `plain` for a stage-1 projector that does not say")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="default: float16 on a GPU, else float32")
    add("--box-frame", default="square", choices=["square", "image"],
        help="how the headline reads boxes: LLaVA-1.5 gives them in the padded square (default)")  # fmt: skip
    add("--judge-url", help="address of your own judge: its /v1/chat/completions")
    add("--judge-model", help="the judge's name; default: MODEL_VERSION, or lmms-eval's")
    add("--lock", type=Path, default=LOCK, help="commits of the data sets; default: eval/revisions.json")
    add("--again", action="store_true", help="discard finished runs and answers")
    return parser


def positive(text: str) -> int:
    """Parse a flag that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = argument_parser().parse_args(argv)
    set_judge(arguments.judge_url, arguments.judge_model)
    rank, processes = rank_and_count()
    try:
        plan = shared(make_plan(arguments, processes) if rank == 0 else None)
    except (OSError, ValueError) as error:
        return complain(error)
    assert plan is not None
    if not plan.todo:
        return 0
    if rank == 0:
        print(announcement(plan), flush=True)
    status = 0
    try:
        adapter = load_adapter(plan.request)
        for benchmark, data in plan.todo:
            try:
                run_benchmark(adapter, plan, benchmark, data, arguments, rank, processes)
            except UnscoredError as error:  # later benchmarks do not depend on it
                status = complain(error)
    except (PreflightError, RunFileError) as error:
        return complain(error)
    return status


def complain(error: Exception) -> int:
    """Print what is wrong, a line each; returns the exit status."""
    for line in str(error).splitlines():
        print(f"Error: {line}", file=sys.stderr)
    return 2


def run_benchmark(
    adapter: Any,
    plan: Plan,
    benchmark: Benchmark,
    data: TaskData,
    arguments: argparse.Namespace,
    rank: int,
    processes: int,
) -> None:
    """Ask and score one benchmark, in all processes. The first writes the run and prints a summary."""
    folder = plan.output / benchmark.name
    request = plan.request
    adapter.log = AnswerLog(
        folder / ANSWERS,
        {"model": plan.model.sha256, "base": plan.model.weights[1:],
         "conversation": request.conversation, "dtype": request.dtype, "data": data.revision,
         "package": importlib.metadata.version("patch-aligned-llava")},
        rank,
    )  # fmt: skip
    hashes = {"model_path": plan.model.sha256, "model_base": plan.model.base_sha256, "data": data.revision}
    record = RunRecord(folder, vars(arguments), hashes, is_writer=rank == 0, trained=training_of(plan.model.path))
    record.begin()
    max_new_tokens = arguments.max_new_tokens or benchmark.max_new_tokens
    evaluated = evaluate_task(
        adapter, benchmark, data, folder, max_new_tokens=max_new_tokens, limit=arguments.limit, seed=arguments.seed
    )
    if rank != 0 or evaluated is None:
        return
    scores, missing, samples = scores_and_samples(benchmark, evaluated)
    settings = RunSettings(
        prompt=adapter.first_prompt,
        conversation=request.conversation,
        box_frame=arguments.box_frame if benchmark.speaks_boxes else None,
        dtype=request.dtype,
        batch_size=request.batch_size,
        seed=arguments.seed,
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        num_processes=processes,
        limit=arguments.limit,
        judge=judge_of(benchmark),
    )
    hashed = rows_sha256((sample.id, sample.target) for sample in samples)
    result = RunResult(
        benchmark=benchmark.name,
        tables=benchmark.tables,
        column=benchmark.column,
        task=benchmark.task,
        model=plan.model,
        harness=Harness("lmms-eval", importlib.metadata.version("lmms-eval")),
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        settings=settings,
        data=RunData(data.source, data.revision, data.split, len(samples), hashed),
        headline=headline_of(benchmark, arguments.box_frame),
        scores=scores,
        submission=find_submission(benchmark, folder),
        not_available=missing,
    )
    write_run(folder, result, samples)
    record.end()
    print(summary(result, folder))


if __name__ == "__main__":
    sys.exit(main())
