"""`load_pretrained_model` on each form of checkpoint, by what is in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model


@pytest.mark.golden
@pytest.mark.parametrize("form", ["full", "projector_only", "tiny_llava", "text_base"])
def test_each_form_gives_the_recorded_logits_and_answer(form: str, golden_world: Path, goldens: Path) -> None:
    case = json.loads((goldens / "g_builder.json").read_text())[form]
    expected = np.load(goldens / "g_builder.npz")[f"{form}/logits"]
    if case["path"].startswith("ckpt"):
        shutil.copytree(goldens / case["path"], golden_world / case["path"])
    tokenizer, model, processor, context_len = load_pretrained_model(
        case["path"], case["base"], case["model_name"], device="cpu"
    )
    ids = torch.tensor([case["ids"]])
    assert type(model).__name__ == case["cls"]
    assert context_len == case["context_len"]
    assert model.get_input_embeddings().weight.shape[0] == case["n_vocab"]
    assert model.dtype == torch.float32
    assert tokenizer.convert_ids_to_tokens(1) == "<s>"
    with torch.no_grad():
        if case["generated"] is None:
            assert processor is None
            logits = model(input_ids=ids).logits
        else:
            pixels = torch.from_numpy(np.load(goldens / "g_tower.npz")["pixels"])[1:2]
            logits = model(input_ids=ids, images=pixels).logits
            answer = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=8)[0].tolist()
            assert answer == case["generated"][1:]  # the original's output starts with a BOS of its own
    torch.testing.assert_close(logits, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_the_name_of_the_folder_decides_nothing(golden_world: Path) -> None:
    shutil.copytree("tiny-llava", "some-name")
    _, model, processor, _ = load_pretrained_model("some-name", None, "some-name", device="cpu")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"
    assert processor is not None


def test_an_explicit_dtype_wins(golden_world: Path) -> None:
    _, model, _, _ = load_pretrained_model("tiny-llava", None, "x", device="cpu", torch_dtype=torch.bfloat16)
    assert model.dtype == model.get_vision_tower().dtype == torch.bfloat16


def test_a_projector_alone_asks_for_its_base(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    with pytest.raises(ValueError, match="--model-base"):
        load_pretrained_model("stage1", None, get_model_name_from_path("stage1"), device="cpu")


def test_a_missing_folder_is_named(golden_world: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint at no-such-folder"):
        load_pretrained_model("no-such-folder", None, "x", device="cpu")


def test_missing_and_unexpected_weights_are_named(golden_world: Path) -> None:
    weights = load_file("tiny-llava/model.safetensors")
    weights["model.surprise"] = weights.pop("model.mm_projector.2.bias")
    save_file(weights, "tiny-llava/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.mm_projector\.2\.bias.*model\.surprise"):
        load_pretrained_model("tiny-llava", None, "x", device="cpu")


def test_a_projector_of_another_width_names_both_shapes(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    state = torch.load("stage1/mm_projector.bin", weights_only=True)
    state["model.mm_projector.0.weight"] = torch.zeros(64, 48)
    torch.save(state, "stage1/mm_projector.bin")
    with pytest.raises(ValueError, match=r"0\.weight: model \(64, 32\), file \(64, 48\)"):
        load_pretrained_model("stage1", "tiny-vicuna", "x", device="cpu")
