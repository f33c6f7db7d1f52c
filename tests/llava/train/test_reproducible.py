"""The same command gives the same run, from the projector's random start on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.llava.train.conftest import stage_1_flags


def projector_after(run: Callable[..., Any], folder: str, seed: int) -> torch.Tensor:
    """First weight after one step at learning rate 0, so as it was born."""
    arguments = stage_1_flags(folder, f"--seed {seed} --max_steps 1 --learning_rate 0")
    place = arguments.index("--pretrain_mm_mlp_adapter")
    run(arguments[:place] + arguments[place + 2 :])
    return torch.load(Path(folder) / "mm_projector.bin", weights_only=True)["model.mm_projector.0.weight"]


def test_the_seed_decides_how_the_projector_starts(run_training: Any) -> None:
    torch.manual_seed(1)
    first = projector_after(run_training, "first", 42)
    torch.manual_seed(2)
    assert torch.equal(first, projector_after(run_training, "again", 42))
    assert not torch.equal(first, projector_after(run_training, "other", 43))
