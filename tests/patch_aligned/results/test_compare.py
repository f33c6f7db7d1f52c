"""The paired bootstrap against closed forms, and which rows and runs are compared at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patch_aligned.results.compare import compare, paired_difference, paired_over_seeds
from patch_aligned.results.paper import DASH
from patch_aligned.results.render import Block
from patch_aligned.results.run import RunFileError, RunResult, Sample, Score, rows_sha256, write_run
from patch_aligned.results.tables import find_models, make_table
from tests.patch_aligned.results.conftest import SETTINGS, result_of

Make = Callable[..., Path]


def compared(first: Path, second: Path, **options: Any) -> Block:
    one, other = find_models([first, second], ["A", "B"])
    return compare([one], [other], **options)


def samples(scores: list[float], groups: list[str | None] | None = None, first_id: int = 0) -> list[Sample]:
    of_groups = groups or [None] * len(scores)
    return [
        Sample(str(first_id + row), "q", "a", row, {"acc": score}, group)
        for row, (score, group) in enumerate(zip(scores, of_groups, strict=True))
    ]


def test_a_constant_difference_is_certain() -> None:
    found = paired_difference(samples([0.1, 0.5, 0.9]), samples([0.3, 0.7, 1.1]), "acc")
    assert [found.value, found.low, found.high] == pytest.approx([0.2] * 3, rel=1e-12)
    assert (found.share_above_zero, found.rows, found.all_rows) == (1.0, 3, True)


def test_equal_models_are_ahead_in_half_of_the_draws() -> None:
    same = samples([1.0, 0.0, 1.0])
    found = paired_difference(same, same, "acc")
    assert (found.value, found.low, found.high, found.share_above_zero) == (0, 0, 0, 0.5)


def test_two_rows_that_contradict_follow_the_binomial() -> None:
    """Differences +2 and -1: the mean is 2, 1/2 or -1 with probability 1/4, 1/2, 1/4, so it is above 0 in 3/4."""
    found = paired_difference(samples([0.0, 1.0]), samples([2.0, 0.0]), "acc", resamples=40_000)
    assert found.value == 0.5
    assert found.share_above_zero == pytest.approx(0.75, abs=0.01)  # 4.6 standard errors
    assert (found.low, found.high) == (-1.0, 2.0)


def test_the_interval_is_that_of_the_normal_law_over_many_rows() -> None:
    generator = np.random.default_rng(1)
    first, second = (generator.integers(0, 2, 2000).astype(float) for _ in range(2))
    found = paired_difference(samples(first.tolist()), samples(second.tolist()), "acc", resamples=20_000)
    half = 1.959964 * (second - first).std() / np.sqrt(2000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.03)
    assert (found.high + found.low) / 2 == pytest.approx(found.value, abs=0.03 * half)


def test_pairing_is_what_narrows_the_interval() -> None:
    """Hard and easy rows: each model varies a lot over rows, their difference hardly."""
    first = [float(row % 2) for row in range(100)]
    second = [value + 0.01 for value in first]
    found = paired_difference(samples(first), samples(second), "acc")
    assert found.high - found.low < 1e-12


def test_rows_of_a_group_are_drawn_together() -> None:
    """Ten copies of two rows in two groups carry no more evidence than two rows: above 0 in 3/4 again."""
    groups: list[str | None] = ["a"] * 10 + ["b"] * 10
    first, second = samples([0.0] * 10 + [1.0] * 10, groups), samples([2.0] * 10 + [0.0] * 10, groups)
    found = paired_difference(first, second, "acc", resamples=40_000)
    assert (found.rows, found.groups) == (20, 2)
    assert found.share_above_zero == pytest.approx(0.75, abs=0.01)
    alone = paired_difference(
        samples([s.scores["acc"] for s in first]), samples([s.scores["acc"] for s in second]), "acc"
    )
    assert alone.share_above_zero > 0.9


def test_only_rows_of_one_id_and_target_match() -> None:
    first, second = samples([1.0, 1.0, 1.0, 1.0]), samples([0.0, 0.0, 1.0], first_id=1)
    assert [sample.target for sample in second] == [0, 1, 2]
    with pytest.raises(ValueError, match="no row has the same id and target"):
        paired_difference(first, second, "acc")
    second = [replace(sample, target=int(sample.id)) for sample in second]
    found = paired_difference(first, second[::-1], "acc")  # the order does not matter
    assert (found.rows, found.all_rows, found.value) == (3, False, pytest.approx(-2 / 3))


def test_the_seed_decides_the_draws() -> None:
    first, second = samples([0.0, 1.0, 0.5, 0.2]), samples([1.0, 0.0, 0.7, 0.9])
    ends = [paired_difference(first, second, "acc", 200, seed) for seed in (0, 0, 1)]
    assert ends[0] == ends[1]
    assert ends[0].share_above_zero != ends[2].share_above_zero or ends[0].low != ends[2].low


def test_a_comparison_has_a_line_for_each_shared_benchmark(make_run: Make, tmp_path: Path) -> None:
    make_run("a/gqa", {"exact_match": [0, 0, 1, 0]}, benchmark="gqa", column="GQA", tables=(6,))
    make_run("b/gqa", {"exact_match": [1, 1, 1, 1]}, benchmark="gqa", column="GQA", tables=(6,))
    make_run("b/okvqa", {"exact_match": [1, 1]}, benchmark="okvqa", column="OKVQA", tables=(6,))
    block = compared(tmp_path / "a", tmp_path / "b")
    (row,) = block.rows
    shown = dict(zip([name for _, name in block.columns], map(str, row.cells), strict=True))
    assert row.label == "gqa"
    assert {name: shown[name] for name in ("Score", "Rows", "A", "B", "Difference")} == {
        "Score": "exact_match", "Rows": "4", "A": "25.00", "B": "100.00", "Difference": "+75.00",
    }  # fmt: skip
    assert "Not all of them have a run of okvqa." in block.notes
    make_run("c/pope", {"acc": [1]}, benchmark="pope")
    with pytest.raises(RunFileError, match="A and B share no benchmark; found gqa and pope"):
        compared(tmp_path / "a", tmp_path / "c")


def test_equal_seeds_leave_the_interval_of_one(make_run: Make, tmp_path: Path) -> None:
    """Three seeds of the same scores: nothing varies between seeds, and images are the same for all."""
    first, second = samples([0.0, 1.0, 0.5, 0.2]), samples([1.0, 0.0, 0.7, 0.9])
    alone, thrice = (paired_over_seeds([(first, second)] * seeds, "acc", 500) for seeds in (1, 3))
    assert [thrice.first, thrice.second, thrice.value] == pytest.approx([alone.first, alone.second, alone.value])
    assert (thrice.low, thrice.high, thrice.rows) == pytest.approx((alone.low, alone.high, 3 * alone.rows))


def test_seeds_that_contradict_follow_the_binomial() -> None:
    """Constant differences of 2 and -1: images say nothing, the mean of two seeds drawn is 2, 1/2 or -1."""
    zero, two, minus = (samples([value] * 3) for value in (0.0, 2.0, -1.0))
    found = paired_over_seeds([(zero, two), (zero, minus)], "acc", resamples=40_000)
    assert (found.value, found.low, found.high) == (0.5, -1.0, 2.0)
    assert found.share_above_zero == pytest.approx(0.75, abs=0.01)


def test_seeds_are_shown_singly_below_their_mean(make_run: Make, tmp_path: Path) -> None:
    for name, hits in {"a0": [0, 0], "a1": [0, 1], "b0": [1, 0], "b1": [1, 1]}.items():
        make_run(f"{name}/gqa", {"exact_match": hits}, benchmark="gqa")
    a0, a1, b0, b1 = find_models([tmp_path / name for name in ("a0", "a1", "b0", "b1")], ["A", "A1", "B", "B1"])
    block = compare([a0, a1], [b0, b1])
    shown = {row.label: [str(cell) for cell in row.cells[1:6]] for row in block.rows}
    assert shown == {
        "gqa": ["4", "25.00", "75.00", "+50.00", "+200.0%"],
        "gqa, seed 1": ["2", "0.00", "50.00", "+50.00", DASH],
        "gqa, seed 2": ["2", "50.00", "100.00", "+50.00", "+100.0%"],
    }
    assert "other seeds of training, as far as 2 seeds tell" in block.notes[-1]
    assert "not another seed of training" in compare([a0], [b0]).notes[-1]
    with pytest.raises(RunFileError, match="found 2 and 1 seeds"):
        compare([a0, a1], [b0])


def test_the_gain_over_several_benchmarks_is_given_both_ways(make_run: Make, tmp_path: Path) -> None:
    for name, shares in {"a": (0.5, 0.25), "b": (0.75, 0.5)}.items():
        for benchmark, share in zip(("gqa", "okvqa"), shares, strict=True):
            hits = [float(row < 4 * share) for row in range(4)]
            make_run(f"{name}/{benchmark}", {"exact_match": hits}, benchmark=benchmark)
    block = compared(tmp_path / "a", tmp_path / "b")
    assert any("+66.7% (ratio of means), +75.0% (mean of ratios)" in note for note in block.notes)


def test_benchmarks_on_which_the_first_model_has_nothing_have_no_relative_gain(make_run: Make, tmp_path: Path) -> None:
    for name, hits in {"a": [0, 0], "b": [0, 1]}.items():
        for benchmark in ("gqa", "okvqa"):
            make_run(f"{name}/{benchmark}", {"exact_match": hits}, benchmark=benchmark)
    block = compared(tmp_path / "a", tmp_path / "b")
    assert [str(row.cells[5]) for row in block.rows] == [DASH, DASH]
    assert not any("Relative gain" in note for note in block.notes)


def test_how_many_rows_matched_is_said(make_run: Make, tmp_path: Path) -> None:
    make_run("a/gqa", {"exact_match": [0, 0, 1, 0]}, benchmark="gqa")
    limited = replace(SETTINGS, limit=2, prompt="another", conversation="plain", batch_size=1)
    make_run("b/gqa", {"exact_match": [1, 1]}, benchmark="gqa", settings=limited)
    block = compared(tmp_path / "a", tmp_path / "b")
    assert [str(cell) for cell in block.rows[0].cells[1:4]] == ["2 of 4 and 2 †", "0.00", "100.00"]
    assert "gqa: the prompts differ." in block.notes
    assert any(note.startswith("gqa: † a run has --limit") for note in block.notes)
    assert (
        "gqa: the runs differ in more than the model: template vicuna_v1 against template plain; "
        "float16, batch size 8 against float16, batch size 1." in block.notes
    )


def test_other_steps_and_other_data_are_said(make_run: Make, tmp_path: Path) -> None:
    result: RunResult = result_of([], {})
    for name, steps, revision in (("a", 10, "1111"), ("b", 20, "2222")):
        data = replace(result.data, revision=revision, rows=1, rows_sha256=rows_sha256([("0", [0.1, 0])]))
        folder = make_run(f"{name}/gqa", {"exact_match": [1]}, benchmark="gqa", column="GQA", tables=(6,), data=data)
        (folder / "run.json").write_text(json.dumps({"trained": {"steps": steps, "seed": 42, "data": revision}}))
    models = find_models([tmp_path / "a", tmp_path / "b"], ["A", "B"])
    notes = compare(models[:1], models[1:]).notes
    (table,) = make_table(6, models)
    for told in (notes, table.notes):
        assert "The models' trainings differ in steps: 10 (A), 20 (B)." in told
        assert "The models' trainings differ in data: 1111 (A), 2222 (B)." in told
        assert not any("seed" in note and "differ" in note for note in told)
    assert any("1111" in note and "2222" in note for note in notes)
    alike = compared(tmp_path / "a", tmp_path / "a").notes
    assert not any("steps" in note or "data differ" in note for note in alike)


def test_a_mistyped_metric_ends_with_the_near_ones(make_run: Make, tmp_path: Path) -> None:
    for name in "ab":
        make_run(f"{name}/gqa", {"exact_match": [0, 1]}, benchmark="gqa")
    with pytest.raises(RunFileError, match=r"--metric: found 'exact-match', expected a score of the runs.*exact_match"):
        compared(tmp_path / "a", tmp_path / "b", metric="exact-match")


def test_runs_without_rows_are_not_compared(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name / "gqa", result_of([], {"acc": Score(0.0, None, 0, "share")}, benchmark="gqa"), [])
    block = compared(tmp_path / "a", tmp_path / "b")
    assert not block.rows
    assert block.notes[0].startswith("gqa: not compared")


def test_a_score_that_is_no_mean_over_rows_is_not_resampled(make_run: Make, tmp_path: Path) -> None:
    for name in "ab":
        folder = make_run(f"{name}/captions", {"METEOR": [0.2, 0.4]}, benchmark="captions")
        document = json.loads((folder / "result.json").read_text())
        document["scores"]["METEOR"]["value"] = 0.35
        (folder / "result.json").write_text(json.dumps(document))
    block = compared(tmp_path / "a", tmp_path / "b")
    assert not block.rows
    assert block.notes[0] == "captions: not compared: 'METEOR' is no mean over rows, so rows cannot be resampled."


def test_a_mean_that_the_scorer_rounded_is_a_mean_over_rows(make_run: Make, tmp_path: Path) -> None:
    for name in "ab":
        folder = make_run(f"{name}/mmmu", {"mmmu_acc": [1, 0, 0]}, benchmark="mmmu")
        text = (folder / "result.json").read_text()
        (folder / "result.json").write_text(text.replace("0.3333333333333333", "0.333"))
    block = compared(tmp_path / "a", tmp_path / "b")
    assert [row.label for row in block.rows] == ["mmmu"]
