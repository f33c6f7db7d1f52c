"""What a task's rows become in the files of a run."""

from __future__ import annotations

from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from eval.harness import Evaluated
from eval.outcome import image_of, scores_and_samples
from patch_aligned.results.box_frames import PADDED_FRAME


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ({"id": "7", "image": "coco/train2014/1.jpg"}, "coco/train2014/1.jpg"),
        ({"id": "7", "scene": "heldout_3", "question": "how many?"}, "heldout_3"),
        ({"image_source": "COCO_val2014_5", "image": object()}, "COCO_val2014_5"),
        ({"image_id": 0}, "0"),
        ({"image": {"bytes": b""}, "question": "why?"}, None),
        ({"image": ""}, None),
    ],
)
def test_the_image_that_a_row_is_about(document: dict[str, Any], name: str | None) -> None:
    assert image_of(document) == name


def test_expressions_of_one_image_are_a_group() -> None:
    rows = [
        {"doc_id": n, "doc": {"id": str(n), "image": image}, "arguments": ["q"], "resps": [["a"]], "target": [n],
         PADDED_FRAME: float(n)}
        for n, image in enumerate(("1.jpg", "1.jpg", "2.jpg"))
    ]  # fmt: skip
    evaluated = Evaluated(scores={PADDED_FRAME: 1.0}, rows=rows, aggregations={})
    samples = scores_and_samples(BENCHMARKS["refcoco_val"], evaluated)[2]
    assert [sample.group for sample in samples] == ["1.jpg", "1.jpg", "2.jpg"]
