"""The C-Abstractor against recordings of Honeybee's, and what it refuses."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.multimodal_projector.c_abstractor import CAbstractor
from llava.model.weights import load_projector, read_projector_file


def fill(projector: nn.Module) -> None:
    """Weights as they were when Honeybee's outputs were recorded: normals seeded by the name's checksum."""
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            shape = tuple(parameter.shape)
            normals = np.random.RandomState(zlib.crc32(f"cabs.{name}".encode())).standard_normal(shape)
            if name == "pos_emb":
                values = 0.1 * normals
            elif len(shape) == 1:
                values = 1 + 0.1 * normals if name.endswith("bn.weight") else 0.05 * normals
            else:
                values = normals / np.sqrt(np.prod(shape[1:]))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def of_recorded_size(depth: int) -> CAbstractor:
    return CAbstractor(16, 32, 64, queries=4, depth=depth, hidden_size=48)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "depth"), [("d3", 3), ("d0", 0)])
def test_keys_and_outputs_are_honeybees(name: str, depth: int, goldens: Path) -> None:
    recorded, arrays = json.loads((goldens / "g_cabs.json").read_text())[name], np.load(goldens / "g_cabs.npz")
    projector = of_recorded_size(depth)
    assert {key: list(value.shape) for key, value in projector.state_dict().items()} == recorded["state_dict"]
    fill(projector)
    with torch.no_grad():
        tokens = projector(torch.from_numpy(arrays[f"{name}/in"]))
    torch.testing.assert_close(tokens, torch.from_numpy(arrays[f"{name}/out"]), rtol=1e-5, atol=1e-5)


@pytest.mark.golden
def test_recorded_weights_give_the_recorded_tokens(goldens: Path) -> None:
    """The recording has a norm in front and two closing tokens; both are options that Honeybee's models leave off."""
    arrays, name = np.load(goldens / "g_cabs.npz"), "d1_eos_prenorm"
    state = {key: torch.from_numpy(arrays[f"{name}/w/{key}"]) for key in of_recorded_size(1).state_dict()}
    projector = of_recorded_size(1)
    load_projector(projector, {f"abstractor.{key}": value for key, value in state.items()}, "recording")
    weight, bias = (torch.from_numpy(arrays[f"{name}/w/prenorm.{part}"]) for part in ("weight", "bias"))
    features = torch.from_numpy(arrays[f"{name}/in"])
    with torch.no_grad():
        tokens = projector(nn.functional.layer_norm(features, (32,), weight, bias, eps=1e-6))
    torch.testing.assert_close(tokens, torch.from_numpy(arrays[f"{name}/out"][:, :4]), rtol=1e-5, atol=1e-5)


@pytest.mark.golden
def test_the_size_of_a_7b_model_has_honeybees_keys_and_start(goldens: Path) -> None:
    recorded = json.loads((goldens / "g_cabs.json").read_text())["full_7b"]
    torch.manual_seed(0)
    config = SimpleNamespace(mm_projector_type="cabstractor", mm_hidden_size=1024, hidden_size=4096, mm_num_patches=576)
    config.mm_projector_num_queries = 144
    state = build_vision_projector(config).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == recorded["state_dict"]
    assert recorded["init_std"]
    for key, (mean, spread) in recorded["init_std"].items():
        assert state[key].mean().item() == pytest.approx(mean, abs=0.01), key
        assert state[key].std().item() == pytest.approx(spread, rel=0.1, abs=1e-6), key


def test_the_default_is_a_grid_of_16_by_16() -> None:
    config = SimpleNamespace(mm_projector_type="cabstractor", mm_hidden_size=8, hidden_size=12, mm_num_patches=576)
    config.mm_projector_hidden_size = 8
    projector = build_vision_projector(config)
    assert projector.grid == (16, 16)
    assert projector(torch.zeros(2, 576, 8)).shape == (2, 256, 12)


def test_without_convolutions_a_token_is_the_mean_of_its_place() -> None:
    """Depth 0 is pooling and the readout, so the order of the tokens can be computed by hand."""
    projector = CAbstractor(36, 5, 7, queries=9, depth=0)
    features = torch.randn(2, 36, 5)
    placed = (features + projector.pos_emb).view(2, 3, 2, 3, 2, 5)  # [B, row, within, column, within, C]
    expected = projector.readout(placed.mean((2, 4)).flatten(1, 2))
    torch.testing.assert_close(projector(features), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_follows_float32() -> None:
    torch.manual_seed(0)
    projector, features = of_recorded_size(1), torch.randn(2, 16, 32)
    expected = projector(features)
    tokens = projector.bfloat16()(features.bfloat16())
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, rtol=0.1, atol=0.02)  # eight bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_num_queries": 200}, "mm_projector_num_queries is 200, which is not a square number"),
        ({"mm_projector_num_queries": 0}, "mm_projector_num_queries is 0"),
        ({"mm_num_patches": 577}, "577"),
        ({"mm_num_patches": None}, "lacks `mm_num_patches`"),
        ({"mm_vision_select_feature": "cls_patch"}, "--mm_vision_select_feature patch"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {"mm_projector_type": "cabstractor", "mm_hidden_size": 8, "hidden_size": 8, "mm_num_patches": 16}
    with pytest.raises(ValueError, match=message):
        build_vision_projector(SimpleNamespace(**config | change))


def test_an_old_honeybee_file_loses_the_place_of_its_cls_token(tmp_path: Path) -> None:
    source = of_recorded_size(1)
    state = {f"abstractor.{name}": tensor.clone() for name, tensor in source.state_dict().items()}
    state["abstractor.pos_emb"] = torch.cat([torch.full((1, 1, 32), 9.0), state["abstractor.pos_emb"]], dim=1)
    torch.save(state, tmp_path / "honeybee.bin")
    projector = of_recorded_size(1)
    load_projector(projector, read_projector_file(tmp_path / "honeybee.bin"), "honeybee.bin")
    for name, tensor in source.state_dict().items():
        assert torch.equal(projector.state_dict()[name], tensor), name
