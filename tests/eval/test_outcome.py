"""Scores get the standard error of a mean where they are one, in their own unit, and nothing is made up where not."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from eval.scores import (
    Evaluated,
    UnscoredError,
    find_submission,
    headline_of,
    image_of,
    row_ids,
    scores_and_samples,
    standard_error,
)
from patch_aligned.results.run import IMAGE_FRAME, PADDED_FRAME


def evaluated(scores: dict[str, Any], rows: list[dict[str, Any]], **aggregations: Any) -> Evaluated:
    """What lmms-eval would log of rows that say `rows`."""
    common = {"arguments": ["Question"], "resps": [["answer"]], "target": "right"}
    return Evaluated(scores, [{"doc_id": n, "doc": {}} | common | row for n, row in enumerate(rows)], aggregations)


def test_a_mean_of_rows_has_their_standard_error() -> None:
    shares = [1.0, 0.0, 0.6, 1.0]
    scores, missing, samples = scores_and_samples(
        BENCHMARKS["okvqa"], evaluated({"exact_match": 0.65, "submission": None}, [{"exact_match": s} for s in shares])
    )
    assert missing == {}
    assert scores.keys() == {"exact_match"}
    assert scores["exact_match"].stderr == pytest.approx(statistics.stdev(shares) / math.sqrt(4), rel=1e-12)
    assert [sample.scores["exact_match"] for sample in samples] == shares
    assert (samples[0].prompt, samples[0].answer, samples[0].target) == ("Question", "answer", "right")


def test_rows_of_one_image_are_no_independent_evidence() -> None:
    """Nine rows of three images: all pairs within an image count, by the sandwich formula written as a double sum."""
    shares = [1.0, 1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 1.0]
    images = ["a", "b", "a", "c", "b", "a", "c", "c", "b"]
    mean = sum(shares) / 9
    pairs = sum(
        (one - mean) * (other - mean)
        for one, image in zip(shares, images, strict=True)
        for other, its in zip(shares, images, strict=True)
        if image == its
    )
    rows = [{"exact_match": s, "doc": {"imageId": image}} for s, image in zip(shares, images, strict=True)]
    scores, _, _ = scores_and_samples(BENCHMARKS["gqa"], evaluated({"exact_match": mean}, rows))
    assert scores["exact_match"].stderr == pytest.approx(math.sqrt(3 / 2 * pairs) / 9, rel=1e-12)


def test_copies_of_rows_make_no_score_surer() -> None:
    alone = standard_error([1.0, 0.0, 0.6, 1.0], [None] * 4)
    assert alone == pytest.approx(statistics.stdev([1.0, 0.0, 0.6, 1.0]) / 2, rel=1e-12)
    assert standard_error([1.0, 0.0, 0.6, 1.0] * 10, list("abcd") * 10) == pytest.approx(alone, rel=1e-12)
    assert standard_error([1.0, 0.0], ["a", "a"]) is None


def test_rows_of_points_are_points() -> None:
    marks = [0.5, 1.0, 0.0]
    rows = [{"gpt_eval_score": {"score": mark, "eval_model": "judge"}} for mark in marks]
    scores, _, samples = scores_and_samples(BENCHMARKS["mmvet"], evaluated({"gpt_eval_score": 50.0}, rows))
    assert scores["gpt_eval_score"].stderr == pytest.approx(100 * 0.5 / math.sqrt(3), rel=1e-12)
    assert [sample.scores["gpt_eval_score"] for sample in samples] == [50.0, 100.0, 0.0]


def test_rows_that_the_scorer_alone_can_read_are_read_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    def accuracy(items: list[bool]) -> float:
        print("as shipped scorers do")
        return round(sum(items) / len(items), 3)

    rows = [{"mmmu_acc": {"right": right}} for right in (True, False, True)]
    scores, _, samples = scores_and_samples(
        BENCHMARKS["mmmu"],
        evaluated({"mmmu_acc": 0.667}, rows, mmmu_acc=lambda items: accuracy([item["right"] for item in items])),
    )
    assert scores["mmmu_acc"].value == 0.667
    assert scores["mmmu_acc"].stderr == pytest.approx(statistics.stdev([1, 0, 1]) / math.sqrt(3), rel=1e-12)
    assert [sample.scores["mmmu_acc"] for sample in samples] == [1, 0, 1]
    assert capsys.readouterr().out == ""


def test_a_sum_has_no_standard_error_and_no_number_is_no_score() -> None:
    rows: list[dict[str, Any]] = [{"mme_perception_score": {"score": 1.0}}] * 2
    numbers = {"mme_perception_score": 200.0, "mme_cognition_score": float("nan")}
    scores, missing, samples = scores_and_samples(BENCHMARKS["mme"], evaluated(numbers, rows))
    assert (scores["mme_perception_score"].stderr, scores["mme_perception_score"].unit) == (None, "sum")
    assert missing == {"mme_cognition_score": "no number: lmms-eval gave nan for 0 rows"}
    assert [sample.scores for sample in samples] == [{}, {}]
    _, missing, _ = scores_and_samples(BENCHMARKS["mme"], evaluated({"mme_cognition_score": 200.0}, [{}, {}]))
    assert missing == {"mme_perception_score": "no number: no row has one"}


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [("pope", "pope_f1_score", 0.5), ("mme", "mme_perception_score", 50.0)],  # F1 of one hit, one miss, one false alarm
)
def test_what_is_a_mean_by_chance_has_no_standard_error_and_no_rows(name: str, metric: str, value: float) -> None:
    rows: list[dict[str, Any]] = [{metric: {"score": score}} for score in (1.0, 0.0, 0.0, 1.0)]
    scores, _, samples = scores_and_samples(BENCHMARKS[name], evaluated({metric: value}, rows))
    assert scores[metric].stderr is None
    assert [sample.scores for sample in samples] == [{}] * 4


def test_a_right_answer_that_no_one_knows_is_kept_as_text() -> None:
    _, _, (sample,) = scores_and_samples(BENCHMARKS["vizwiz_test"], evaluated({}, [{"target": [float("nan"), None]}]))
    assert sample.target == ["NaN", None]


def test_rows_without_a_mark_of_the_judge_are_no_zeros() -> None:
    rows = [{"gpt_eval_score": {"score": 0.0, "eval_model": name}} for name in ("judge", "")]
    with pytest.raises(UnscoredError, match=r"mmvet: the judge did not score 1 of 2 rows.*next: the same command"):
        scores_and_samples(BENCHMARKS["mmvet"], evaluated({"gpt_eval_score": 0.0}, rows))


def test_ids_are_a_column_that_names_each_row() -> None:
    rows = [{"doc_id": 0, "doc": {"question_id": "a", "id": 7}}, {"doc_id": 1, "doc": {"question_id": "a", "id": 8}}]
    assert row_ids(rows) == ["7", "8"]
    assert row_ids([{"doc_id": 0, "doc": {}}, {"doc_id": 1, "doc": {}}]) == ["0", "1"]


def test_rows_of_one_image_are_kept_together_where_a_column_names_it() -> None:
    documents = [{"id": "7", "imageId": "n161313"}, {"id": "8", "imageId": "n161313"}, {"id": "9", "image": object()}]
    _, _, samples = scores_and_samples(BENCHMARKS["gqa"], evaluated({}, [{"doc": document} for document in documents]))
    assert [sample.group for sample in samples] == ["n161313", "n161313", None]
    names = [
        "COCO_train2014_000000581857_16.jpg",
        "COCO_train2014_000000581857_0.jpg",
        "COCO_train2014_000000000009.jpg",
    ]
    assert [image_of({"file_name": name, "image": object()}) for name in names] == [
        "COCO_train2014_000000581857.jpg", "COCO_train2014_000000581857.jpg", names[2],
    ]  # fmt: skip


def test_the_frame_decides_the_headline_of_boxes_alone() -> None:
    rec, gqa = BENCHMARKS["refcoco_val"], BENCHMARKS["gqa"]
    assert (headline_of(rec, "square"), headline_of(rec, "image")) == (PADDED_FRAME, IMAGE_FRAME)
    assert (headline_of(gqa, "square"), headline_of(gqa, "image")) == ("exact_match", "exact_match")


def test_the_submission_is_the_file_for_the_server(tmp_path: Path) -> None:
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "mmbench_en_dev_static_results.json").touch()
    (tmp_path / "submissions" / "mmbench_en_dev_results.xlsx").touch()
    assert find_submission(BENCHMARKS["mmbench_en"], tmp_path) == "submissions/mmbench_en_dev_results.xlsx"
    assert find_submission(BENCHMARKS["gqa"], tmp_path) is None
