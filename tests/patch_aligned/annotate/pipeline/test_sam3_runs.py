"""Runs of SAM 3: phrases of a file to shards, through interruptions, to files that can be reselected."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from patch_aligned.annotate.folder import RunFolder
from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.options import ModelOptions, Selection, Workload
from patch_aligned.annotate.pipeline import Failure, ImageInWork, StageClock, annotate_images
from patch_aligned.annotate.regions import Tag
from patch_aligned.annotate.stages import ModelStages, build_stages
from patch_aligned.cli import app
from patch_aligned.pad import read_annotations
from playground.mini.annotation_models import write_sam3
from playground.mini.replay import app as replay
from tests.patch_aligned.annotate.pipeline.conftest import deciding_files

pytest.importorskip("torchvision", reason="torchvision is part of the extra `annotate`")

SHARD_SIZE = 4
Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def phrases(scenes: Path) -> Path:
    """Three phrases for each picture but the fourth, which has none."""
    path = scenes / "phrases.jsonl"
    names = [record["image"] for record in json.loads((scenes / "train.json").read_text())]
    lines = [
        {"image_id": name, "phrases": [] if row == 3 else ["dog", f"thing {row % 5}", "sky"]}
        for row, name in enumerate(names)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def sam3(tiny_models: Path) -> Path:
    write_sam3(tiny_models / "sam3")
    return tiny_models / "sam3"


@pytest.fixture(scope="module")
def arguments(scenes: Path, phrases: Path, sam3: Path) -> Callable[..., list[str]]:
    return lambda output, *further: [
        "annotate", "--images", str(scenes / "train.json"), "--image_folder", str(scenes), "--output", str(output),
        "--tagger", "file", "--phrases", str(phrases), "--segmenter", "sam3", "--sam3", str(sam3), "--device", "cpu",
        "--shard_size", str(SHARD_SIZE), "--decode_workers", "2", *further,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("sam3")
    result = CliRunner().invoke(app, arguments(output))
    assert result.exit_code == 0, result.output
    return output


def records_of(run: Path) -> list[dict[str, Any]]:
    folder = RunFolder(run)
    return [record for shard in range(folder.num_shards) for record in folder.read_shard(shard)[1]]


def iou(one: str, other: str, size_wh: Sequence[int]) -> float:
    return coco_mask.iou(*([{"size": list(size_wh)[::-1], "counts": rle.encode()}] for rle in (one, other)), [0]).item()


def test_records_hold_phrases_and_instances_with_their_masks(run: Path) -> None:
    records = records_of(run)
    assert [record["status"] for record in records].count("no_tags") == 1
    assert records[3]["status"] == "no_tags"
    labels = [(record, label) for record in records for label in record["labels"]]
    assert labels and any(len(record["candidates"]) > len(record["labels"]) for record in records)
    for record, label in labels:
        assert label["tag"] == label["best_tag"] in [tag["name"] for tag in record["tags"]]
        assert label["score"] > 0.5  # SAM 3's own threshold, where none is given
        assert 0 < label["presence"] < 1 and label["area_px"] > 0
    for record in records:
        positions = {label["candidate"] for label in record["labels"]}
        for position, candidate in enumerate(record["candidates"]):
            assert ("rle_mask" in candidate) == (position not in positions)
        for first, label in enumerate(record["labels"]):
            for other in record["labels"][:first]:
                assert iou(label["rle_mask"], other["rle_mask"], record["size"]) <= 0.5
                assert other["score"] >= label["score"]


def test_settings_name_the_source_of_phrases_and_the_model(run: Path) -> None:
    settings = RunFolder(run).settings
    assert settings["tagger"]["kind"] == "file" and len(settings["tagger"]["phrases_sha256"]) == 64
    assert set(settings["sam3"]["files_sha256"]) >= {"config.json", "model.safetensors"}
    assert (settings["sam3"]["mask_threshold"], settings["sam3"]["presence_threshold"]) == (0.5, 0.0)
    assert settings["selection"]["box_threshold"] == 0.5 and settings["segment_candidates"] is True
    assert json.loads((run / "run.json").read_text())["flags"]["box_threshold"] == 0.5
    assert not {"ram", "detector", "sam"} & settings.keys()


def test_a_run_that_was_killed_and_torn_gives_the_same_bytes(
    arguments: Callable[..., list[str]], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    output, write = tmp_path / "run", RunFolder.write_shard

    def killed_at_the_third(folder: RunFolder, shard: int, records: Any) -> Any:
        if shard == 2:
            raise KeyboardInterrupt
        return write(folder, shard, records)

    with monkeypatch.context() as until_then:
        until_then.setattr(RunFolder, "write_shard", killed_at_the_third)
        CliRunner().invoke(app, arguments(output))
    folder = RunFolder(output)
    assert folder.missing_shards() == [2, 3, 4]
    torn = folder.shard_path(0)
    torn.write_bytes(torn.read_bytes()[:-100])
    resumed = CliRunner().invoke(app, arguments(output))
    assert "4 shards are left for this process" in resumed.output.replace("\n", " ")
    assert deciding_files(output) == deciding_files(run)
    # Another order of shards: what is kept of phrases is made by other pictures first.
    for shard in range(3):
        folder.shard_path(shard).unlink()
    assert CliRunner().invoke(app, arguments(output)).exit_code == 0
    assert deciding_files(output) == deciding_files(run)


def test_a_run_goes_on_only_with_its_own_phrases_and_segmenter(
    arguments: Callable[..., list[str]], annotate_arguments: Callable[[Path], list[str]], run: Path, phrases: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    changed = tmp_path / "phrases.jsonl"
    changed.write_text(phrases.read_text().replace("sky", "lake"))
    result = CliRunner().invoke(app, arguments(run, "--phrases", str(changed), "--mask_threshold", "0.6"))
    assert result.exit_code == 2
    assert "tagger.phrases_sha256: the folder has" in result.output
    assert "sam3.mask_threshold: the folder has 0.5, this call 0.6" in result.output
    result = CliRunner().invoke(app, annotate_arguments(run))
    assert result.exit_code == 2 and "detector.kind" in result.output.replace("detector: ", "detector.kind: ")


def test_any_choice_above_the_candidates_can_be_made_later(run: Path, tmp_path: Path) -> None:
    def labels(*options: str) -> dict[str, list[dict[str, Any]]]:
        output = tmp_path / "pad.jsonl"
        result = CliRunner().invoke(app, ["reselect", str(run), "--output", str(output), *options])
        assert result.exit_code == 0, result.output
        return {
            image.image_id: [(one.tag, one.extra["score"], one.rle_mask) for one in image.regions]
            for image in read_annotations(output)
        }

    records = [record for record in records_of(run) if record["labels"]]
    assert labels() == {
        record["image_id"]: [(one["tag"], one["score"], one["rle_mask"]) for one in record["labels"]]
        for record in records
    }
    everything = labels("--box_threshold", "0.15", "--nms_iou", "1")
    few = labels("--box_threshold", "0.7")
    assert sum(map(len, few.values())) < sum(len(record["labels"]) for record in records)
    assert sum(map(len, everything.values())) == sum(len(record["candidates"]) for record in records_of(run))
    assert not any("empty_masks" in record for record in records_of(run))
    refused = CliRunner().invoke(
        app, ["reselect", str(run), "--output", str(tmp_path / "x.json"), "--box_threshold", "0.1"]
    )
    assert refused.exit_code == 2 and "expected 0.15 or more" in refused.output


def test_merged_files_pass_verification(run: Path, scenes: Path, tmp_path: Path) -> None:
    pad = tmp_path / "pad.jsonl.gz"
    assert CliRunner().invoke(app, ["merge", str(run), "--output", str(pad), "--keep_candidates"]).exit_code == 0
    result = CliRunner().invoke(app, ["verify", str(pad), "--image_folder", str(scenes), "--fail_on", "broken_file"])
    assert result.exit_code == 0, result.output
    again = tmp_path / "again.jsonl"
    assert CliRunner().invoke(app, ["reselect", str(pad), "--output", str(again)]).exit_code == 0
    for image, same in zip(read_annotations(pad), read_annotations(again), strict=True):
        assert [one.rle_mask for one in image.regions] == [one.rle_mask for one in same.regions]


def test_pictures_of_one_pixel_and_of_60000_by_2_are_taken_where_that_is_asked_for(
    models: ModelOptions, sam3: Path, tmp_path: Path
) -> None:
    from PIL import Image

    for name, size_wh in {"dot": (1, 1), "line": (60_000, 2)}.items():
        Image.new("RGB", size_wh, "red").save(tmp_path / f"{name}.png")
    (tmp_path / "phrases.jsonl").write_text(
        "".join(json.dumps({"image_id": f"{name}.png", "phrases": ["sky", "dog"]}) + "\n" for name in ("dot", "line"))
    )
    entries, folder = list_images(tmp_path)
    options = replace(models, tagger="file", phrases=tmp_path / "phrases.jsonl", segmenter="sam3", sam3=str(sam3))
    stages = build_stages(options, Selection(box_threshold=0.2, min_box_area_px=0), "cpu", entries)
    usual = annotate_images(entries, stages, folder, Workload(), StageClock())
    assert [record["status"] for record in usual] == ["skipped"] * 2
    records = annotate_images(entries, stages, folder, Workload(min_side=1, max_aspect=1e5), StageClock())
    for record in records:
        assert record["candidates"]
        size = record["size"][0] * record["size"][1]
        assert all(0 < label["area_px"] <= size for label in record["labels"])
    assert records[1]["status"] == "ok"


def test_phrases_of_a_file_are_found_by_grounding_dino_and_sam_too(
    models: ModelOptions, scenes: Path, phrases: Path, sam3: Path
) -> None:
    entries, folder = list_images(scenes / "train.json", scenes)
    options = replace(models, tagger="file", phrases=phrases)
    build = pickle.loads(pickle.dumps(partial(build_stages, options, Selection(), entries=entries)))  # as Ray does
    stages = build("cpu")
    assert stages.settings.keys() >= {"tagger", "detector", "sam"} and "ram" not in stages.settings
    records = annotate_images(entries[:4], stages, folder, Workload(), StageClock())
    assert records[3]["status"] == "no_tags"
    assert {one["best_tag"] for one in records[0]["candidates"]} <= {"dog", "thing 0", "sky"}


def test_pictures_without_phrases_and_taggers_without_their_option_end_the_run_before_it_begins(
    arguments: Callable[..., list[str]], phrases: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(phrases.read_text().split("\n", 1)[1])
    result = CliRunner().invoke(app, arguments(tmp_path / "run", "--phrases", str(few)))
    assert result.exit_code == 2 and "found no record of 1 of 20 images" in result.output.replace("\n", " ")
    result = CliRunner().invoke(app, arguments(tmp_path / "run", "--tagger", "vlm"))
    assert result.exit_code == 2 and "--vlm: not all are given" in result.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_answers_that_are_no_list_are_counted_and_asked_again(
    models: ModelOptions, scenes: Path, tmp_path: Path
) -> None:
    from patch_aligned.annotate.run import AnnotationJob, ShardWorker

    answers = {"good": False}
    build = partial(build_stages, models, Selection(box_threshold=0.99))

    def with_tagger(device: str) -> ModelStages:
        stages = build(device)

        def tag(items: Sequence[ImageInWork]) -> list[list[Tag] | Failure]:
            bad = Failure("unparsable", "found the answer 'Sure!', expected a JSON list of short strings")
            return [[Tag("dog")] if answers["good"] or row else bad for row in range(len(items))]

        stages.tag = tag
        return stages

    entries, images = list_images(scenes / "train.json", scenes)
    job = AnnotationJob(entries[:3], images, tmp_path / "run", with_tagger, Workload(), 4)
    worker = ShardWorker(job, "cpu")
    header, _ = worker.process(0)
    assert header.counts["unparsable"] == 1
    record = records_of(tmp_path / "run")[0]
    assert (record["status"], record["labels"]) == ("unparsable", [])
    assert record["reason"] == "tag: found the answer 'Sure!', expected a JSON list of short strings"
    answers["good"] = True
    header, _ = ShardWorker(replace(job, retry=frozenset({"unparsable"})), "cpu").process(0)
    assert "unparsable" not in header.counts
    with pytest.raises(ValueError, match="unparsable"):
        answers["good"] = False
        failing = replace(job, output=tmp_path / "other", workload=Workload(on_error="fail"))
        ShardWorker(failing, "cpu").process(0)


def test_an_oracle_in_sam_3s_place_gives_the_scenes_own_regions(scenes: Path, tmp_path: Path) -> None:
    run, pad, again = tmp_path / "run", tmp_path / "pad.json", tmp_path / "again.json"
    result = CliRunner().invoke(
        replay,
        ["--images", str(scenes / "train.json"), "--image_folder", str(scenes), "--pad", str(scenes / "pad.json"),
         "--output", str(run), "--segmenter", "sam3", "--shard_size", "8"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for command in (["merge", str(run), "--output", str(pad)], ["reselect", str(run), "--output", str(again)]):
        assert CliRunner().invoke(app, command).exit_code == 0
    for found in (pad, again):
        for image, truth in zip(read_annotations(found), read_annotations(scenes / "pad.json"), strict=True):
            assert [region.tag for region in image.regions] == [region.tag for region in truth.regions]
            assert image.regions
            for region, expected in zip(image.regions, truth.regions, strict=True):
                assert iou(region.rle_mask, expected.rle_mask, image.size_wh) == 1.0
                assert region.bbox_xyxy_px == expected.bbox_xyxy_px
    shutil.rmtree(run)
