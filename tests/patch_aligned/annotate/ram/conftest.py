"""The recorded models, and files in the layout in which RAM's authors publish theirs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from patch_aligned.annotate.ram.model import RamModel, config_of, renamed_state

GOLDENS = Path(__file__).parents[3] / "goldens" / "ram"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="session")
def ram_goldens() -> Path:
    """Folder of what the original classes computed; its README says what each file holds."""
    return GOLDENS


@pytest.fixture(scope="session")
def ram_golden() -> Tensors:
    """RAM: weights, two normalised pictures `input.image` `[2, 3, 96, 96]`, and outputs."""
    return load_file(GOLDENS / "ram_mini96.safetensors")


@pytest.fixture(scope="session")
def ram_plus_golden(ram_golden: Tensors) -> Tensors:
    """RAM++ on 8 tags. Its outputs start from its own encoder's, which is not recorded; RAM's stands in for it."""
    encoder = {name: tensor for name, tensor in ram_golden.items() if name.startswith("state.visual_encoder.")}
    decoder = load_file(GOLDENS / "ram_plus_mini96_decoder.safetensors")
    return {**encoder, **decoder, "input.image": ram_golden["input.image"]}


@pytest.fixture(params=["ram", "ram_plus"])
def golden(request: pytest.FixtureRequest) -> Tensors:
    """RAM, then RAM++."""
    tensors: Tensors = request.getfixturevalue(f"{request.param}_golden")
    return tensors


@pytest.fixture
def model(golden: Tensors) -> RamModel:
    """The model of `golden`."""
    return _built(golden)


@pytest.fixture
def ram(ram_golden: Tensors) -> RamModel:
    return _built(ram_golden)


@pytest.fixture
def ram_plus(ram_plus_golden: Tensors) -> RamModel:
    return _built(ram_plus_golden)


@pytest.fixture
def published_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes weights as the published files hold them: with derived tables, unused parts and training's state.

    Takes a golden, tensors to add or to replace by name (None removes one), and what stands beside the weights.
    """

    def write(golden: Tensors, changed: dict[str, Tensor | None] | None = None, **beside: object) -> Path:
        block = "visual_encoder.layers.0.blocks.1."
        state = _published(golden) | {
            f"{block}attn_mask": torch.zeros(64, 9, 9),
            f"{block}attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
            "tag_encoder.encoder.layer.0.output.dense.weight": torch.zeros(2, 2),
            "text_decoder.cls.predictions.bias": torch.zeros(2),
        }
        state = {name: tensor for name, tensor in (state | (changed or {})).items() if tensor is not None}
        optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
        path = tmp_path / "ram_mini.pth"
        saved = {"model": state, "optimizer": optimizer, "config": argparse.Namespace(image_size=96), "epoch": 3}
        torch.save(saved | beside, path)
        return path

    return write


def _published(golden: Tensors) -> Tensors:
    return {name.removeprefix("state."): tensor for name, tensor in golden.items() if name.startswith("state.")}


def _built(golden: Tensors) -> RamModel:
    state = _published(golden)
    model = RamModel(config_of(state))
    model.load_state_dict(renamed_state(state))
    return model.requires_grad_(False).eval()
