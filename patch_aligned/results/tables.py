"""The paper's tables with rows for our runs: which run fills which cell, and the notes below."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from patch_aligned.results.paper import DASH, PAPER_TABLES, Column, PaperTable, Shown, relative_gain
from patch_aligned.results.render import Block, Cell, Row
from patch_aligned.results.run import (
    ACCURACY,
    LEGACY_METRIC,
    RESULT_FILE,
    BoxFrame,
    Run,
    RunFileError,
    RunResult,
    find_runs,
)

LIMIT_MARK = "†"
_FACTORS = {("share", "percent"): 100.0, ("points", "percent"): 1.0, ("share", "share"): 1.0, ("points", "share"): 0.01,
            ("sum", "sum"): 1.0}  # fmt: skip
_FRAMES = {
    "square": "boxes read in the padded square and taken back to the image",
    "image": "boxes read in the image's own frame",
}
_PROMPT_CHARACTERS = 90


@dataclass(frozen=True)
class ModelRuns:
    """The runs of one output folder, all of one checkpoint: usually one row of a table."""

    name: str
    runs: tuple[Run, ...]

    def where(self, wanted: Callable[[RunResult], bool]) -> ModelRuns:
        """The same model with some of its runs."""
        return replace(self, runs=tuple(run for run in self.runs if wanted(run.result)))


def find_models(folders: Sequence[Path], names: Sequence[str] = ()) -> list[ModelRuns]:
    """Read one model per folder, named as in its runs or by `names`; `RunFileError` if it has runs of several."""
    if names and len(names) != len(folders):
        raise RunFileError(f"--names: found {len(names)}, expected {len(folders)}, one for each folder of runs")
    models = []
    for folder in folders:
        runs = find_runs(folder)
        by_weights = {run.result.model.weights: run for run in runs}
        if len(by_weights) > 1:
            found = ", ".join(
                f"{run.folder.name} of {run.result.model.sha256[:12]}"
                f"{f' on {run.result.model.base}' if run.result.model.base else ''}"
                for run in by_weights.values()
            )
            raise RunFileError(
                f"{folder}: found runs of {len(by_weights)} checkpoints ({found}); expected one: evaluate the older "
                "again"
            )
        _each_once(((run.result.benchmark, run) for run in runs), "benchmark")
        models.append(ModelRuns(runs[0].result.model.name, tuple(runs)))
    labels = list(names) or [model.name for model in models]
    return [
        replace(model, name=f"{label} ({folder})" if labels.count(label) > 1 else label)
        for model, label, folder in zip(models, labels, folders, strict=True)
    ]


def make_table(number: int, models: Sequence[ModelRuns], box_frame: BoxFrame | None = None) -> list[Block]:
    """Table 4 to 8 of the paper with our rows below. Runs of the miniature are in a table of their own."""
    table = PAPER_TABLES[number]
    chosen = [model.where(lambda result: number in result.tables) for model in models]
    if not any(model.runs for model in chosen):
        held = sorted({run.result.benchmark for model in models for run in model.runs})
        raise RunFileError(f"no run belongs to Table {number}; found runs of {', '.join(held)}")
    known = {column.run_column for column in table.columns}
    for run in (run for model in chosen for run in model.runs):
        if not is_miniature(run.result) and "" not in known and run.result.column not in known:
            raise RunFileError(
                f"{run.folder / RESULT_FILE}: field 'column': found {run.result.column!r}, expected one of Table "
                f"{number}: {', '.join(sorted(known))}"
            )
    blocks = []
    real = [model.where(lambda result: not is_miniature(result)) for model in chosen]
    if any(model.runs for model in real):
        blocks += _rec_blocks(number, real, box_frame) if table.is_rec else [_block(number, table, real)]
    small = [model.where(is_miniature) for model in chosen]
    if any(model.runs for model in small):
        block = free_block(small, f"Table {number} in miniature: {table.title}", table, box_frame)
        blocks.append(_noted(block, "The miniature's scenes and models: not comparable with the paper's numbers."))
    return blocks


def projector_block(number: int, folders: Sequence[Path]) -> Block:
    """Table 1, 2 or 3 of the paper, with the projectors of `patch-aligned analyze` reports below."""
    table = PAPER_TABLES[number]
    rows = [Row(f"{row.model} (paper)", tuple(map(Cell, row.cells))) for row in table.rows]
    for path in (folder / "analysis.json" for folder in folders):
        if not path.is_file():
            raise RunFileError(f"{path}: there is no such file; expected the --output of patch-aligned analyze")
        for name, model in json.loads(path.read_text(encoding="utf-8"))["models"].items():
            cells = []
            for column in table.columns:
                value = model
                for key in str(column.metric).split("."):
                    if key not in value:
                        raise RunFileError(f"{path}: model {name!r} has no {column.metric}; run analyze again")
                    value = value[key]
                cells.append(Cell() if value is None else Cell(f"{value:.{column.digits}f}"))
            rows.append(Row(name, tuple(cells)))
    columns = tuple((column.group, column.name) for column in table.columns)
    return Block(f"Table {number}: {table.title}", "Projector", columns, tuple(rows), (table.conditions,))


def free_block(
    models: Sequence[ModelRuns], title: str, table: PaperTable | None = None, box_frame: BoxFrame | None = None
) -> Block:
    """Runs in columns of their own: one per benchmark, or one per metric where the paper's table has metrics."""
    by_metric = [column for column in table.columns if not column.run_column] if table else []
    columns: dict[str, list[Column]] = {}  # by benchmark
    for result in (run.result for model in models for run in model.runs):
        heading = (table and result.column) or result.benchmark
        score = result.scores.get(metric_of(result) or "")
        own = Column(heading, shown=shown_as(score.unit if score else "share"))
        columns.setdefault(result.benchmark, by_metric or [own])
    filler = _Filler(box_frame)
    rows = []
    for model in models:
        by_benchmark = {run.result.benchmark: run for run in model.runs}
        cells = [
            filler.cell(by_benchmark.get(benchmark), column, model.name)
            for benchmark, of_benchmark in columns.items()
            for column in of_benchmark
        ]
        rows.append(Row(model.name, tuple(cells)))
    several = by_metric and len(columns) > 1
    heads = tuple((name if several else "", column.name) for name, group in columns.items() for column in group)
    return Block(title, "Model", heads, tuple(rows), (*filler.notes(), *_checkpoint_notes(models)))


def is_miniature(result: RunResult) -> bool:
    """Whether a run is of the miniature's own benchmarks."""
    return result.benchmark.startswith("mini_") or result.benchmark == "captions_mini"


def frame_of(result: RunResult, box_frame: BoxFrame | None = None) -> BoxFrame | None:
    """How a run's boxes are read: `box_frame`, or as its settings say; None if it does not have both readings."""
    if not result.scores.keys() >= set(ACCURACY.values()):
        return None
    return box_frame or result.settings.box_frame or "square"


def metric_of(result: RunResult, metric: str | None = None, box_frame: BoxFrame | None = None) -> str | None:
    """The score to show for a run: `metric`, the chosen reading of its boxes, or its headline."""
    if metric is not None:
        return metric
    frame = frame_of(result, box_frame)
    return ACCURACY[frame] if frame else result.headline


def score_factor(run: Run, metric: str, column: Column) -> float:
    """The factor between a score of a run and what a column shows; `RunFileError` for a unit that it does not show."""
    unit = run.result.scores[metric].unit
    if (factor := _FACTORS.get((unit, column.shown))) is None:
        fitting = " or ".join(repr(unit) for unit, shown in _FACTORS if shown == column.shown)
        raise RunFileError(
            f"{run.folder / RESULT_FILE}: field 'scores.{metric}.unit': found {unit!r}, expected {fitting} for "
            f"column {column.heading!r}"
        )
    return factor


def shown_as(unit: str) -> Shown:
    """How scores of a unit are shown where no column of the paper defines it."""
    return "sum" if unit == "sum" else "percent"


class Filled(NamedTuple):
    """A filled cell, with the run that it shows."""

    column: str
    model: str
    result: RunResult
    box_frame: str | None = None  # the reading that it shows


class _Filler:
    """Fills cells, and collects what the notes must say about them."""

    def __init__(self, box_frame: BoxFrame | None) -> None:
        self.box_frame = box_frame
        self.filled: list[Filled] = []
        self.missing: list[str] = []
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
        self.filled.append(
            Filled(column.heading, model, result, frame_of(result, self.box_frame) or result.settings.box_frame)
        )
        factor = score_factor(run, metric, column)
        self.has_errors |= score.stderr is not None
        stderr = "" if score.stderr is None else f"{score.stderr * factor:.{column.digits}f}"
        mark = "" if result.settings.limit is None else LIMIT_MARK
        return Cell(f"{score.value * factor:.{column.digits}f}", stderr, mark)

    def notes(self) -> list[str]:
        notes = list(self.missing)
        if any(cell.result.settings.limit is not None for cell in self.filled):
            notes.insert(0, f"{LIMIT_MARK} From a run with --limit: a trial on some of the rows, no result.")
        return [*notes, *condition_notes(self.filled), *(["± is the standard error."] if self.has_errors else [])]


def _rec_blocks(number: int, models: Sequence[ModelRuns], box_frame: BoxFrame | None) -> list[Block]:
    """The paper's protocol next to the paper's rows; our own, with another prompt, rows and frame, separately."""
    table = PAPER_TABLES[number]
    legacy = [model.where(lambda result: LEGACY_METRIC in result.scores) for model in models]
    own = [model.where(lambda result: LEGACY_METRIC not in result.scores) for model in models]
    title = f"{table.title}, legacy protocol (lmms-eval's bbox_rec tasks)"
    block = _block(number, replace(table, title=title), legacy)
    if not any(model.runs for model in legacy):
        block = _noted(block, "No run of the legacy tasks (refcoco_bbox_rec_val and so on) was given.")
    if not any(model.runs for model in own):
        return [block]
    frames = {frame_of(run.result, box_frame) for model in own for run in model.runs}
    names = {"square": "the padded square", "image": "the image"}
    said = " or ".join(name for frame, name in names.items() if frame in frames) or "an unknown frame"
    title = f"{table.title}, own protocol (training's prompt, usual splits, boxes read in {said})"
    apart = _block(number, replace(table, title=title, rows=(), conditions=""), own, box_frame)
    return [block, _noted(apart, "Another protocol than the paper's rows above: its numbers stand for themselves.")]


def _block(number: int, table: PaperTable, models: Sequence[ModelRuns], box_frame: BoxFrame | None = None) -> Block:
    """The paper's rows, then ours."""
    filler = _Filler(box_frame)
    rows = [
        Row(f"{row.model} (paper)", (*map(Cell, row.facts), *map(Cell, row.cells)), row.section) for row in table.rows
    ]
    gains = [_gain_note(table, *pair) for pair in pairwise(rows) if "Aligned" in pair[1].label]
    section = "Our runs" if any(row.section for row in table.rows) else ""
    for model in models:
        for label, runs in _lines(model, number):
            cells = [filler.cell(runs.get(column.run_column), column, label) for column in table.columns]
            rows.append(Row(label, (*(Cell() for _ in table.fact_columns), *cells), section))
    ours = rows[len(table.rows) :]
    gains += [_gain_note(table, ours[0], row) for row in ours[1:]]
    columns = (*(("", fact) for fact in table.fact_columns), *((column.group, column.name) for column in table.columns))
    notes = [*filter(None, (table.conditions, *gains)), *filler.notes(), *_checkpoint_notes(models)]
    return Block(f"Table {number}: {table.title}", "Model", columns, tuple(rows), tuple(notes))


def _gain_note(table: PaperTable, before: Row, after: Row) -> str:
    """What a row gains over another in the columns that both have, and in each of them."""
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


def _lines(model: ModelRuns, number: int) -> list[tuple[str, dict[str, Run]]]:
    """Labels and runs by column of a model's rows: one, or one per benchmark where the columns are metrics."""
    if not model.runs:
        return []
    if all(not column.run_column for column in PAPER_TABLES[number].columns):
        several = len(model.runs) > 1
        return [(f"{model.name} ({run.result.benchmark})" if several else model.name, {"": run}) for run in model.runs]
    return [(model.name, _each_once(((run.result.column, run) for run in model.runs), f"Table {number}'s column"))]


def _each_once(named: Iterable[tuple[str, Run]], kind: str) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for name, run in named:
        if (other := runs.setdefault(name, run)) is not run:
            raise RunFileError(
                f"{other.folder} and {run.folder}: found two runs of {kind} {name!r}, expected one: move one of them "
                "to another folder"
            )
    return runs


def _noted(block: Block, note: str) -> Block:
    return replace(block, notes=(note, *block.notes))


def _checkpoint_notes(models: Sequence[ModelRuns]) -> list[str]:
    identities = [(model.name, model.runs[0].result.model) for model in models if model.runs]
    return [
        *training_notes(models),
        *(
            f"{name}: {identity.path}{f' on {identity.base}' if identity.base else ''}, sha256 {identity.sha256[:12]}."
            for name, identity in identities
        ),
    ]


def training_notes(models: Sequence[ModelRuns]) -> list[str]:
    """Notes on models that were trained for other steps, or with other data or seeds, as far as that is recorded."""
    trained = {model.name: _training_of(model.runs[0]) for model in models if model.runs}
    notes = []
    for fact in dict.fromkeys(fact for facts in trained.values() for fact in facts):
        values = {name: facts[fact] for name, facts in trained.items() if fact in facts}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} ({name})" for name, value in values.items())
            notes.append(f"The models' trainings differ in {fact}: {listed}.")
    return notes


def _training_of(run: Run) -> dict[str, Any]:
    """What the evaluation recorded of the training; empty for runs of earlier versions."""
    record = run.folder / "run.json"
    return json.loads(record.read_text(encoding="utf-8")).get("trained", {}) if record.is_file() else {}


def conditions_of(cell: Filled) -> dict[str, str]:
    """The conditions of a number in words, by kind."""
    result, settings, data = cell.result, cell.result.settings, cell.result.data
    kind, colon, revision = (data.revision or "").rpartition(":")  # a commit, or `sha256:` and a hash
    at = f"@{kind}{colon}{revision[:12]}" if revision else ""
    judge = settings.judge or {}
    judge_name = judge.get("model") or ", ".join(f"{key} {value}" for key, value in judge.items())
    return {
        "task": f"{result.harness.name} {result.harness.version}, task {result.task}",
        "rows": f"{data.rows:,} rows of {data.source}{at}, split {data.split}",
        "limit": f"cut by --limit {settings.limit}" if settings.limit is not None else "",
        "prompt": f"prompt “{shortened_prompt(settings.prompt)}”",
        "template": f"template {settings.conversation}",
        "boxes": _FRAMES[cell.box_frame] if cell.box_frame else "",
        "decoding": ("greedy" if settings.temperature == 0 else f"sampled at temperature {settings.temperature:g}")
        + f", at most {settings.max_new_tokens} new tokens",
        "numbers": f"{settings.dtype}, batch size {settings.batch_size}",
        "judge": f"judge {judge_name}" if judge else "no judge",
    }


def shortened_prompt(prompt: str) -> str:
    """The question after the first image, on one line; the middle of a long one is left out."""
    text = " ".join(prompt.partition("<image>")[2].split()) or " ".join(prompt.split())
    if len(text) <= _PROMPT_CHARACTERS:
        return text
    half = _PROMPT_CHARACTERS // 2
    return f"{text[:half].rpartition(' ')[0] or text[:half]} … {text[-half:].partition(' ')[2] or text[-half:]}"


def condition_notes(cells: Sequence[Filled]) -> list[str]:
    """Notes on the conditions of all cells: first the shared ones, then the others by column and model."""
    found = [(cell, conditions_of(cell)) for cell in cells]
    if not found:
        return []
    kinds = list(found[0][1])
    shared = [kind for kind in kinds if len({conditions[kind] for _, conditions in found}) == 1]
    columns = list(dict.fromkeys(cell.column for cell in cells))
    notes = []
    if texts := [found[0][1][kind] for kind in shared if found[0][1][kind]]:
        notes.append(f"{columns[0] if len(columns) == 1 else 'All columns'}: {'; '.join(texts)}.")
    columns_of: dict[str, list[str]] = {}
    for column in columns:
        here = [(cell.model, conditions) for cell, conditions in found if cell.column == column]
        texts = [text for kind in kinds if kind not in shared and (text := _by_model(here, kind))]
        if len({cell.result.data.rows_sha256 for cell in cells if cell.column == column}) > 1:
            texts.append("the models were asked different rows: their numbers do not compare")
        if texts:
            columns_of.setdefault("; ".join(texts), []).append(column)
    return [*notes, *(f"{', '.join(names)}: {text}." for text, names in columns_of.items())]


def _by_model(here: Sequence[tuple[str, dict[str, str]]], kind: str) -> str:
    by_text: dict[str, list[str]] = {}
    for model, conditions in here:
        by_text.setdefault(conditions[kind], []).append(model)
    if len(by_text) == 1:
        return next(iter(by_text))
    return ", ".join(f"{text} ({', '.join(models)})" for text, models in by_text.items() if text)
