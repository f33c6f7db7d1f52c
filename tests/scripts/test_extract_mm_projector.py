"""`scripts/extract_mm_projector.py` takes a projector out of any kind of checkpoint."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.weights import load_projector, read_projector_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "extract_mm_projector.py"


Extract = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def extract(golden_world: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Extract:
    """Runs the script among the tiny checkpoints."""
    return lambda model_path, output: run_python(str(SCRIPT), "--model-path", model_path, "--output", output)


def test_a_file_of_the_checkpoint_is_not_overwritten(extract: Extract) -> None:
    before = Path("tiny-llava/model.safetensors").read_bytes()
    result = extract("tiny-llava", "tiny-llava/model.safetensors")
    assert result.returncode == 1 and "tiny-llava/model.safetensors" in result.stderr
    assert Path("tiny-llava/model.safetensors").read_bytes() == before


def test_the_file_is_what_stage_2_starts_from(extract: Extract) -> None:
    result = extract("tiny-llava", "out/mm_projector.bin")
    assert result.returncode == 0, result.stderr
    expected = {name: t for name, t in load_file("tiny-llava/model.safetensors").items() if "mm_projector" in name}
    found = torch.load("out/mm_projector.bin", weights_only=True)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]

    _, model, _, _ = load_pretrained_model("tiny-llava", None, "x", device="cpu")
    projector = build_vision_projector(model.config)
    load_projector(projector, read_projector_file("out/mm_projector.bin"), "out/mm_projector.bin")
    features = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projector(features), model.get_model().mm_projector(features))


@pytest.mark.golden
@pytest.mark.parametrize("folder", ["ckpt_stage1", "ckpt_lora", "ckpt_stage2"])
def test_each_form_of_checkpoint_gives_its_projector(folder: str, extract: Extract, goldens: Path) -> None:
    shutil.copytree(goldens / folder, folder)
    result = extract(folder, "mm_projector.bin")
    assert result.returncode == 0, result.stderr
    assert len(torch.load("mm_projector.bin", weights_only=True)) == 4
    assert Path("mm_projector.bin").stat().st_size < 60_000


@pytest.mark.parametrize(
    ("model_path", "said"),
    [
        ("tiny-vicuna", "error: tiny-vicuna holds no projector"),
        ("./missing", "error: No weights at ./missing: expected model.safetensors"),
    ],
)
def test_what_holds_no_projector_is_named_in_one_sentence(extract: Extract, model_path: str, said: str) -> None:
    result = extract(model_path, "mm_projector.bin")
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr
