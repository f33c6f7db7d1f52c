"""Two models on the same questions: the difference of their scores, with an interval from the paired bootstrap."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patch_aligned.intervals import percentile_interval, resampled_means
from patch_aligned.results.paper import Column
from patch_aligned.results.render import Block, Cell, Row
from patch_aligned.results.run import BoxFrame, Filled, Run, RunFileError, Sample, conditions_of, read_samples
from patch_aligned.results.tables import LIMIT_MARK, Entrant, frame_of, metric_of, score_factor, shown_as

_ROUNDING = 6e-4  # some scorers round a share to three digits
_DECIDING = ("task", "template", "decoding", "numbers", "judge")  # conditions that should be the same for both models


@dataclass(frozen=True)
class PairedDifference:
    """A score of the second run less that of the first, over the rows that both answered.

    Attributes:
        first, second: the score over these rows.
        value: the difference.
        low, high: ends of the middle 95% of the draws.
        share_above_zero: share of the draws in which the second is above; ties count half.
        rows, groups: how many rows matched, and in how many groups they are drawn.
        all_rows: whether these are all rows of both runs.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    share_above_zero: float
    rows: int
    groups: int
    all_rows: bool


def paired_difference(
    first: Sequence[Sample], second: Sequence[Sample], metric: str, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compares two runs row by row: rows match where id and target are the same.

    Rows of one group, such as the expressions of one image, are drawn together.

    Raises:
        ValueError: no row matches, or a matching one has no such score.
    """
    others = {sample.id: sample for sample in second}
    pairs = [
        (sample, others[sample.id])
        for sample in first
        if sample.id in others and others[sample.id].target == sample.target
    ]
    if not pairs:
        raise ValueError("no row has the same id and target in both runs")
    for sample in (sample for pair in pairs for sample in pair):
        if metric not in sample.scores:
            raise ValueError(f"row {sample.id!r} has no score {metric!r} of its own")
    scores = np.array([[a.scores[metric], b.scores[metric]] for a, b in pairs])  # [I, 2]
    names: dict[object, int] = {}
    groups = np.array([names.setdefault(a.group or ("row", a.id), len(names)) for a, _ in pairs])  # [I]
    sums = np.zeros((len(names), 1))  # [G, 1]
    np.add.at(sums[:, 0], groups, scores[:, 1] - scores[:, 0])
    counts = np.bincount(groups).astype(np.float64)[:, None]  # [G, 1]
    draws = resampled_means(sums, counts, resamples, seed)[:, 0]  # [N]
    low, high = percentile_interval(draws)
    above = float((draws > 0).mean() + 0.5 * (draws == 0).mean())
    before, after = scores.mean(axis=0).tolist()
    all_rows = len(pairs) == len(first) == len(second)
    return PairedDifference(before, after, after - before, low, high, above, len(pairs), len(names), all_rows)


def compare(
    first: Entrant,
    second: Entrant,
    metric: str | None = None,
    box_frame: BoxFrame | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Block:
    """Every benchmark that both have runs of, a line each.

    Args:
        first, second: the models.
        metric: the score; None: the headline of each benchmark.
        box_frame: how boxes are read where a run has both readings; None: as its settings say.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Raises:
        RunFileError: the models share no benchmark, or none of their runs has that metric.
    """
    runs, others = ({run.result.benchmark: run for run in entrant.runs} for entrant in (first, second))
    shared = [name for name in runs if name in others]
    if not shared:
        raise RunFileError(
            f"{first.name} and {second.name} share no benchmark; found {', '.join(runs)} and {', '.join(others)}"
        )
    known = sorted({metric for name in shared for run in (runs[name], others[name]) for metric in run.result.scores})
    if metric is not None and metric not in known:
        near = difflib.get_close_matches(metric, known, n=3, cutoff=0.5) or known
        raise RunFileError(f"--metric: found {metric!r}, expected a score of the runs, such as {', '.join(near)}")
    rows, notes = [], []
    for name in shared:
        row, said = _compare_runs(name, runs[name], others[name], metric, box_frame, resamples, seed)
        notes += said
        if row:
            rows.append(row)
    if alone := [name for name in (*runs, *others) if (name in runs) != (name in others)]:
        notes.append(f"Only one of the two has a run of {', '.join(alone)}.")
    notes.append(
        f"Difference: {second.name} less {first.name}; the interval holds the middle 95% of {resamples:,} paired "
        f"resamples (seed {seed}), in which rows of one image stay together where the run says so; the last column is "
        "the share of them in which the second is ahead, ties counted half. Rows match by id and target."
    )
    heads = ("Score", "Rows", first.name, second.name, "Difference", "95% interval", "Ahead")
    return Block(
        f"{second.name} against {first.name}", "Benchmark", tuple(("", head) for head in heads), tuple(rows),
        tuple(notes),
    )  # fmt: skip


def _compare_runs(
    name: str, first: Run, second: Run, metric: str | None, box_frame: BoxFrame | None, resamples: int, seed: int
) -> tuple[Row | None, list[str]]:
    chosen, other = (metric_of(run.result, metric, box_frame) for run in (first, second))
    if chosen != other:
        return None, [f"{name}: not compared: {chosen!r} stands for the one run, {other!r} for the other."]
    scores = [run.result.scores.get(chosen or "") for run in (first, second)]
    if chosen is None or scores[0] is None or scores[1] is None:
        return None, [f"{name}: not compared: there is no score {chosen!r} in both runs."]
    samples = [read_samples(run.folder) for run in (first, second)]
    for run, rows in zip((first, second), samples, strict=True):
        own = [sample.scores[chosen] for sample in rows if chosen in sample.scores]
        score = run.result.scores[chosen]
        rounding = _ROUNDING * (100 if score.unit == "points" else 1)
        if not own or len(own) < len(rows) or abs(sum(own) / len(own) - score.value) > rounding:
            return None, [f"{name}: not compared: {chosen!r} is no mean over rows, so rows cannot be resampled."]
    try:
        found = paired_difference(samples[0], samples[1], chosen, resamples, seed)
    except ValueError as error:
        return None, [f"{name}: not compared: {error}."]
    factor = score_factor(first, chosen, Column("", chosen, shown=shown_as(scores[0].unit)))
    values = [f"{number * factor:.2f}" for number in (found.first, found.second)]
    settings = [run.result.settings for run in (first, second)]
    mark = LIMIT_MARK if any(setting.limit is not None for setting in settings) else ""
    matched = f"{found.rows:,}" if found.all_rows else f"{found.rows:,} of {len(samples[0]):,} and {len(samples[1]):,}"
    numbers = [
        *values,
        f"{found.value * factor:+.2f}",
        f"{found.low * factor:+.2f} to {found.high * factor:+.2f}",
        f"{100 * found.share_above_zero:.1f}%",
    ]
    row = Row(name, (Cell(chosen), Cell(matched, mark=mark), *map(Cell, numbers)))
    notes = [f"{name}: {LIMIT_MARK} a run has --limit: a trial, no result."] if mark else []
    if differing := [_data_of(run) for run in (first, second) if _data_of(first) != _data_of(second)]:
        notes.append(f"{name}: the data differ: {' against '.join(differing)}.")
    steps = [_trained_steps(run) for run in (first, second)]
    if None not in steps and steps[0] != steps[1]:
        notes.append(f"{name}: the models were trained for {steps[0]:,} against {steps[1]:,} steps.")
    if settings[0].prompt != settings[1].prompt:
        notes.append(f"{name}: the prompts differ.")
    one, two = (conditions_of(Filled("", "", run.result, frame_of(run.result, box_frame))) for run in (first, second))
    if differing := [f"{one[kind]} against {two[kind]}" for kind in _DECIDING if one[kind] != two[kind]]:
        notes.append(f"{name}: the runs differ in more than the model: {'; '.join(differing)}.")
    return row, notes


def _data_of(run: Run) -> str:
    data = run.result.data
    return f"{data.source}@{data.revision or 'no revision'}, split {data.split}"


def _trained_steps(run: Run) -> int | None:
    """Steps of the training that left the model's folder, where it is on this machine."""
    try:
        state = json.loads((Path(run.result.model.path) / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
