"""Whole runs of stage 1 with the patch loss, on tiny models and images whose four quarters are regions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.train.train import train
from patch_aligned.train.plugin import PatchAlignedPlugin
from tests.pads import TAGS, record_of_quarters

FLAGS = (
    "--bf16 False --use_cpu True --report_to none --logging_steps 1 --seed 42 --vision_tower tiny-clip "
    "--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --disable_tqdm True "
    "--model_name_or_path tiny-vicuna --image_folder images --model_max_length 2048 --version plain "
    "--tune_mm_mlp_adapter True --per_device_train_batch_size 2 --lr_scheduler_type constant --learning_rate 3e-3 "
    "--save_strategy no --data_path pad.json --patch_beta_start 5 --patch_beta_end 5 --output_dir run"
)
QUADRANTS = TAGS  # left above, right above, left below, right below


def quadrant_record(image: str) -> dict[str, Any]:
    """A PAD record whose four regions are the quarters of the image."""
    return record_of_quarters(image, Image.open(Path("images") / image).size, QUADRANTS)


class Watched(PatchAlignedPlugin):
    """Keeps what its loss was given."""

    def auxiliary_losses(self, context: Any, batch: Any) -> Any:
        self.context, self.batch = context, batch
        return super().auxiliary_losses(context, batch)


@pytest.fixture
def patch_flags(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Writes `pad.json` of the named images; returns a command line with further flags, of two the later one counts."""
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(golden_world / "cache"))
    monkeypatch.setenv("HF_HOME", str(golden_world / "cache"))
    monkeypatch.setattr("llava.data.records.HF_HOME", str(golden_world / "cache"))

    def flags(images: list[str], flags: str, more: Sequence[str] = ()) -> list[str]:
        Path("pad.json").write_text(json.dumps([quadrant_record(image) for image in images]))
        return [*FLAGS.split(), *flags.split(), *more]

    return flags


@pytest.fixture
def run_stage_1(
    patch_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Watched]]:
    """Trains on the named images with further flags; returns the trainer and the plugin."""

    def run(images: list[str], flags: str, more: Sequence[str] = ()) -> tuple[Any, Watched]:
        monkeypatch.setattr(sys, "argv", ["train_mem.py", *patch_flags(images, flags, more)])
        plugin = Watched()
        return train(plugin=plugin), plugin

    return run
