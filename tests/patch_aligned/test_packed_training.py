"""A short stage 1 from masks and from their pack: the same losses, picture and projector, to the last bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from llava.train.train import train
from patch_aligned.cli import app
from patch_aligned.packed_tokens import PackedTokensError
from patch_aligned.train.plugin import PatchAlignedPlugin

FLAGS = (
    "--bf16 False --use_cpu True --report_to none --logging_steps 1 --seed 42 --vision_tower tiny-clip "
    "--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --disable_tqdm True "
    "--model_name_or_path tiny-vicuna --image_folder images --model_max_length 2048 --version plain "
    "--tune_mm_mlp_adapter True --per_device_train_batch_size 2 --max_steps 3 --learning_rate 3e-3 "
    "--save_strategy no --data_path pad.json --patch_beta_start 1"
)
IMAGES = ("im0.png", "im1.png", "im5.png")  # square, wide, and large


@pytest.fixture
def world(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny models and a PAD file, with a run's flags to come."""
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(golden_world / "cache"))
    monkeypatch.setattr("llava.data.records.HF_HOME", str(golden_world / "cache"))
    records = []
    for image in IMAGES:
        width, height = Image.open(Path("images") / image).size
        labels = []
        for tag, share in (("water", 2), ("traffic light", 3), ("a speck", width)):
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[: height // share, width - width // share :] = 1
            rle_mask = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
            labels.append({"tag": tag, "bbox": [0, 0, 1, 1], "rle_mask": rle_mask})
        records.append({"image_id": image, "size": [width, height], "caption": "a lake", "labels": labels})
    Path("pad.json").write_text(json.dumps(records))
    return golden_world


def run(monkeypatch: pytest.MonkeyPatch, output: str, *more: str) -> tuple[list[dict[str, Any]], PatchAlignedPlugin]:
    """What a run logs, without its timings."""
    monkeypatch.setattr(sys, "argv", ["train_mem.py", *FLAGS.split(), "--output_dir", output, *more])
    plugin = PatchAlignedPlugin()
    history = train(plugin=plugin).state.log_history
    steps = [{key: value for key, value in entry.items() if "runtime" not in key} for entry in history]
    return [entry for entry in steps if "loss/patch" in entry], plugin


def pack(*more: str) -> str:
    result = CliRunner().invoke(app, ["pack", "pad.json", "--grid", "4", "--side", "56", *more])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_training_from_a_pack_gives_the_same_losses_and_projector(
    world: Path, monkeypatch: pytest.MonkeyPatch, aspect: str
) -> None:
    from_masks, plain = run(monkeypatch, "masks", "--image_aspect_ratio", aspect)
    pack("--image-aspect-ratio", aspect)
    from_pack, packed = run(monkeypatch, "packed", "--image_aspect_ratio", aspect)
    assert plain.packed is None and packed.packed is not None
    assert len(from_masks) == 3 and from_masks == from_pack
    assert any(entry["patch/dropped_regions"] > 0 for entry in from_masks)
    for name, values in torch.load("masks/mm_projector.bin", weights_only=True).items():
        assert torch.equal(values, torch.load("packed/mm_projector.bin", weights_only=True)[name]), name
    assert Path("masks/first_batch.png").read_bytes() == Path("packed/first_batch.png").read_bytes()


def test_training_stops_at_a_pack_of_another_geometry_even_where_it_skips_broken_samples(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack("--output", "pad_cropped.arrow")
    flags = ["--image_aspect_ratio", "pad", "--patch_packed_path", "pad_cropped.arrow", "--on_error", "skip"]
    with pytest.raises(PackedTokensError, match=r"mode crop; expected mode pad(.|\n)*--image-aspect-ratio pad"):
        run(monkeypatch, "run", *flags)
