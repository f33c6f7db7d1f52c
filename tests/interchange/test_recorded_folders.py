"""Folders change hands: upstream's load here and are written again the same, ours hold what upstream's loader reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model

pytestmark = pytest.mark.golden

TESTS = Path(__file__).parents[1]


@pytest.fixture
def folders(golden_world: Path, goldens: Path) -> None:
    """Folders that upstream's training wrote, beside the models they name."""
    for name in ("ckpt_stage1", "ckpt_stage1ckpt", "ckpt_stage2"):
        shutil.copytree(goldens / name, golden_world / name)


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("folder", ["ckpt_stage1", "ckpt_stage1ckpt/checkpoint-2", "ckpt_stage1ckpt/checkpoint-4"])
def test_upstreams_projectors_and_intermediate_ones_load(folder: str) -> None:
    model = load_pretrained_model(folder, "tiny-vicuna", "any", device="cpu").model
    for name, tensor in torch.load(f"{folder}/mm_projector.bin").items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.usefixtures("folders")
def test_upstreams_stage_2_is_written_again_the_same() -> None:
    """What upstream's loader looks for: tensors by name, the config's keys, and SentencePiece's own tokenizer file."""
    tokenizer, model, _, _ = load_pretrained_model("ckpt_stage2", None, "any", device="cpu")
    model.save_pretrained("again")
    tokenizer.save_pretrained("again")
    theirs, ours = load_file("ckpt_stage2/model.safetensors"), load_file("again/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    before, after = (json.loads(Path(folder, "config.json").read_text()) for folder in ("ckpt_stage2", "again"))
    of_llava = [key for key in before if "mm_" in key or key.startswith(("image_", "tokenizer_"))]
    assert len(of_llava) > 10
    for key in ["model_type", "architectures", *of_llava]:
        assert after[key] == before[key], key


@pytest.mark.usefixtures("folders")
def test_the_recorded_projector_is_the_one_that_loads(goldens: Path) -> None:
    recorded = np.load(goldens / "g_builder.npz")
    for form, folder, base in (("full", "ckpt_stage2", None), ("projector_only", "ckpt_stage1", "tiny-vicuna")):
        projector: Any = load_pretrained_model(folder, base, "any", device="cpu").model.get_model().mm_projector
        np.testing.assert_array_equal(projector[0].weight.detach().numpy(), recorded[f"{form}/proj0"])


def test_every_recording_is_compared_with(goldens: Path) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    read = [re.sub(r"\{\w+\}", r"\\w+", name) for name in re.findall(r"\"(g_[^\"]+)\"", sources)]  # f-strings, too
    unused = [path.name for path in goldens.glob("g_*") if not any(re.fullmatch(name, path.name) for name in read)]
    assert unused == []
