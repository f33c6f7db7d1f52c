"""`load_pretrained_model` on each form of checkpoint, by what is in the folder."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaConfig

from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model, read_config
from tests.folders import set_config


@pytest.mark.golden
@pytest.mark.parametrize("form", ["full", "projector_only", "lora", "tiny_llava", "text_base"])
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
            logits = model.double()(input_ids=ids).logits
        else:
            pixels = torch.from_numpy(np.load(goldens / "g_tower.npz")["pixels"])[1:2]
            answer = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=8)[0].tolist()
            assert answer == case["generated"][1:]  # the original's output starts with a BOS of its own
            logits = model.double()(input_ids=ids, images=pixels.double()).logits
    # In float64 what remains is the rounding of the recording, which is the same on every CPU.
    torch.testing.assert_close(logits, torch.from_numpy(expected).double(), rtol=1e-5, atol=1e-5)


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
    for read in (read_config, partial(load_pretrained_model, model_base=None, model_name="x", device="cpu")):
        with pytest.raises(FileNotFoundError, match=r"No checkpoint at no-such-folder: .* There is no such folder"):
            read("no-such-folder")  # it can be no name on the hub, which is not asked for it


def test_a_base_beside_a_whole_model_is_said_to_be_unread(golden_world: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_pretrained_model("tiny-llava", "tiny-vicuna", "x", device="cpu")
    assert "--model-base tiny-vicuna is not read" in caplog.text


def test_a_projector_is_no_base(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    with pytest.raises(ValueError, match="--model-base stage1 holds a projector alone"):
        load_pretrained_model("stage1", "stage1", "x", device="cpu")


# Keys of the published llava-v1.5-7b that transformers does not know, and two that it reads into generation.
PUBLISHED = {
    "freeze_mm_vision_resampler": False,
    "max_length": 4096,
    "mm_resampler_type": None,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "transformers_version": "4.31.0",
}


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_keys_and_names_of_published_checkpoints_do_no_harm(golden_world: Path, model_type: str) -> None:
    ids = torch.tensor([[1, 20, 30, 40]])
    expected = load_pretrained_model("tiny-llava", None, "x", device="cpu").model(input_ids=ids).logits
    set_config("tiny-llava", model_type=model_type, mm_vision_tower=str(Path("tiny-clip").resolve()), **PUBLISHED)
    edit = json.loads(Path("tiny-llava/generation_config.json").read_text()) | {"temperature": 0.9, "top_p": 0.6}
    Path("tiny-llava/generation_config.json").write_text(json.dumps(edit))
    _, model, _, context_len = load_pretrained_model("tiny-llava", None, "x", device="cpu")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"
    assert context_len == 2048
    assert torch.equal(model(input_ids=ids).logits, expected)
    answer = model.generate(ids, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert answer.shape == (1, 3)


def test_the_llava_of_transformers_is_told_apart(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Convert it with llava-convert"):
        load_pretrained_model(str(tmp_path), None, "x", device="cpu")


def test_a_model_type_that_is_not_known_is_named(golden_world: Path) -> None:
    set_config("tiny-llava", model_type="llava_mpt")
    with pytest.raises(ValueError, match="model type `llava_mpt`, which cannot be read"):
        load_pretrained_model("tiny-llava", None, "x", device="cpu")


@pytest.mark.parametrize(("scaling", "factor"), [(None, 1.0), ({"type": "linear", "factor": 4.0}, 4.0)])
def test_rotary_settings_of_old_configs_are_read(golden_world: Path, scaling: Any, factor: float) -> None:
    set_config("tiny-llava", rope_theta=500000.0, rope_scaling=scaling)
    set_config("tiny-vicuna", rope_theta=500000.0, rope_scaling=scaling)
    expected = 500000.0 ** (-torch.arange(0, 16, 2) / 16) / factor  # heads of width 16
    for folder in ("tiny-llava", "tiny-vicuna"):
        _, model, _, _ = load_pretrained_model(folder, None, "x", device="cpu")
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_what_lmms_eval_passes_is_taken_without_cuda(golden_world: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    config = json.loads(Path("tiny-llava/config.json").read_text()) | {"image_aspect_ratio": "square"}
    Path("other.json").write_text(json.dumps(config))
    _, model, _, _ = load_pretrained_model(
        "tiny-llava",
        None,
        "llava",
        device_map="auto",
        multimodal=True,
        attn_implementation="eager",
        customized_config="other.json",
        overwrite_config={"mm_patch_merge_type": "spatial"},
    )
    assert model.device.type == "cpu"
    assert model.dtype == model.get_vision_tower().dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert (model.config.image_aspect_ratio, model.config.mm_patch_merge_type) == ("square", "spatial")


def test_a_dtype_may_be_given_by_name(golden_world: Path) -> None:
    for dtype, expected in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        _, model, _, _ = load_pretrained_model("tiny-llava", None, "x", device="cpu", torch_dtype=dtype)
        assert model.dtype == model.get_vision_tower().dtype == expected
