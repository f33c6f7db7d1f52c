"""Whole trainings of the tiny models, run in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGE_1 = (
    "--bf16 False --use_cpu True --report_to none --logging_steps 1 --seed 42 --vision_tower tiny-clip "
    "--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False "
    "--mm_use_im_patch_token False --model_name_or_path tiny-vicuna --image_folder images --model_max_length 2048 "
    "--lr_scheduler_type cosine --warmup_ratio 0.03 --lazy_preprocess True --dataloader_num_workers 0 "
    "--disable_tqdm True --evaluation_strategy no --pretrain_mm_mlp_adapter train_init/mm_projector.bin "
    "--version plain --data_path data_plain.json --tune_mm_mlp_adapter True --per_device_train_batch_size 4 "
    "--num_train_epochs 5 --learning_rate 1e-3 --weight_decay 0. --save_strategy no"
)


def stage_1_flags(output_dir: str, flags: str = "") -> list[str]:
    """Command line of the recorded stage 1, with an output folder and further flags; of two, the later one counts."""
    return [*STAGE_1.split(), "--output_dir", output_dir, *flags.split()]


@pytest.fixture
def run_training(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls `train()` with a command line, in a folder of its own that holds the tiny models and data."""
    from llava.train.train import train

    def run(arguments: list[str], plugin: Any = None) -> Any:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return train(plugin=plugin)

    return run


@pytest.fixture
def run_stage_1(run_training: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the recorded stage 1 with an output folder, further flags and a plugin; returns the trainer."""
    return lambda output_dir, flags="", plugin=None: run_training(stage_1_flags(output_dir, flags), plugin)
