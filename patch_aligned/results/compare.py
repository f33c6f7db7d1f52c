"""Two models on the same questions: the difference of their scores, with an interval from the paired bootstrap."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patch_aligned.intervals import percentile_interval, resampled_means, resampled_over_seeds
from patch_aligned.results.paper import DASH, GAINS, Column, relative_gain
from patch_aligned.results.render import Block, Cell, Row
from patch_aligned.results.run import BoxFrame, Run, RunFileError, Sample, read_samples
from patch_aligned.results.tables import (
    LIMIT_MARK,
    Filled,
    ModelRuns,
    conditions_of,
    frame_of,
    metric_of,
    score_factor,
    shown_as,
    training_notes,
)

_ROUNDING = 6e-4  # some scorers round a share to three digits
_DECIDING = ("task", "template", "decoding", "numbers", "judge")  # conditions that should be the same for both models


@dataclass(frozen=True)
class PairedDifference:
    """A score of the second run minus that of the first, over the rows that both answered, and over seeds."""

    first: float  # the score over these rows
    second: float
    value: float  # the difference
    low: float  # ends of the middle 95% of the draws
    high: float
    share_above_zero: float  # share of the draws in which the second is ahead; ties count half
    rows: int  # how many rows matched
    groups: int  # in how many groups they are drawn
    all_rows: bool  # whether these are all rows of both runs


def paired_difference(
    first: Sequence[Sample], second: Sequence[Sample], metric: str, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare two runs row by row: rows match where id and target are the same.

    Rows of one group, such as the expressions of one image, are drawn together. `ValueError` if no row matches, or a
    matching one has no such score.
    """
    return paired_over_seeds([(first, second)], metric, resamples, seed)


def paired_over_seeds(
    pairs: Sequence[tuple[Sequence[Sample], Sequence[Sample]]], metric: str, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """As `paired_difference`, over a pair of runs for each seed of training; a mean over seeds.

    A draw takes the same images for all seeds, and then seeds with replacement, the same for both models.
    """
    names: dict[object, int] = {}
    scores, groups = [], []  # of each seed: [I, 2], [I]
    for first, second in pairs:
        matched = _matched(first, second, metric)
        scores.append(np.array([[a.scores[metric], b.scores[metric]] for a, b in matched]))
        groups.append(np.array([names.setdefault(a.group or ("row", a.id), len(names)) for a, _ in matched]))
    sums, counts = np.zeros((2, len(names), len(pairs)))  # [G, S] each
    for column, (of_seed, group) in enumerate(zip(scores, groups, strict=True)):
        np.add.at(sums[:, column], group, of_seed[:, 1] - of_seed[:, 0])
        np.add.at(counts[:, column], group, 1)
    draws = resampled_over_seeds(resampled_means(sums, counts, resamples, seed), seed)  # [N, S] -> [N]
    low, high = percentile_interval(draws)
    above = float((draws > 0).mean() + 0.5 * (draws == 0).mean())
    before, after = np.mean([of_seed.mean(axis=0) for of_seed in scores], axis=0).tolist()
    rows = sum(map(len, scores))
    all_rows = all(len(of_seed) == len(a) == len(b) for of_seed, (a, b) in zip(scores, pairs, strict=True))
    return PairedDifference(before, after, after - before, low, high, above, rows, len(names), all_rows)


def _matched(first: Sequence[Sample], second: Sequence[Sample], metric: str) -> list[tuple[Sample, Sample]]:
    others = {sample.id: sample for sample in second}
    matched = [(a, others[a.id]) for a in first if a.id in others and others[a.id].target == a.target]
    if not matched:
        raise ValueError("no row has the same id and target in both runs")
    for sample in (sample for pair in matched for sample in pair):
        if metric not in sample.scores:
            raise ValueError(f"row {sample.id!r} has no score {metric!r} of its own")
    return matched


def compare(
    first: Sequence[ModelRuns],
    second: Sequence[ModelRuns],
    metric: str | None = None,
    box_frame: BoxFrame | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Block:
    """One line for each benchmark that all have runs of; with several seeds also a line for each seed.

    `first` and `second` hold a model for each seed of training, in the same order. Without a metric it is the headline
    of each benchmark.
    """
    if len(first) != len(second):
        raise RunFileError(f"found {len(first)} and {len(second)} seeds, expected as many of both, in the same order")
    models = [*first, *second]
    runs = [{run.result.benchmark: run for run in model.runs} for model in models]
    shared = [name for name in runs[0] if all(name in of_model for of_model in runs)]
    if not shared:
        held = " and ".join(", ".join(of_model) for of_model in runs)
        raise RunFileError(f"{' and '.join(model.name for model in models)} share no benchmark; found {held}")
    known = sorted({metric for name in shared for of_model in runs for metric in of_model[name].result.scores})
    if metric is not None and metric not in known:
        near = difflib.get_close_matches(metric, known, n=3, cutoff=0.5) or known
        raise RunFileError(f"--metric: found {metric!r}, expected a score of the runs, such as {', '.join(near)}")
    rows, notes, changes = [], [], []
    for name in shared:
        pairs = [(a[name], b[name]) for a, b in zip(runs[: len(first)], runs[len(first) :], strict=True)]
        of_benchmark, said = _compare_runs(name, pairs, metric, box_frame, resamples, seed)
        notes += said
        rows += [row for row, _ in of_benchmark]
        changes += [found for _, found in of_benchmark[:1]]
    if alone := [name for name in dict.fromkeys(name for of in runs for name in of) if name not in shared]:
        notes.append(f"Not all of them have a run of {', '.join(alone)}.")
    for pair in zip(first, second, strict=True):
        notes += training_notes(pair)
    if len(changes) > 1 and all(found.first for found in changes):
        before, after = ([getattr(found, side) for found in changes] for side in ("first", "second"))
        gains = [f"{100 * relative_gain(before, after, how):+.1f}% ({how})" for how in GAINS]
        notes.append(f"Relative gain over {len(changes)} benchmarks, in their own units: {', '.join(gains)}.")
    seeds = (
        "these weights on other images, not another seed of training"
        if len(first) == 1
        else f"other images and other seeds of training, as far as {len(first)} seeds tell: both are drawn; those of "
        "single seeds hold other images alone"
    )
    notes.append(
        f"Difference: {second[0].name} less {first[0].name}; the interval holds the middle 95% of {resamples:,} paired "
        f"resamples (seed {seed}), in which rows of one image stay together where the run says so: {seeds}. The last "
        "column is the share of them in which the second is ahead, ties counted half. Rows match by id and target."
    )
    heads = ("Score", "Rows", first[0].name, second[0].name, "Difference", "Relative", "95% interval", "Ahead")
    return Block(
        f"{second[0].name} against {first[0].name}", "Benchmark", tuple(("", head) for head in heads), tuple(rows),
        tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def _compare_runs(
    name: str,
    pairs: Sequence[tuple[Run, Run]],
    metric: str | None,
    box_frame: BoxFrame | None,
    resamples: int,
    seed: int,
) -> tuple[list[tuple[Row, PairedDifference]], list[str]]:
    """Rows of a benchmark with the differences that they show, and notes; no row if it cannot be compared."""
    runs = [run for pair in pairs for run in pair]
    metrics = dict.fromkeys(metric_of(run.result, metric, box_frame) for run in runs)
    if len(metrics) > 1:
        return [], [f"{name}: not compared: {' and '.join(map(repr, metrics))} stand for different runs."]
    [chosen] = metrics
    if chosen is None or any(chosen not in run.result.scores for run in runs):
        return [], [f"{name}: not compared: there is no score {chosen!r} in all runs."]
    samples = {run.folder: read_samples(run.folder) for run in runs}
    for run in runs:
        own = [sample.scores[chosen] for sample in samples[run.folder] if chosen in sample.scores]
        score = run.result.scores[chosen]
        rounding = _ROUNDING * (100 if score.unit == "points" else 1)
        if not own or len(own) < len(samples[run.folder]) or abs(sum(own) / len(own) - score.value) > rounding:
            return [], [f"{name}: not compared: {chosen!r} is no mean over rows, so rows cannot be resampled."]
    of_seeds = [(samples[a.folder], samples[b.folder]) for a, b in pairs]
    several = len(pairs) > 1
    try:
        found = {name: paired_over_seeds(of_seeds, chosen, resamples, seed)}
        for number, pair in enumerate(of_seeds if several else (), start=1):
            found[f"{name}, seed {number}"] = paired_difference(*pair, chosen, resamples, seed)
    except ValueError as error:
        return [], [f"{name}: not compared: {error}."]
    factor = score_factor(runs[0], chosen, Column("", chosen, shown=shown_as(runs[0].result.scores[chosen].unit)))
    mark = LIMIT_MARK if any(run.result.settings.limit is not None for run in runs) else ""
    totals = [f"{sum(len(pair[side]) for pair in of_seeds):,}" for side in (0, 1)]
    rows = []
    for label, of_row in found.items():
        matched = f"{of_row.rows:,}" + ("" if of_row.all_rows or label != name else f" of {' and '.join(totals)}")
        numbers = [
            f"{of_row.first * factor:.2f}",
            f"{of_row.second * factor:.2f}",
            f"{of_row.value * factor:+.2f}",
            f"{100 * of_row.value / of_row.first:+.1f}%" if of_row.first else DASH,
            f"{of_row.low * factor:+.2f} to {of_row.high * factor:+.2f}",
            f"{100 * of_row.share_above_zero:.1f}%",
        ]
        rows.append((Row(label, (Cell(chosen), Cell(matched, mark=mark), *map(Cell, numbers))), of_row))
    notes = [f"{name}: {LIMIT_MARK} a run has --limit: a trial, no result."] if mark else []
    for one, other in pairs:
        notes += _differing(name, one, other, box_frame)
    return rows, notes


def _differing(name: str, first: Run, second: Run, box_frame: BoxFrame | None) -> list[str]:
    """Notes on differences between two runs other than the model."""
    notes = []
    if _data_of(first) != _data_of(second):
        notes.append(f"{name}: the data differ: {_data_of(first)} against {_data_of(second)}.")
    if first.result.settings.prompt != second.result.settings.prompt:
        notes.append(f"{name}: the prompts differ.")
    one, two = (conditions_of(Filled("", "", run.result, frame_of(run.result, box_frame))) for run in (first, second))
    if differing := [f"{one[kind]} against {two[kind]}" for kind in _DECIDING if one[kind] != two[kind]]:
        notes.append(f"{name}: the runs differ in more than the model: {'; '.join(differing)}.")
    return notes


def _data_of(run: Run) -> str:
    data = run.result.data
    return f"{data.source}@{data.revision or 'no revision'}, split {data.split}"
