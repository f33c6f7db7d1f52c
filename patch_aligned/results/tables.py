"""The paper's tables with the rows of our runs beside them: which run fills which cell, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from patch_aligned.results.paper import DASH, PAPER_TABLES, Column, PaperTable, Shown, relative_gain
from patch_aligned.results.render import Block, Cell, Row
from patch_aligned.results.run import (
    ACCURACY,
    LEGACY_METRIC,
    BoxFrame,
    Filled,
    Run,
    RunFileError,
    RunResult,
    condition_notes,
    find_runs,
)

LIMIT_MARK = "†"
_FACTORS = {("share", "percent"): 100.0, ("points", "percent"): 1.0, ("share", "share"): 1.0, ("points", "share"): 0.01,
            ("sum", "sum"): 1.0}  # fmt: skip


@dataclass(frozen=True)
class Entrant:
    """A row's worth of runs: those of one output folder, all of one checkpoint."""

    name: str
    runs: tuple[Run, ...]


def entrants_of(folders: Sequence[Path], names: Sequence[str] = ()) -> list[Entrant]:
    """One entrant a folder, named as its model is or as `names` say.

    Raises:
        RunFileError: a folder has no run, runs of several checkpoints, or two of one benchmark; there is another number
            of names.
    """
    if names and len(names) != len(folders):
        raise RunFileError(f"--names: found {len(names)}, expected {len(folders)}, one for each folder of runs")
    entrants = []
    for index, folder in enumerate(folders):
        runs = find_runs([folder])
        by_model = {run.result.model.weights: run for run in runs}
        if len(by_model) > 1:
            found = ", ".join(
                f"{run.folder.name} of {run.result.model.sha256[:12]}"
                f"{f' on {run.result.model.base}' if run.result.model.base else ''}"
                for run in by_model.values()
            )
            raise RunFileError(
                f"{folder}: found runs of {len(by_model)} checkpoints ({found}); expected one: evaluate the older again"
            )
        by_benchmark: dict[str, Run] = {}
        for run in runs:
            other = by_benchmark.setdefault(run.result.benchmark, run)
            if other is not run:
                raise RunFileError(
                    f"{other.folder} and {run.folder}: found two runs of {run.result.benchmark}, expected one: move "
                    "one of them into a folder of its own"
                )
        entrants.append(Entrant(names[index] if names else runs[0].result.model.name, tuple(runs)))
    return _with_distinct_names(entrants, folders)


def make_table(number: int, entrants: Sequence[Entrant], box_frame: BoxFrame | None = None) -> list[Block]:
    """A table of the paper beside our rows; runs of the miniature come as a table of their own, without the paper's.

    Args:
        number: 4 to 8.
        entrants: our rows.
        box_frame: how our own tasks read boxes; None: as each run's settings say.

    Raises:
        RunFileError: no run belongs to the table, or one of them does not fit into it.
    """
    table = PAPER_TABLES[number]
    chosen = [
        Entrant(entrant.name, tuple(run for run in entrant.runs if number in run.result.tables)) for entrant in entrants
    ]
    if not any(entrant.runs for entrant in chosen):
        held = sorted({run.result.benchmark for entrant in entrants for run in entrant.runs})
        raise RunFileError(f"no run belongs to Table {number}; found runs of {', '.join(held)}")
    known = {column.run_column for column in table.columns}
    for run in (run for entrant in chosen for run in entrant.runs):
        if not is_miniature(run.result) and "" not in known and run.result.column not in known:
            raise RunFileError(
                f"{run.folder / 'result.json'}: field 'column': found {run.result.column!r}, expected one of Table "
                f"{number}: {', '.join(sorted(known))}"
            )
    blocks = []
    real = _only(chosen, lambda result: not is_miniature(result))
    if any(entrant.runs for entrant in real):
        blocks += _rec_blocks(table, real, box_frame) if table.is_rec else [_block(table, real, table.title)]
    small = _only(chosen, is_miniature)
    if any(entrant.runs for entrant in small):
        block = free_block(small, f"Table {number} in miniature: {table.title}", table, box_frame)
        blocks.append(_noted(block, "The miniature's scenes and models: not comparable with the paper's numbers."))
    return blocks


def projector_block(number: int, folders: Sequence[Path]) -> Block:
    """Table 1, 2 or 3 of the paper, and the projectors of reports below: those of `patch-aligned analyze`.

    Raises:
        RunFileError: a folder has no report, or one of an earlier version.
    """
    table = PAPER_TABLES[number]
    rows = [Row(f"{row.model} (paper)", tuple(map(Cell, row.cells))) for row in table.rows]
    for place in (folder / "analysis.json" for folder in folders):
        if not place.is_file():
            raise RunFileError(f"{place}: there is no such file; expected the --output of patch-aligned analyze")
        for name, model in json.loads(place.read_text(encoding="utf-8"))["models"].items():
            cells = []
            for column in table.columns:
                value = model
                for key in str(column.metric).split("."):
                    if key not in value:
                        raise RunFileError(f"{place}: model {name!r} has no {column.metric}; run analyze again")
                    value = value[key]
                cells.append(Cell() if value is None else Cell(f"{value:.{column.digits}f}"))
            rows.append(Row(name, tuple(cells)))
    columns = tuple((column.group, column.name) for column in table.columns)
    return Block(f"Table {number}: {table.title}", "Projector", columns, tuple(rows), (table.conditions,))


def free_block(
    entrants: Sequence[Entrant], title: str, table: PaperTable | None = None, box_frame: BoxFrame | None = None
) -> Block:
    """Runs in columns of their own, a benchmark each, or a metric each where the paper's table has metrics."""
    by_metric = [column for column in table.columns if not column.run_column] if table else []
    columns: dict[str, list[Column]] = {}  # by benchmark
    for result in (run.result for entrant in entrants for run in entrant.runs):
        heading = (table and result.column) or result.benchmark
        score = result.scores.get(metric_of(result) or "")
        own = Column("", heading, shown=shown_as(score.unit if score else "share"))
        columns.setdefault(result.benchmark, by_metric or [own])
    filler = _Filler(box_frame)
    rows = []
    for entrant in entrants:
        by_benchmark = {run.result.benchmark: run for run in entrant.runs}
        cells = [
            filler.cell(by_benchmark.get(benchmark), column, entrant.name)
            for benchmark, of_benchmark in columns.items()
            for column in of_benchmark
        ]
        rows.append(Row(entrant.name, tuple(cells)))
    several = by_metric and len(columns) > 1
    heads = tuple((name if several else "", column.name) for name, group in columns.items() for column in group)
    return Block(title, "Model", heads, tuple(rows), (*filler.notes(), *_checkpoint_notes(entrants)))


def is_miniature(result: RunResult) -> bool:
    """Whether a run is of the miniature's own benchmarks."""
    return result.benchmark.startswith("mini_") or result.benchmark == "captions_mini"


def frame_of(result: RunResult, box_frame: BoxFrame | None = None) -> BoxFrame | None:
    """How a run's boxes are read: as asked, or as its settings say; None where it has no two readings."""
    if not result.scores.keys() >= set(ACCURACY.values()):
        return None
    return box_frame or result.settings.box_frame or "square"


def metric_of(result: RunResult, metric: str | None = None, box_frame: BoxFrame | None = None) -> str | None:
    """The score that stands for a run: the one asked for, the reading of its boxes, or its headline."""
    if metric is not None:
        return metric
    frame = frame_of(result, box_frame)
    return ACCURACY[frame] if frame else result.headline


def score_factor(run: Run, metric: str, column: Column) -> float:
    """What a score of a run is multiplied with to be shown in a column.

    Raises:
        RunFileError: its unit has no place there.
    """
    unit = run.result.scores[metric].unit
    if (factor := _FACTORS.get((unit, column.shown))) is None:
        fitting = " or ".join(repr(unit) for unit, shown in _FACTORS if shown == column.shown)
        raise RunFileError(
            f"{run.folder / 'result.json'}: field 'scores.{metric}.unit': found {unit!r}, expected {fitting} for "
            f"column {column.heading!r}"
        )
    return factor


def shown_as(unit: str) -> Shown:
    """How scores of a unit are shown where no column of the paper says so."""
    return "sum" if unit == "sum" else "percent"


class _Filler:
    """Fills cells and remembers what the notes must say about them."""

    def __init__(self, box_frame: BoxFrame | None) -> None:
        self.box_frame = box_frame
        self.filled: list[Filled] = []
        self.missing: list[str] = []
        self.limited = False
        self.has_errors = False

    def cell(self, run: Run | None, column: Column, model: str) -> Cell:
        if run is None:
            return Cell()
        result = run.result
        metric = metric_of(result, column.metric, self.box_frame)
        score = result.scores.get(metric or "")
        if metric is None or score is None:
            reason = result.not_available.get(metric or "", "no such score in its run")
            if metric is None:
                reason = "scored by a server" + (f", file {result.submission}" if result.submission else "")
            self.missing.append(f"{column.heading} of {model}: {reason}.")
            return Cell()
        frame = frame_of(result, self.box_frame) or result.settings.box_frame
        self.filled.append(Filled(column.heading, model, result, frame))
        is_limited = result.settings.limit is not None
        self.limited |= is_limited
        factor = score_factor(run, metric, column)
        self.has_errors |= score.stderr is not None
        stderr = "" if score.stderr is None else f"{score.stderr * factor:.{column.digits}f}"
        return Cell(f"{score.value * factor:.{column.digits}f}", stderr, LIMIT_MARK if is_limited else "")

    def notes(self) -> list[str]:
        limited = [f"{LIMIT_MARK} From a run with --limit: a trial on some of the rows, no result."]
        errors = ["± is the standard error."] if self.has_errors else []
        return [*(limited if self.limited else []), *self.missing, *condition_notes(self.filled), *errors]


def _rec_blocks(table: PaperTable, entrants: Sequence[Entrant], box_frame: BoxFrame | None) -> list[Block]:
    """The paper's protocol beside the paper's rows, and our own, which has another prompt, rows and frame, apart."""
    legacy = _only(entrants, lambda result: LEGACY_METRIC in result.scores)
    own = _only(entrants, lambda result: LEGACY_METRIC not in result.scores)
    block = _block(table, legacy, f"{table.title}, legacy protocol (lmms-eval's bbox_rec tasks)")
    if not any(entrant.runs for entrant in legacy):
        block = _noted(block, "No run of the legacy tasks (refcoco_bbox_rec_val and so on) was given.")
    blocks = [block]
    if any(entrant.runs for entrant in own):
        apart = _block(
            replace(table, rows=(), conditions=""),
            own,
            f"{table.title}, own protocol (training's prompt, usual splits, boxes read in {_frames(own, box_frame)})",
            box_frame,
        )
        blocks.append(_noted(apart, "Another protocol than the paper's rows above: its numbers stand for themselves."))
    return blocks


def _frames(entrants: Sequence[Entrant], box_frame: BoxFrame | None) -> str:
    frames = {frame_of(run.result, box_frame) for entrant in entrants for run in entrant.runs}
    names = {"square": "the padded square", "image": "the image"}
    return " or ".join(name for frame, name in names.items() if frame in frames) or "an unknown frame"


def _block(table: PaperTable, entrants: Sequence[Entrant], title: str, box_frame: BoxFrame | None = None) -> Block:
    """The paper's rows, then ours."""
    filler = _Filler(box_frame)
    rows = [
        Row(f"{row.model} (paper)", (*map(Cell, row.facts), *map(Cell, row.cells)), row.section) for row in table.rows
    ]
    gains = [_gain_note(table, *pair) for pair in pairwise(rows) if "Aligned" in pair[1].label]
    section = "Our runs" if any(row.section for row in table.rows) else ""
    for entrant in entrants:
        for label, runs in _lines(entrant, table):
            cells = [filler.cell(runs.get(column.run_column), column, label) for column in table.columns]
            rows.append(Row(label, (*(Cell() for _ in table.fact_columns), *cells), section))
    ours = rows[len(table.rows) :]
    gains += [_gain_note(table, ours[0], row) for row in ours[1:]]
    columns = (*(("", fact) for fact in table.fact_columns), *((column.group, column.name) for column in table.columns))
    notes = [*filter(None, (table.conditions, *gains)), *filler.notes(), *_checkpoint_notes(entrants)]
    return Block(f"Table {table.number}: {title}", "Model", columns, tuple(rows), tuple(notes))


def _gain_note(table: PaperTable, before: Row, after: Row) -> str:
    """What a row gains over another in the columns that both have, and the parts where they are unlike."""
    facts = len(table.fact_columns)
    cells = zip(table.columns, before.cells[facts:], after.cells[facts:], strict=True)
    both = [(column.heading, float(a.text), float(b.text)) for column, a, b in cells if DASH not in (a.text, b.text)]
    if table.gain is None or not both or any(old == 0 for _, old, _ in both):
        return ""
    names, old, new = zip(*both, strict=True)
    note = f"{after.label} over {before.label}: {100 * relative_gain(old, new, table.gain):+.1f}%, {table.gain}"
    parts = [b / a - 1 for a, b in zip(old, new, strict=True)]
    note += f" ({', '.join(f'{name} {100 * part:+.1f}%' for name, part in zip(names, parts, strict=True))})"
    if table.gain == "mean of ratios" and sum(parts) > 0:
        note += f"; {names[parts.index(max(parts))]} alone is {max(parts) / sum(parts):.0%} of it"
    return f"{note}."


def _lines(entrant: Entrant, table: PaperTable) -> list[tuple[str, dict[str, Run]]]:
    """Labels and runs by column of an entrant's lines: one, or one a benchmark where the columns are metrics."""
    if not entrant.runs:
        return []
    if all(not column.run_column for column in table.columns):
        several = len(entrant.runs) > 1
        return [
            (f"{entrant.name} ({run.result.benchmark})" if several else entrant.name, {"": run}) for run in entrant.runs
        ]
    by_column: dict[str, Run] = {}
    for run in entrant.runs:
        other = by_column.setdefault(run.result.column, run)
        if other is not run:
            raise RunFileError(
                f"{other.folder} and {run.folder}: found two runs for the column {run.result.column!r} of Table "
                f"{table.number}; expected one: give them in folders of their own"
            )
    return [(entrant.name, by_column)]


def _only(entrants: Sequence[Entrant], wanted: Callable[[RunResult], bool]) -> list[Entrant]:
    return [Entrant(entrant.name, tuple(run for run in entrant.runs if wanted(run.result))) for entrant in entrants]


def _noted(block: Block, note: str) -> Block:
    return Block(block.title, block.corner, block.columns, block.rows, (note, *block.notes))


def _checkpoint_notes(entrants: Sequence[Entrant]) -> list[str]:
    models = [(entrant.name, entrant.runs[0].result.model) for entrant in entrants if entrant.runs]
    return [
        *training_notes(entrants),
        *(
            f"{name}: {model.path}{f' on {model.base}' if model.base else ''}, sha256 {model.sha256[:12]}."
            for name, model in models
        ),
    ]


def training_notes(entrants: Sequence[Entrant]) -> list[str]:
    """Notes on models that were trained for other steps, or with other data or seeds, as far as that is recorded."""
    trained = {entrant.name: _training_of(entrant.runs[0]) for entrant in entrants if entrant.runs}
    notes = []
    for fact in dict.fromkeys(fact for facts in trained.values() for fact in facts):
        values = {name: facts[fact] for name, facts in trained.items() if fact in facts}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} ({name})" for name, value in values.items())
            notes.append(f"The models' trainings differ in {fact}: {listed}.")
    return notes


def _training_of(run: Run) -> dict[str, Any]:
    """What the evaluation found recorded of the training; nothing in runs of earlier versions."""
    record = run.folder / "run.json"
    return json.loads(record.read_text(encoding="utf-8")).get("trained", {}) if record.is_file() else {}


def _with_distinct_names(entrants: list[Entrant], folders: Sequence[Path]) -> list[Entrant]:
    names = [entrant.name for entrant in entrants]
    return [
        Entrant(f"{entrant.name} ({folder})", entrant.runs) if names.count(entrant.name) > 1 else entrant
        for entrant, folder in zip(entrants, folders, strict=True)
    ]
