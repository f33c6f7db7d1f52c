"""Features of a frozen tower, read from disk: the same losses, without images and without the tower."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.data.dataset import LazySupervisedDataset
from llava.model.multimodal_encoder.vision_tower import VisionTower
from tests.training import logged

FLAGS = "--cache_features features"
STAGE_2 = "--version v1 --data_path data_mix.json --tune_mm_mlp_adapter False --image_aspect_ratio pad --max_steps 4"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what the tower is given."""
    shapes: list[torch.Size] = []
    encode = VisionTower.encode
    monkeypatch.setattr(VisionTower, "encode", lambda self, images: shapes.append(images.shape) or encode(self, images))
    return shapes


@pytest.mark.parametrize("flags", ["", f"{STAGE_2} --group_by_modality_length True", "--bf16 True"])
def test_losses_are_those_without_cache_and_repeat_to_the_bit(
    run_stage_1: Any, encoded: list[torch.Size], monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    uncached = run_stage_1("uncached", flags)
    encoded.clear()
    filled = run_stage_1("filled", f"{flags} {FLAGS}")
    assert encoded and set(encoded) == {torch.Size((1, 3, 56, 56))}
    tolerance = 5e-3 if "bf16" in flags else 1e-6
    assert logged(filled) == pytest.approx(logged(uncached), rel=tolerance)

    encoded.clear()
    monkeypatch.setattr(LazySupervisedDataset, "load_pixels", None)
    again = run_stage_1("again", f"{flags} {FLAGS}")
    assert logged(again) == logged(filled) and not encoded
    ours, theirs = again.model.state_dict(), filled.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_workers_read_the_cache(run_stage_1: Any) -> None:
    one, two = (run_stage_1(f"run{n}", f"{FLAGS} --dataloader_num_workers {n}") for n in (0, 2))
    assert logged(one) == logged(two)


def test_a_stopped_fill_resumes_and_only_what_changed_is_computed_again(
    run_stage_1: Any, encoded: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {record["image"] for record in json.loads(Path("data_plain.json").read_text())}
    monkeypatch.setattr("llava.train.cache_features._SHARD_BYTES", 1)  # each image is a shard
    load, read = LazySupervisedDataset.load_pixels, []

    def load_two(self: Any, name: str, row: int) -> Any:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(name)
        return load(self, name, row)

    monkeypatch.setattr(LazySupervisedDataset, "load_pixels", load_two)
    with pytest.raises(KeyboardInterrupt):
        run_stage_1("run", f"{FLAGS} --max_steps 1")
    monkeypatch.setattr(LazySupervisedDataset, "load_pixels", load)
    encoded.clear()
    run_stage_1("run", f"{FLAGS} --max_steps 1")
    assert len(encoded) == len(images) - 2

    encoded.clear()
    os.utime(Path("images") / min(images), (1, 1))
    run_stage_1("again", f"{FLAGS} --max_steps 1")
    assert len(encoded) == 1
    for other in ("--mm_vision_select_layer -1", "--image_aspect_ratio pad", "--mm_vision_select_feature cls_patch"):
        encoded.clear()
        run_stage_1(f"other {other}", f"{FLAGS} {other} --max_steps 1")
        assert len(encoded) == len(images), other
    assert len(list(Path("features").iterdir())) == 4


def test_a_disk_without_room_is_refused_with_the_size(run_stage_1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8_000))
    with pytest.raises(ValueError, match=r"--cache_features: found 0\.00 GB.* x 16 x 32 in float32"):
        run_stage_1("run", FLAGS)


def test_an_unreadable_image_is_skipped_as_without_cache(run_stage_1: Any) -> None:
    records = json.loads(Path("data_plain.json").read_text())
    Path("some.json").write_text(json.dumps([*records, records[0] | {"id": "gone", "image": "gone.png"}]))
    trainer = run_stage_1("run", f"{FLAGS} --data_path some.json --on_error skip --max_steps 5")
    listed = [json.loads(line)["id"] for line in Path("run/skipped_samples.jsonl").read_text().splitlines()]
    assert set(listed) == {"gone"} and trainer.unsupervised.unsupervised >= 1


@pytest.mark.parametrize("flags", ["--image_aspect_ratio anyres --image_grid_pinpoints [[56,112]]",
                                   "--tune_mm_mlp_adapter False --unfreeze_mm_vision_tower True"])  # fmt: skip
def test_tiles_and_trained_towers_are_refused(run_stage_1: Any, flags: str) -> None:
    with pytest.raises(ValueError, match="--cache_features features"):
        run_stage_1("run", f"{FLAGS} {flags}")
