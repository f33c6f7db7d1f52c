"""A shard from images to file: stages in batches, one record an image, the same bytes whatever happened on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from patch_aligned.annotate import pipeline as annotate_images_module
from patch_aligned.annotate.folder import RunFolder
from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.options import ModelOptions, Selection, Workload
from patch_aligned.annotate.pipeline import ImageInWork, StageClock, Stages, annotate_images
from patch_aligned.annotate.regions import NonFiniteScoresError
from patch_aligned.annotate.run import process_shard
from patch_aligned.annotate.stages import build_stages
from patch_aligned.images import decode_image
from patch_aligned.pad import parse_annotation, read_annotations, write_annotations
from playground.mini.replay import ReplayStages

Record = dict[str, Any]


@pytest.fixture(scope="module")
def stages(build: Callable[[str], Stages]) -> Stages:
    return build("cpu")


@pytest.fixture
def annotate(stages: Stages, scenes: Path) -> Callable[..., list[Record]]:
    """Annotates the scenes; keywords replace values of the workload."""

    def run(some_stages: Stages = stages, **changes: Any) -> list[Record]:
        entries, folder = list_images(scenes / "train.json", scenes)
        return annotate_images(entries, some_stages, folder, replace(Workload(), **changes), StageClock())

    return run


class Watched:
    """Stages that note the ids of each batch."""

    segment_candidates = False

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self.settings = stages.settings
        self.selection = stages.selection
        self.bucket = stages.bucket
        self.batches: dict[str, list[list[str]]] = {"tag": [], "detect": [], "segment": []}

    def _call(self, stage: str, items: Sequence[ImageInWork]) -> Any:
        self.batches[stage].append([item.image_id for item in items])
        return getattr(self._stages, stage)(items)

    def tag(self, items: Sequence[ImageInWork]) -> Any:
        return self._call("tag", items)

    def detect(self, items: Sequence[ImageInWork]) -> Any:
        return self._call("detect", items)

    def segment(self, items: Sequence[ImageInWork]) -> Any:
        return self._call("segment", items)


def by_status(records: list[Record]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(record["status"], []).append(record["image_id"])
    return found


def test_each_stage_takes_only_the_images_that_need_it(annotate: Callable[..., list[Record]], stages: Stages) -> None:
    watched = Watched(stages)
    records = annotate(watched, tag_batch=7, detect_batch=3, segment_batch=2)
    statuses = by_status(records)
    assert set(statuses) == {"ok", "no_tags", "no_boxes"}  # or the comparisons would show little
    seen = {stage: [name for batch in batches for name in batch] for stage, batches in watched.batches.items()}
    assert [len(batch) for batch in watched.batches["tag"]] == [7, 7, 6]
    assert sorted(seen["detect"]) == sorted(statuses["ok"] + statuses["no_boxes"])
    assert sorted(seen["segment"]) == sorted(statuses["ok"])
    assert max(len(batch) for batch in watched.batches["segment"]) == 2
    sizes = {record["image_id"]: tuple(record["size"]) for record in records}
    assert len({sizes[name] for name in seen["detect"]}) == 2
    for batch in watched.batches["detect"]:
        assert len({sizes[name] for name in batch}) == 1
        assert len(batch) <= 3


def test_images_are_decoded_once(annotate: Callable[..., list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []
    monkeypatch.setattr(
        annotate_images_module, "decode_image", lambda path: (decoded.append(path), decode_image(path))[1]
    )
    records = annotate()
    assert len(decoded) == len(set(decoded)) == len(records)


def test_records_are_pad_records_with_what_led_to_them(annotate: Callable[..., list[Record]], stages: Stages) -> None:
    for record in annotate():
        image = parse_annotation(record)
        assert record["caption"]
        if record["status"] == "no_tags":
            assert record["tags"] == record["candidates"] == record["labels"] == []
            continue
        assert all(0 < tag["score"] < 1 and tag["name"] for tag in record["tags"])
        assert len(record["candidates"]) > len(record["labels"])
        for region in image.regions:
            candidate = record["candidates"][region.extra["candidate"]]
            assert list(region.bbox_xyxy_px) == candidate["bbox"]
            assert region.extra["score"] == candidate["score"] > 0.99
            assert region.extra["area_px"] > 0


def assert_alike(one: Record, other: Record) -> None:
    """Two records of an image are equal but for the rounding of other batches."""
    assert (one["image_id"], one["status"], one["size"]) == (other["image_id"], other["status"], other["size"])
    assert [tag["name"] for tag in one["tags"]] == [tag["name"] for tag in other["tags"]]
    size_hw = one["size"][::-1]
    for label, twin in zip(one["labels"], other["labels"], strict=True):
        assert label["tag"] == twin["tag"]
        assert label["bbox"] == pytest.approx(twin["bbox"], abs=2e-3)
        assert label["score"] == pytest.approx(twin["score"], abs=2e-6)
        # A random mask has pixels whose logit is 0 but for rounding.
        masks = [{"size": size_hw, "counts": of["rle_mask"].encode()} for of in (label, twin)]
        assert coco_mask.iou(masks[:1], masks[1:], [0])[0, 0] > 0.99


def test_batches_give_what_single_images_give(annotate: Callable[..., list[Record]]) -> None:
    for together, alone in zip(annotate(), annotate(tag_batch=1, detect_batch=1, segment_batch=1), strict=True):
        assert_alike(together, alone)


@pytest.mark.parametrize("changes", [{"chunks_at_once": 1}, {"chunks_at_once": 3}, {"decode_workers": 1}])
def test_a_shards_bytes_do_not_depend_on_threads(
    stages: Stages, scenes: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    entries, images = list_images(scenes / "train.json", scenes)
    contents = []
    for name, workload in {"a": Workload(chunk=6), "b": replace(Workload(chunk=6), **changes)}.items():
        folder = RunFolder.start(tmp_path / name, entries, stages.settings, shard_size=20)
        header = process_shard(folder, 0, stages, images, workload)
        assert header.count == 20
        contents.append(folder.shard_path(0).read_bytes())
    assert contents[0] == contents[1]


def test_memory_that_runs_out_for_one_image_costs_that_image_alone(
    stages: Stages, scenes: Path, tmp_path: Path, annotate: Callable[..., list[Record]]
) -> None:
    expected = {record["image_id"]: record for record in annotate()}
    statuses = by_status(list(expected.values()))
    too_large, sometimes = statuses["ok"][0], statuses["ok"][1]
    attempts = {too_large: 0, sometimes: 0}

    class OutOfMemory(Watched):
        def detect(self, items: Sequence[ImageInWork]) -> Any:
            names = [item.image_id for item in items]
            for name in attempts.keys() & set(names):
                attempts[name] += len(names) == 1
                if name == too_large or attempts[name] < 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return super().detect(items)

    entries, images = list_images(scenes / "train.json", scenes)
    folder = RunFolder.start(tmp_path, entries, stages.settings, shard_size=20)
    header = process_shard(folder, 0, OutOfMemory(stages), images, Workload())
    assert header.counts["out_of_memory"] == 1
    assert attempts == {too_large: 2, sometimes: 2}  # once within the shard, once with the device for itself
    for record in folder.read_shard(0)[1]:
        if record["image_id"] == too_large:
            assert (record["status"], record["labels"], record["candidates"]) == ("out_of_memory", [], [])
            assert record["reason"] == "detect: does not fit in memory, even alone"
            found, tags = record["tags"], expected[too_large]["tags"]
            assert [tag["name"] for tag in found] == [tag["name"] for tag in tags]
            assert [tag["score"] for tag in found] == pytest.approx([tag["score"] for tag in tags], abs=2e-6)
        else:
            assert record["status"] == expected[record["image_id"]]["status"]


def test_a_picture_too_large_to_be_decoded_costs_itself_alone(
    annotate: Callable[..., list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = annotate()
    too_large = expected[3]["image_id"]

    def decode(path: Path) -> Image.Image:
        if path.as_posix().endswith(too_large):
            raise MemoryError
        return decode_image(path)

    monkeypatch.setattr(annotate_images_module, "decode_image", decode)
    records = annotate()
    assert (records[3]["status"], records[3]["size"]) == ("out_of_memory", None)
    assert records[3]["reason"] == "does not fit in memory when decoded"
    assert [record["status"] for record in records[4:]] == [record["status"] for record in expected[4:]]


def test_scores_that_are_not_finite_cost_their_image_alone(
    stages: Stages, annotate: Callable[..., list[Record]]
) -> None:
    broken = by_status(annotate())["ok"][0]

    class NonFinite(Watched):
        def tag(self, items: Sequence[ImageInWork]) -> Any:
            if positions := [position for position, item in enumerate(items) if item.image_id == broken]:
                raise NonFiniteScoresError("RAM", positions)
            return super().tag(items)

    records = {record["image_id"]: record for record in annotate(NonFinite(stages))}
    assert records.pop(broken)["status"] == "non_finite"
    others = [record for record in annotate() if record["image_id"] != broken]
    assert records.keys() == {record["image_id"] for record in others}
    for record in others:
        assert_alike(records[record["image_id"]], record)


def test_empty_masks_are_no_regions(stages: Stages, annotate: Callable[..., list[Record]]) -> None:
    class Blind(Watched):
        def segment(self, items: Sequence[ImageInWork]) -> Any:
            return [[{**mask, "area_px": 0} for mask in masks] for masks in super().segment(items)]

    expected = by_status(annotate())
    records = annotate(Blind(stages))
    assert by_status(records)["no_masks"] == expected["ok"]
    for record in records:
        if record["status"] == "no_masks":
            assert record["labels"] == []
            assert len(record["empty_masks"]) >= 1


def test_candidates_keep_their_masks_where_that_is_asked_for(
    models: ModelOptions, annotate: Callable[..., list[Record]]
) -> None:
    usual = annotate()
    stages = build_stages(replace(models, segment_candidates=True), Selection(box_threshold=0.99), "cpu")
    for record, expected in zip(annotate(stages), usual, strict=True):
        assert record["status"] == expected["status"]
        # SAM gets all candidates here and the selected alone there: batches of other sizes round differently.
        for label, other in zip(record["labels"], expected["labels"], strict=True):
            close = {key: pytest.approx(other[key], rel=0.01) for key in ("predicted_iou", "area_px")}
            assert label == other | close | {"rle_mask": label["rle_mask"]}
        selected = {label["candidate"] for label in record["labels"]}
        with_mask = {position for position, one in enumerate(record["candidates"]) if "rle_mask" in one}
        assert with_mask == set(range(len(record["candidates"]))) - selected


def test_a_failed_image_stops_the_run_where_that_is_asked_for(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"")
    entries, images = list_images(tmp_path)
    folder = RunFolder.start(tmp_path / "run", entries, stages.settings, shard_size=20)
    with pytest.raises(ValueError, match=r"broken.jpg: unreadable \(an empty file\)"):
        process_shard(folder, 0, stages, images, Workload(on_error="fail"))
    assert folder.missing_shards() == [0]


def test_replayed_regions_come_out_as_they_went_in(scenes: Path, annotate: Callable[..., list[Record]]) -> None:
    truth = list(read_annotations(scenes / "pad.json"))
    records = annotate(ReplayStages(scenes / "pad.json"))
    assert [record["status"] for record in records] == ["ok"] * len(truth)
    for record, expected in zip(records, truth, strict=True):
        found = parse_annotation(record)
        assert (found.image_id, found.size_wh, found.caption) == (
            expected.image_id, expected.size_wh, expected.caption,
        )  # fmt: skip
        # A mask's run lengths are unique, so that equal strings are an IoU of 1.
        assert [(region.tag, region.bbox_xyxy_px, region.rle_mask) for region in found.regions] == [
            (region.tag, region.bbox_xyxy_px, region.rle_mask) for region in expected.regions
        ]


def test_a_replay_refuses_pictures_of_another_size(scenes: Path, tmp_path: Path) -> None:
    image = next(read_annotations(scenes / "pad.json"))
    (tmp_path / image.image_id).parent.mkdir(parents=True)
    Image.new("RGB", (50, 50)).save(tmp_path / image.image_id)
    entries, folder = list_images(tmp_path)
    with pytest.raises(ValueError, match=r"field 'size': found \[96, 64\], expected \[50, 50\]"):
        annotate_images(entries, ReplayStages(scenes / "pad.json"), folder, Workload(), StageClock())


def test_what_the_pipeline_writes_trains_without_conversion(
    annotate: Callable[..., list[Record]], tmp_path: Path
) -> None:
    from llava.plugin import ImageView
    from patch_aligned.train.arguments import PatchArguments
    from patch_aligned.train.plugin import PatchAlignedPlugin

    class Words:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [sum(word.encode()) for word in text.split()]}

    records = [record for record in annotate() if record["status"] == "ok"]
    path = tmp_path / "pad.jsonl.gz"
    write_annotations(map(parse_annotation, records), path)
    again = [image.to_record() for image in read_annotations(path)]
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(records))  # extra keys survive

    plugin = PatchAlignedPlugin()
    arguments = PatchArguments(patch_data_path=str(path), patch_cache_dir=str(tmp_path / "cache"))
    plugin.setup(arguments, Words(), data_path=str(path))
    regions = 0
    for record in records:
        view = ImageView(tuple(record["size"]), "crop", 336, 336, 336, (24, 24))
        extras = plugin.transform_sample({"image": record["image_id"]}, view)
        assert len(extras["region_tokens"]) == len(extras["label_lengths"])
        regions += int(extras["region_tokens"].any(dim=1).sum())
    assert regions > 0
