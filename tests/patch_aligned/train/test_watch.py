"""What is measured and drawn on held-out images while a projector trains, which changes no number of the training."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava.train.train import train
from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models
from patch_aligned.intervals import Resampling
from patch_aligned.train.plugin import PatchAlignedPlugin
from patch_aligned.train.watch import COLUMNS, PAGE

IMAGES = [f"im{number}.png" for number in range(6)]
WATCH = "--eval_align_steps 2 --patch_picture_steps 3 --eval_align_images 2 --patch_beta_start 5"
KEYS = {"eval/align": "align_px", "eval/contrast": "contrast", "eval/retrieval": "retrieval_top1"}


def lines_with(trainer: Any, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in trainer.state.log_history if name in line]


def columns(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / COLUMNS).read_text().splitlines()]


def test_try(run_stage_1: Any) -> None:
    print(sorted(Path("images").iterdir()))
    trainer, plugin = run_stage_1(IMAGES, f"{WATCH} --max_steps 5")
    print(trainer.state.log_history, plugin.held_out)
    print([c["step"] for c in columns(Path("run"))])
    shutil.copy("run/" + PAGE, "/tmp/page.html")
