"""4-bit and 8-bit loading: the LLM's layers alone are quantised, and answers stay near those of full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from llava.model.builder import load_pretrained_model, model_kwargs

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra `train`")
IDS = torch.tensor([[1, -200, 20, 30, 40]])


def logits(model: Any) -> torch.Tensor:
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=IDS, images=images).logits


# Weights of the tiny model are Gaussian and 64 wide, which costs nf4 more than a trained model: 10% a layer.
# Products of 8 bits cost 13% in all with oneDNN's AVX2, which has no VNNI, and 2% with AVX512.
@pytest.mark.parametrize(
    ("option", "kind", "error"), [("load_8bit", "Linear8bitLt", 0.2), ("load_4bit", "Linear4bit", 0.3)]
)
def test_the_llms_layers_are_quantised_and_nothing_else(
    golden_world: Path, option: str, kind: str, error: float
) -> None:
    whole = load_pretrained_model("tiny-llava", None, "x", device="cpu").model
    model = load_pretrained_model("tiny-llava", None, "x", device="cpu", **{option: True}).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, found in kinds.items() if found == kind} == {
        name for name in kinds if name.startswith("model.layers.")
    }
    assert sum(found == "Linear" for found in kinds.values()) > 3  # projector, lm_head, tower
    expected, found = logits(whole), logits(model)
    assert torch.isfinite(found).all()
    assert 0 < (found - expected).norm() / expected.norm() < error
    assert model.generate(IDS[:, 2:], do_sample=False, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)


def test_8_bit_weights_are_the_checkpoints_to_half_a_step(golden_world: Path) -> None:
    """The weights themselves, multiplied in float32: no CPU's products of 8 bits decide."""
    whole = load_pretrained_model("tiny-llava", None, "x", device="cpu").model
    model = load_pretrained_model("tiny-llava", None, "x", device="cpu", load_8bit=True).model
    expected = logits(whole)
    layers = [name for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"]
    for name in layers:
        weight, quantised = whole.get_submodule(name).weight.data, model.get_submodule(name).weight
        found = quantised.data * quantised.SCB[:, None] / 127
        step = weight.abs().amax(dim=1, keepdim=True) / 127  # [out, 1]
        # bitsandbytes rounds to float16 first: up to 127 / 2048 of a step.
        assert ((found - weight).abs() <= (0.5 + 127 / 2048 + 1e-3) * step).all()
        weight.copy_(found)
    assert layers
    assert 0 < (logits(whole) - expected).norm() / expected.norm() < 0.04


def test_a_callers_own_quantisation_leaves_the_projector(golden_world: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = load_pretrained_model("tiny-llava", None, "x", device="cpu", quantization_config=config).model
    assert torch.isfinite(logits(model)).all()
    assert type(model.model.mm_projector[0]) is nn.Linear


def test_quantised_layers_compute_in_the_dtype_of_the_model() -> None:
    for dtype, expected in (("bfloat16", torch.bfloat16), ("auto", torch.float16), (None, torch.float32)):
        options = model_kwargs(False, True, "auto", "cpu", False, {"dtype": dtype})
        assert options["quantization_config"].bnb_4bit_compute_dtype == expected
