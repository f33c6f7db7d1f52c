"""Evaluate a checkpoint on benchmarks by lmms-eval, one process or one a GPU; the results are files.

    python -m eval.run --model-path checkpoints/llava-v1.5-7b --benchmarks vqa
    accelerate launch --num_processes 8 -m eval.run --model-path checkpoints/llava-v1.5-7b --benchmarks all

Each benchmark leaves OUTPUT/NAME/result.json and samples.jsonl. The same command goes on where it was stopped: what is
finished is skipped, and answers that were given are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from eval.adapter import DTYPES, AnswerLog, PreflightError, load_adapter, rank_and_count, shared
from eval.benchmarks import ALL, GROUPS, Benchmark
from eval.hub import LOCK, DataError, TaskData
from eval.judge import set_judge
from eval.plan import Plan, announcement, judge_of, make_plan, summary, training_of
from eval.scores import UnscoredError, evaluate_task, find_submission, headline_of, scores_and_samples
from llava.command import RunRecord
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
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="folder of the checkpoint")
    add("--model-base", help="the LLM that a stage-1 projector or a LoRA adapter belongs to")
    add("--model-name", help="what tables call it; default: from its folder")
    add("--benchmarks", default=ALL, help=f"names, with commas, or {', '.join(GROUPS)}, {ALL}; default: %(default)s")
    add("--without", default="", help="names to leave out of these, with commas")
    add("--output", type=Path, help="folder of the runs; default: runs/eval/NAME")
    add("--batch-size", type=positive, default=8, help="rows a process and call; default: %(default)s")
    add("--limit", type=int, help="only so many rows of each benchmark: a trial, no result")
    add("--max-new-tokens", type=positive, help="of an answer; default: what the task says")
    add("--seed", type=int, default=0, help="of scorers that guess; answers are greedy; default: %(default)s")
    add("--conversation", default="auto", choices=["auto", *sorted(conv_templates)],
        help="template; default: as trained, `plain` for a stage-1 projector that does not say")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="default: float16 on a GPU, else float32")
    add("--box-frame", default="square", choices=["square", "image"],
        help="where the headline reads boxes: LLaVA-1.5 speaks them in the padded square (default)")  # fmt: skip
    add("--judge-url", help="a judge of your own: its /v1/chat/completions")
    add("--judge-model", help="the judge's name; default: MODEL_VERSION, or lmms-eval's")
    add("--lock", type=Path, default=LOCK, help="commits of the data sets; default: eval/revisions.json")
    add("--again", action="store_true", help="forget what is finished and what was answered")
    return parser


def positive(text: str) -> int:
    """A whole number from 1, of a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = argument_parser().parse_args(argv)
    set_judge(arguments.judge_url, arguments.judge_model)
    rank, processes = rank_and_count()
    try:
        plan = shared(make_plan(arguments, processes) if rank == 0 else None)
        assert plan is not None
        if not plan.todo:
            return 0
        if rank == 0:
            print(announcement(plan), flush=True)
        adapter = load_adapter(plan.request)
        status = 0
        for benchmark, data in plan.todo:
            try:
                run_benchmark(adapter, plan, benchmark, data, arguments, rank, processes)
            except UnscoredError as error:  # nothing that the benchmarks after it depend on
                status = complain(error)
        return status
    except (PreflightError, DataError, RunFileError) as error:
        return complain(error)


def complain(error: Exception) -> int:
    """Says what is wrong, a line each; returns the exit status."""
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
    """Asks and scores one benchmark, in all processes; the first writes the run and says what came out."""
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
