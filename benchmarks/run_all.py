"""Everything that is measured against something else on a CPU, in one table of ratios.

    python benchmarks/run_all.py                        # all rows: a quarter of an hour on two free cores
    python benchmarks/run_all.py --rows masks,pursuit
    python benchmarks/run_all.py --upstream DIR         # DIR has the original LLaVA, and its environment in DIR/.venv

Both sides of a row take turns in one run. A ratio is the baseline's time over ours, the median of all turns with the
least and the greatest beside it. Sides whose memory is compared have a process each. Writes `report.json`, `table.md`
and `growth.svg`. What needs the miniature or upstream says `not run` without them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import torch
from growth import measure_growth, plot_growth
from measured_models import MODELS
from measuring import ROOT, command_line, describe_machine, times_of
from served_steps import Memory, ServedSide, Step

from llava.train.arguments import cpu_multiplies_bf16

RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- run_all: begin -->", "<!-- run_all: end -->"
PLOT = """How the time of a step of stage 1 grows, all else fixed (SmolLM2's width, two layers in the LLM, float32):

![Seconds a step over batch, visual tokens, images of a sample and regions](images/growth.svg)"""
PACKAGES = ("torch", "transformers", "accelerate", "numpy")


class NotRunError(Exception):
    """Says why a row cannot be measured here."""


class Side(Protocol):
    """What takes turns with another one."""

    def step(self) -> Step:
        """One turn."""

    def end(self) -> Memory | None:
        """What its process used; None where it has none of its own."""


@dataclass
class Local:
    """A side in this process."""

    action: Callable[[], object]

    def step(self) -> Step:
        """One turn; an action may time itself, or return its loss."""
        start = time.perf_counter()
        result = self.action()
        seconds = time.perf_counter() - start
        return result if isinstance(result, Step) else Step(seconds, result if isinstance(result, float) else math.nan)

    def end(self) -> None:
        """It has no memory of its own."""


@dataclass
class Row:
    """One line of the table. Seconds are of one thing on both sides."""

    name: str
    what: str
    baseline: str
    detail: str = ""
    status: str = "ok"
    seconds: list[float] = field(default_factory=list)
    baseline_seconds: list[float] = field(default_factory=list)
    memory: Memory | None = None
    baseline_memory: Memory | None = None

    def ratios(self) -> tuple[float, float, float] | None:
        """Median, least and greatest ratio of the turns."""
        found = [theirs / ours for ours, theirs in zip(self.seconds, self.baseline_seconds, strict=True)]
        return (statistics.median(found), min(found), max(found)) if found else None

    def memory_ratios(self) -> tuple[float, float] | None:
        """Our peak over the baseline's: of the processes, and above what they held after loading."""
        if self.memory is None or self.baseline_memory is None:
            return None
        whole, above = (ours / theirs for ours, theirs in zip(self.memory, self.baseline_memory, strict=True))
        return whole, above

    def record(self) -> dict[str, Any]:
        """The row for JSON."""
        return asdict(self) | {"ratio": self.ratios(), "memory_ratio": self.memory_ratios()}

    def cells(self) -> list[str]:
        """The row for the table."""
        ratios, memory = self.ratios(), self.memory_ratios()
        times = [f"{statistics.median(found):.3g} s" for found in (self.seconds, self.baseline_seconds) if found]
        return [
            self.what,
            self.baseline,
            "{:.2f} ({:.2f} to {:.2f})".format(*ratios) if ratios else self.status,
            " / ".join(times),
            "{:.2f} / {:.2f}".format(*memory) if memory else "",
            self.detail,
        ]


@dataclass
class Run:
    """What rows are told, and what they share."""

    folder: Path
    repeats: int
    is_tiny: bool
    upstream: Path | None
    served: list[ServedSide] = field(default_factory=list)

    def take_turns(self, row: Row, ours: Side, baseline: Side) -> None:
        """Fill a row: a turn to warm up, then `repeats` turns of both; the one that begins alternates."""
        steps: dict[bool, list[Step]] = {True: [], False: []}
        for turn in range(self.repeats + 1):
            for is_ours in (turn % 2 == 0, turn % 2 == 1):
                steps[is_ours].append((ours if is_ours else baseline).step())
        row.seconds, row.baseline_seconds = ([step.seconds for step in steps[is_ours][1:]] for is_ours in (True, False))
        row.memory, row.baseline_memory = ours.end(), baseline.end()
        gap = max(abs(one.loss / other.loss - 1) for one, other in zip(steps[True], steps[False], strict=True))
        if not math.isnan(gap):
            row.detail += f"; losses differ by {gap:.0e} of theirs at most"

    def weights(self, shape: str, batch_size: int) -> Path:
        """Folder of a shape's random weights and batch, written once."""
        from stage1_sides import write_weights

        folder = self.folder / shape
        if not folder.exists():
            write_weights("tiny" if self.is_tiny else shape, folder, batch_size)
        return folder

    def side(self, folder: Path, name: Any, task: str, bf16: str) -> Side:
        """A side of `stage1_sides.py`, in a process of its own unless sizes are tiny."""
        if self.is_tiny:
            from stage1_sides import side_of

            return Local(side_of(folder, name, task, bf16))
        script = ROOT / "benchmarks/stage1_sides.py"
        return self.serve([sys.executable, str(script), str(folder), name, task, "--bf16", bf16], ROOT)

    def upstream_side(self, folder: Path, task: str) -> Side:
        """The original LLaVA in its own environment."""
        if self.upstream is None:
            raise NotRunError("not run: no --upstream")
        command = [str(self.upstream / ".venv/bin/python"), str(ROOT / "benchmarks/upstream_step.py"), task]
        return self.serve([*command, str(folder / "llava"), str(folder / "batch.pt")], self.upstream)

    def serve(self, command: list[str], packages: Path) -> Side:
        """A process that serves steps, with a folder of packages before those that are installed."""
        self.served.append(ServedSide(command, {"PYTHONPATH": str(packages)}))
        return self.served[-1]

    def end_row(self) -> None:
        """End processes that a failure has left."""
        for side in self.served:
            side.process.kill()
        self.served.clear()


def require_miniature() -> None:
    """Say so where the miniature's models or scenes are missing."""
    if not (MODELS / "smollm2-135m-instruct").exists() or not (ROOT / "playground/data/mini/train/pad.json").exists():
        raise NotRunError("not run: no miniature (bash scripts/prepare_mini.sh)")


SHAPES = {"smollm2_six_layers": ("SmolLM2's width, 6 layers, batch 4", 4),
          "7b_two_layers": ("7B's width, 2 layers, batch 1", 1)}  # fmt: skip
"""What is said of a shape, and the batch that it is measured with."""


def stage1(
    run: Run, row: Row, *, shape: str, against: str = "transformers", bf16: str = "False", theirs: str = "False",
    task: str = "train",
) -> None:  # fmt: skip
    """A step of stage 1, or an answer, against the same weights in another program."""
    row.detail, batch_size = SHAPES[shape]
    if task == "generate":
        row.detail = "597 tokens read, 32 written"
    if bf16 == "auto" and not cpu_multiplies_bf16():
        raise NotRunError("not run: this CPU has no products of bfloat16")
    folder = run.weights(shape, batch_size)
    baseline = run.upstream_side(folder, task) if against == "upstream" else run.side(folder, against, task, theirs)
    run.take_turns(row, run.side(folder, "ours", task, bf16), baseline)


def patch_loss(run: Run, row: Row) -> None:
    """The patch loss with its gradients, against the step that it is part of."""
    require_miniature()
    from stage1_step import miniature, plugin_alone, step_of

    model, plugin, batch = miniature(2 if run.is_tiny else 8)
    model.attach_plugin(plugin)
    step = step_of(model.train(), batch)
    step()  # shows the plugin what it repeats alone
    run.take_turns(row, Local(lambda: plugin_alone(plugin)), Local(step))
    share = statistics.median(row.seconds) / statistics.median(row.baseline_seconds)
    row.detail = f"{share:.2%} of a step of the miniature"


def attach(run: Run, row: Row) -> None:
    """A step of a Trainer with `PatchAlignment` attached, collator included, against one without."""
    from vlm_step import WAIT_SECONDS, steps_of

    steps = steps_of("tiny", "cpu", 2)
    row.detail = f"CPU time of one thread, and {WAIT_SECONDS * 1e3:.0f} ms for the layers of the LLM"

    def waited(actions: Sequence[Callable[[], object]]) -> Callable[[], Step]:
        def action() -> Step:
            # The least of several: a step takes milliseconds.
            times = times_of(lambda: [part() for part in actions], 1 if run.is_tiny else 10, time.process_time)
            return Step(min(times) + WAIT_SECONDS, math.nan)

        return action

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time would count a second one that waits
    try:
        run.take_turns(row, Local(waited([steps.aligned, steps.collator])), Local(waited([steps.captions])))
    finally:
        torch.set_num_threads(threads)


def answers(run: Run, row: Row, *, batch_size: int) -> None:
    """Answers in batches against upstream's loop of one question at a time, on the same weights."""
    require_miniature()
    from answering import SCENES, TEMPLATE, miniature, one_by_one

    from llava.conversation import conv_templates
    from llava.eval.answering import GenerationSettings, answer_questions
    from llava.eval.vqa_files import vqa_questions

    loaded, template = miniature("cpu"), conv_templates[TEMPLATE]
    questions = vqa_questions(SCENES / "questions.jsonl", SCENES)[: 2 if run.is_tiny else max(4, batch_size)]
    settings = GenerationSettings(max_new_tokens=16)
    row.detail = f"{len(questions)} questions about {len({question.images for question in questions})} images"
    run.take_turns(
        row,
        Local(lambda: list(answer_questions(questions, *loaded[:3], template, settings, batch_size=batch_size))),
        Local(lambda: one_by_one(questions, loaded, template, 16)),
    )


def shared_prefix(run: Run, row: Row) -> None:
    """A step of stage 2 whose questions stand behind one image, against a row for each question."""
    require_miniature()
    from stage2_step import sides_of

    count, together, alone = sides_of(1 if run.is_tiny else 2)
    row.detail = f"{count} questions"
    run.take_turns(row, Local(together), Local(alone))


def packed(run: Run, row: Row) -> None:
    """A step of stage 2 whose samples follow each other in rows, against a padded row for each sample."""
    require_miniature()
    from stage2_step import packed_sides

    samples = 3 if run.is_tiny else 12
    row.detail = f"{samples} samples, a third of them without an image"
    run.take_turns(row, *map(Local, packed_sides(samples)))


def pursuit(run: Run, row: Row) -> None:
    """Matching pursuit of an image's tokens at once, against Algorithm 1 token by token."""
    from matching_pursuit import ROUNDS, literal_loop, tokens_of_words

    from patch_aligned.analysis.matching_pursuit import WordDictionary, matching_pursuit

    words, width, tokens, looped = (200, 64, 16, 2) if run.is_tiny else (32000, 1024, 576, 12)
    made, units = tokens_of_words(width, words, tokens, ROUNDS)
    dictionary = WordDictionary(units)
    row.detail = f"{tokens} tokens of width {width}, {words} words; the loop's time is that of {looped} tokens, scaled"

    def loop() -> Step:
        start = time.perf_counter()
        for token in made[:looped]:
            literal_loop(token, units, ROUNDS)
        return Step((time.perf_counter() - start) * tokens / looped, math.nan)

    run.take_turns(row, Local(lambda: matching_pursuit(made, dictionary, ROUNDS)), Local(loop))


def masks(run: Run, row: Row) -> None:
    """Covered tokens of regions from run lengths, against decoding the masks alone."""
    from mask_tokens import compare

    for _ in range(run.repeats):
        found = compare(2, repeats=1) if run.is_tiny else compare(repeats=5)
        row.seconds.append(found.cover_s)
        row.baseline_seconds.append(found.decode_s)
        row.detail = f"{found.regions} regions, CPU time"


SMALL, WIDE = "smollm2_six_layers", "7b_two_layers"
ROWS: dict[str, tuple[str, str, Callable[..., None], dict[str, Any]]] = {
    "stage1_upstream": ("stage-1 step", "upstream", stage1, {"shape": SMALL, "against": "upstream"}),
    "stage1_upstream_bf16": ("stage-1 step, --bf16 auto", "upstream, float32", stage1,
                             {"shape": SMALL, "against": "upstream", "bf16": "auto"}),
    "stage1_transformers": ("stage-1 step", "transformers", stage1, {"shape": SMALL}),
    "stage1_transformers_bf16": ("stage-1 step, --bf16 auto", "transformers, bf16", stage1,
                                 {"shape": SMALL, "bf16": "auto", "theirs": "True"}),
    "stage1_bf16": ("stage-1 step, --bf16 auto", "ours in float32", stage1,
                    {"shape": SMALL, "against": "ours", "bf16": "auto"}),
    "stage1_plain": ("stage-1 step", "our plain path", stage1, {"shape": SMALL, "against": "plain"}),
    "stage1_transformers_wide": ("stage-1 step", "transformers", stage1, {"shape": WIDE}),
    "stage1_bf16_wide": ("stage-1 step, --bf16 auto", "ours in float32", stage1,
                         {"shape": WIDE, "against": "ours", "bf16": "auto"}),
    "patch_loss": ("patch loss", "the step it is in", patch_loss, {}),
    "attach": ("Trainer step with the patch loss", "without", attach, {}),
    "generate_upstream": ("answer", "upstream", stage1, {"shape": SMALL, "against": "upstream", "task": "generate"}),
    "generate_transformers": ("answer", "transformers", stage1, {"shape": SMALL, "task": "generate"}),
    "generate_bf16": ("answer, bfloat16", "ours in float32", stage1,
                      {"shape": SMALL, "against": "ours", "task": "generate", "bf16": "auto"}),
    "answers_1": ("answers, one at a time", "upstream's loop", answers, {"batch_size": 1}),
    "answers_16": ("answers, 16 at a time", "upstream's loop", answers, {"batch_size": 16}),
    "stage2_prefix": ("stage-2 step, --independent_turns", "a row a question", shared_prefix, {}),
    "stage2_packed": ("stage-2 step, --pack_samples", "padded rows", packed, {}),
    "pursuit": ("matching pursuit", "token by token", pursuit, {}),
    "masks": ("tokens of regions", "decoding the masks", masks, {}),
}  # fmt: skip
"""What is measured, against what, by which function, with which arguments."""


def describe_cpu(run: Run) -> dict[str, Any]:
    """What the numbers are measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "cpu": next((line.partition(": ")[2] for line in names if line.startswith("model name")), platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "multiplies_bf16": cpu_multiplies_bf16(),
        **describe_machine(*PACKAGES),
        "repeats": run.repeats,
        "tiny": run.is_tiny,
    }


def table_of(report: dict[str, Any]) -> str:
    """The table of a report."""
    machine, versions = report["machine"], report["machine"]["versions"]
    rows = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in report["rows"]]
    lines = [
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {machine['date']}, commit {machine['commit']}; medians of {machine['repeats']} "
        "turns, with the least and the greatest ratio" + "; tiny sizes" * machine["tiny"],
        "",
        "| what | against | times as fast | time, ours / theirs | memory: peak / above loaded | notes |",
        "|---|---|--:|--:|--:|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the rows and writes the files; the exit status is 1 if a row failed."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", default=",".join([*ROWS, "growth"]), help="names with commas between")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--upstream", type=Path, help="checkout of the original LLaVA with its environment in .venv")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--docs", action="store_true", help="put table and plot into docs/performance.md, too")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/cpu-DATE)")
    args = parser.parse_args(arguments)
    wanted = args.rows.split(",")
    if unknown := [name for name in wanted if name not in (*ROWS, "growth")]:
        parser.error(f"--rows: found {', '.join(unknown)}, expected some of {', '.join(ROWS)}, growth")
    out = args.out or RESULTS / f"cpu-{'tiny-' * args.tiny}{date.today().isoformat()}"
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), args.repeats, args.tiny, args.upstream)
        report: dict[str, Any] = {"machine": describe_cpu(run)}
        for name in wanted:
            if name == "growth":
                report["growth"] = measure_growth(args.repeats, is_tiny=args.tiny)
                plot_growth(report["growth"], out / "growth.svg")
                continue
            what, baseline, measure, settings = ROWS[name]
            row = Row(name, what, baseline)
            try:
                measure(run, row, **settings)
            except NotRunError as reason:
                row.status = str(reason)
            except Exception as error:
                row = Row(name, what, baseline, status=f"failed: {type(error).__name__}: {error}"[:300])
            run.end_row()
            rows.append(row)
            print(f"{name}: {' | '.join(row.cells())}", flush=True)
        report["rows"] = [row.record() for row in rows]
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "table.md").write_text(table_of(report) + "\n")
    if args.docs:
        page = ROOT / "docs/performance.md"
        before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
        page.write_text(f"{before}{BEGIN}\n\n{table_of(report)}\n\n{PLOT}\n\n{END}{after}")
        shutil.copy(out / "growth.svg", ROOT / "docs/images/growth.svg")
    print(f"\n{table_of(report)}\n\nWritten: {out}")
    return int(any(row.status.startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
