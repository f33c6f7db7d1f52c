"""Another choice between recorded candidates: regions leave or are renamed, and none comes without a mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from patch_aligned.annotate.folder import RunFolder
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.options import Selection, Workload
from patch_aligned.annotate.pipeline import ImageInWork, StageClock, annotate_images
from patch_aligned.annotate.regions import Candidate, Mask, Tag, select
from patch_aligned.annotate.reselect import reselect, reselected
from patch_aligned.cli import app
from patch_aligned.pad import AnnotationError, read_annotations

SIZE_WH = (100, 80)
SETTINGS = {"detector": {"candidate_thresholds": {"box": 0.15, "text": 0.15}}}


def candidate(score: float, left: float = 0, tag: str = "tennis racket", width: float = 20) -> Candidate:
    first, *rest = tag.split()
    tokens = ((first, 0.22), *((word, score) for word in rest)) if rest else ((first, score),)
    return Candidate((left, 10, left + width, 40), score, tag, (0.22 + score) / 2, tokens)


def mask_of(one: Candidate) -> dict[str, Any]:
    x1, y1, x2, y2 = (int(number) for number in one.bbox_xyxy_px)
    pixels = np.zeros(SIZE_WH[::-1], dtype=np.uint8, order="F")
    pixels[y1:y2, x1:x2] = 1
    return {"rle_mask": coco_mask.encode(pixels)["counts"].decode(), "area_px": int(pixels.sum())}


def record(
    image_id: str, candidates: list[Candidate], *, empty: tuple[int, ...] = (), segment_candidates: bool = False
) -> dict[str, Any]:
    """What `annotate` writes of an image with these candidates; masks at the positions `empty` have no pixel."""
    chosen = select(candidates, Selection(), SIZE_WH)
    labels = [
        candidates[position].to_label(position, Selection(), mask_of(candidates[position]))
        for position in chosen
        if position not in empty
    ]
    return {
        "image_id": image_id,
        "size": list(SIZE_WH),
        "caption": "a court",
        "labels": labels,
        "status": "ok" if labels else "no_masks" if chosen else "no_boxes",
        "reason": None,
        "tags": [],
        "candidates": [one.to_record() | (mask_of(one) if segment_candidates else {}) for one in candidates],
    } | ({"empty_masks": list(empty)} if empty else {})


RECORDS = [
    record("a.jpg", [candidate(0.9), candidate(0.5, 2), candidate(0.4, 50, "dog"), candidate(0.2, 80, "cat")]),
    record("b.jpg", [candidate(0.3, 0, "cat"), candidate(0.28, 50, "dog")], empty=(1,)),
    record("c.jpg", [candidate(0.2, 0, "cat")]),
    {"image_id": "d.jpg", "size": None, "caption": "", "labels": [], "status": "unreadable", "reason": "cut off",
     "tags": [], "candidates": []},
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", RECORDS)


def write_run(path: Path, records: list[dict[str, Any]], selection: Selection = Selection()) -> Path:  # noqa: B008
    settings = SETTINGS | {"selection": asdict(selection)}
    folder = RunFolder.start(path, [ManifestEntry(one["image_id"]) for one in records], settings, shard_size=2)
    for shard in range(folder.num_shards):
        folder.write_shard(shard, records[2 * shard : 2 * shard + 2])
    return path


def labels_of(path: Path) -> dict[str, list[tuple[str, float]]]:
    return {
        image.image_id: [(region.tag, region.extra["score"]) for region in image.regions]
        for image in read_annotations(path)
    }


def test_the_runs_own_selection_gives_the_runs_own_records() -> None:
    for one in RECORDS:
        assert reselected(one, Selection()) == (one, [])


def test_higher_thresholds_leave_regions_out_and_settings_say_how_labels_were_chosen(run: Path, tmp_path: Path) -> None:
    pad = tmp_path / "pad.jsonl.gz"
    before, after = reselect(run, pad, {"box_threshold": 0.35, "label_mode": "best_tag"})
    assert labels_of(pad) == {"a.jpg": [("tennis racket", 0.9), ("dog", 0.4)]}
    assert (before.images, before.regions, before.tags) == (2, 3, {"tennis racket", "dog", "cat"})
    assert (after.images, after.regions, after.tags) == (1, 2, {"tennis racket", "dog"})
    lines = (tmp_path / "pad.jsonl.gz.skipped.jsonl").read_text(encoding="utf-8").splitlines()
    status = {entry["image_id"]: entry["status"] for entry in map(json.loads, lines)}
    assert status == {"b.jpg": "no_boxes", "c.jpg": "no_boxes", "d.jpg": "unreadable"}
    settings = json.loads((tmp_path / "pad.jsonl.gz.settings.json").read_text(encoding="utf-8"))
    assert settings["selection"] == asdict(Selection(box_threshold=0.35, label_mode="best_tag"))
    assert settings["detector"] == SETTINGS["detector"]


def test_regions_keep_their_masks_and_are_renamed(run: Path, tmp_path: Path) -> None:
    reselect(run, tmp_path / "pad.json", {"text_threshold": 0.3})
    (first, second), (third,) = (image.regions for image in read_annotations(tmp_path / "pad.json"))
    assert (first.tag, first.extra["phrase"], first.extra["best_tag"]) == ("racket", "racket", "tennis racket")
    assert (second.tag, third.tag, third.extra["phrase"]) == ("dog", "cat", "")
    assert first.rle_mask == mask_of(candidate(0.9))["rle_mask"]
    assert first.extra["area_px"] == 20 * 30


def test_what_is_not_changed_stays_as_in_the_run(tmp_path: Path) -> None:
    own = Selection(box_threshold=0.45, label_mode="best_tag", min_box_area_px=1)
    run = write_run(tmp_path / "run", [RECORDS[0] | {"labels": RECORDS[0]["labels"][:1]}], own)
    reselect(run, tmp_path / "pad.jsonl", {"nms_iou": 0.4})
    assert labels_of(tmp_path / "pad.jsonl") == {"a.jpg": [("tennis racket", 0.9)]}
    settings = json.loads((tmp_path / "pad.jsonl.settings.json").read_text(encoding="utf-8"))
    assert settings["selection"] == asdict(own) | {"nms_iou": 0.4}


def test_a_merged_file_with_candidates_can_be_reselected(run: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.parquet", tmp_path / "second.jsonl"
    reselect(run, first, {}, keep_candidates=True)
    with pytest.raises(ValueError, match=r"first\.parquet"):
        reselect(first, first, {"box_threshold": 0.35})
    reselect(first, second, {"box_threshold": 0.35})
    assert labels_of(second) == {"a.jpg": [("tennis racket", 0.9), ("dog", 0.4)], "b.jpg": []}
    with pytest.raises(ValueError, match=r"second.jsonl: image_id 'a.jpg', field 'candidates': found none"):
        reselect(second, tmp_path / "third.jsonl", {"box_threshold": 0.35})


def test_what_left_can_come_back() -> None:
    stricter, _ = reselected(RECORDS[0], Selection(box_threshold=0.45))
    assert len(stricter["labels"]) == 1
    again, without_mask = reselected(stricter, Selection())
    assert (again["labels"], without_mask) == (RECORDS[0]["labels"], [])


def test_boxes_without_a_mask_are_refused_and_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        reselect(run, tmp_path / "pad.jsonl", {"box_threshold": 0.18, "text_threshold": 0.15})
    message = str(caught.value)
    assert "2 boxes of 2 images would become regions but have no mask" in message
    assert "--segment_candidates" in message
    assert "a.jpg: 'cat' at [80, 10, 100, 40], score 0.200" in message
    assert list(tmp_path.iterdir()) == [run]


def test_a_lower_nms_iou_may_bring_a_box_back() -> None:
    chain = [candidate(0.9, 0, width=30), candidate(0.8, 12, width=30), candidate(0.7, 20, width=30)]
    one = record("a.jpg", chain)
    assert [label["candidate"] for label in one["labels"]] == [0, 1]
    new, without_mask = reselected(one, Selection(nms_iou=0.4))
    assert [label["candidate"] for label in new["labels"]] == [0]
    assert len(without_mask) == 1 and "score 0.700" in without_mask[0]


def test_with_masks_for_all_candidates_any_choice_will_do() -> None:
    one = record("a.jpg", [candidate(0.9), candidate(0.5, 2), candidate(0.2, 50, "dog")], segment_candidates=True)
    new, without_mask = reselected(one, Selection(box_threshold=0.15, nms_iou=1.0))
    assert without_mask == []
    assert [label["candidate"] for label in new["labels"]] == [0, 1, 2]
    assert [label["rle_mask"] for label in new["labels"]] == [entry["rle_mask"] for entry in one["candidates"]]


def test_a_candidate_with_an_empty_mask_becomes_no_region() -> None:
    one = record("a.jpg", [candidate(0.9)], segment_candidates=True)
    one["candidates"][0] |= {"area_px": 0}
    new, without_mask = reselected(one | {"labels": [], "status": "no_masks"}, Selection(text_threshold=0.3))
    assert (new["labels"], new["status"], without_mask) == ([], "no_masks", [])


class NoModels:
    """Stages whose boxes are known and whose masks fill them."""

    def __init__(self, candidates: list[Candidate], *, segment_candidates: bool) -> None:
        self.settings: dict[str, Any] = {}
        self.selection = Selection()
        self.candidates = candidates
        self.segment_candidates = segment_candidates
        self.segmented = 0

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        return [[Tag("dog", 0.9)] for _ in items]

    def bucket(self, item: ImageInWork) -> None:
        return None

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        return [self.candidates for _ in items]

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        chosen = [[mask_of(item.candidates[position]) for position in item.to_segment] for item in items]
        self.segmented += sum(map(len, chosen))
        return [
            [Mask(rle_mask=mask["rle_mask"], area_px=mask["area_px"], predicted_iou=0.5) for mask in masks]
            for masks in chosen
        ]


@pytest.mark.parametrize("segment_candidates", [False, True])
def test_what_annotate_writes_is_reselected(tmp_path: Path, segment_candidates: bool) -> None:
    Image.new("RGB", SIZE_WH).save(tmp_path / "a.png")
    empty = candidate(0.7, 50, "sky", width=0.5)
    candidates = [candidate(0.9), empty, candidate(0.5, 2), candidate(0.2, 70, "dog")]
    stages = NoModels(candidates, segment_candidates=segment_candidates)
    (written,) = annotate_images([ManifestEntry("a.png")], stages, tmp_path, Workload(), StageClock())
    assert stages.segmented == (4 if segment_candidates else 2)
    assert [label["candidate"] for label in written["labels"]] == [0]
    assert reselected(written, Selection()) == (written, [])
    lower, without_mask = reselected(written, Selection(box_threshold=0.15))
    assert [label["candidate"] for label in lower["labels"]] == ([0, 3] if segment_candidates else [0])
    assert len(without_mask) == (0 if segment_candidates else 1)


def test_an_image_without_regions_may_get_some_if_all_candidates_have_masks(tmp_path: Path) -> None:
    Image.new("RGB", SIZE_WH).save(tmp_path / "a.png")
    stages = NoModels([candidate(0.2)], segment_candidates=True)
    (written,) = annotate_images([ManifestEntry("a.png")], stages, tmp_path, Workload(), StageClock())
    assert (written["status"], written["labels"]) == ("no_boxes", [])
    lower, without_mask = reselected(written, Selection(box_threshold=0.15))
    assert (lower["status"], len(lower["labels"]), without_mask) == ("ok", 1, [])


@given(
    scores=st.lists(st.floats(0.15, 1), min_size=1, max_size=12),
    lefts=st.lists(st.integers(0, 79), min_size=12, max_size=12),
    threshold=st.floats(0.25, 1),
    text_threshold=st.floats(0.15, 1),
    label_mode=st.sampled_from(["phrase", "best_tag"]),
)
def test_higher_thresholds_never_need_a_new_mask(
    scores: list[float], lefts: list[int], threshold: float, text_threshold: float, label_mode: Any
) -> None:
    one = record("a.jpg", [candidate(score, left) for score, left in zip(scores, lefts, strict=False)])
    new, without_mask = reselected(one, Selection(threshold, text_threshold, label_mode=label_mode))
    assert without_mask == []
    chosen = {label["candidate"] for label in one["labels"]}
    expected = {label["candidate"] for label in one["labels"] if label["score"] > threshold}
    assert {label["candidate"] for label in new["labels"]} == expected <= chosen


def test_thresholds_below_the_candidates_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"box_threshold: found 0\.1, expected 0\.15 or more"):
        reselect(run, tmp_path / "pad.jsonl", {"box_threshold": 0.1})


def test_broken_candidates_are_named_with_their_image() -> None:
    one = record("a.jpg", [candidate(0.9)])
    one["candidates"][0]["score"] = None
    with pytest.raises(ValueError, match=r"pad.jsonl: image_id 'a.jpg', candidates\[0\]: field 'score': found None"):
        reselected(one, Selection(), "pad.jsonl")


@pytest.mark.parametrize("place", [None, 7, True, [0]])
def test_labels_that_name_no_candidate_are_named(place: Any) -> None:
    one = record("a.jpg", [candidate(0.9)])
    one["labels"][0]["candidate"] = place
    with pytest.raises(ValueError, match=r"pad.jsonl: image_id 'a.jpg', field 'labels\[0\].candidate': found"):
        reselected(one, Selection(), "pad.jsonl")


def test_records_of_a_pad_file_that_break_the_format_are_named(run: Path, tmp_path: Path) -> None:
    pad = tmp_path / "pad.jsonl"
    reselect(run, pad, {}, keep_candidates=True)
    records = [json.loads(line) for line in pad.read_text(encoding="utf-8").splitlines()]
    del records[1]["labels"][0]["rle_mask"]
    pad.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    with pytest.raises(AnnotationError, match=r"pad.jsonl: record 1 .*'rle_mask'"):
        reselect(pad, tmp_path / "new.jsonl", {})


def test_sources_without_a_detectors_settings_are_refused(tmp_path: Path) -> None:
    pad = tmp_path / "pad.jsonl"
    pad.write_text(json.dumps(RECORDS[0]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pad.jsonl.settings.json: found no such file"):
        reselect(pad, tmp_path / "new.jsonl", {})
    (tmp_path / "pad.jsonl.settings.json").write_text('{"stages": "oracle"}', encoding="utf-8")
    with pytest.raises(ValueError, match="found no detector in its settings"):
        reselect(pad, tmp_path / "new.jsonl", {})

    with pytest.raises(ValueError, match=r"nowhere: found no such file or folder"):
        reselect(tmp_path / "nowhere", tmp_path / "new.jsonl", {})


def test_options_are_taken_with_underscores_too(run: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "dashes.jsonl", tmp_path / "underscores.jsonl"]
    for mark, output in zip("-_", outputs, strict=True):
        options = [f"--box{mark}threshold", "0.35", f"--label{mark}mode", "best_tag", f"--keep{mark}candidates"]
        result = CliRunner().invoke(app, ["reselect", str(run), "--output", str(output), *options])
        assert result.exit_code == 0, result.output
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert "candidates" in json.loads(outputs[0].read_text(encoding="utf-8").splitlines()[0])


def test_the_command_shows_what_changed(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "pad.jsonl"
    arguments = ["reselect", str(run), "--output", str(output), "--box-threshold", "0.35", "--label-mode", "best_tag"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    words = [line.split() for line in result.output.splitlines()]
    assert words[:3] == [["images", "with", "regions", "2", "->", "1"], ["regions", "3", "->", "2"],
                         ["different", "tags", "3", "->", "2"]]  # fmt: skip
    assert labels_of(output) == {"a.jpg": [("tennis racket", 0.9), ("dog", 0.4)]}
    refused = CliRunner().invoke(app, ["reselect", str(run), "--box-threshold", "0.18", "--output", str(output)])
    assert refused.exit_code == 2
    assert "have no mask" in refused.output
