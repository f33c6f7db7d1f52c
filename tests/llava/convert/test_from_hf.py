"""The way back: a folder of transformers becomes a LLaVA checkpoint, with the same tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava.convert.from_hf import from_hf
from llava.convert.to_hf import to_hf
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.folders import set_config

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def logits_of(folder: str) -> torch.Tensor:
    tokenizer, model, processor, _ = load_pretrained_model(folder, None, folder, device="cpu")
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    images = process_images([Image.open("images/im1.png").convert("RGB")], processor, model.config)
    with torch.no_grad():
        return model(input_ids=ids, images=images).logits


def assert_same_tensors(found: str, expected: str) -> None:
    tensors, others = load_file(found), load_file(expected)
    assert tensors.keys() == others.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]


@pytest.mark.golden
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_a_round_trip_is_bit_equal(aspect_ratio: str, golden_world: Path) -> None:
    set_config("tiny-llava", image_aspect_ratio=aspect_ratio, conversation_version="v1")
    to_hf("tiny-llava", "hf")
    from_hf("hf", "back")
    assert_same_tensors("back/model.safetensors", "tiny-llava/model.safetensors")
    tower = {
        name.removeprefix("vision_model."): tensor for name, tensor in load_file("tiny-clip/model.safetensors").items()
    }
    again = load_file("back/vision_tower/model.safetensors")
    again = {name.removeprefix("vision_model."): tensor for name, tensor in again.items()}
    assert tower.keys() == again.keys()
    assert not [name for name in tower if not torch.equal(tower[name], again[name])]

    before, after = AutoConfig.from_pretrained("tiny-llava").to_dict(), AutoConfig.from_pretrained("back").to_dict()
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert differing <= {"mm_vision_tower", "_name_or_path", "transformers_version"}
    assert AutoTokenizer.from_pretrained("back").get_vocab() == AutoTokenizer.from_pretrained("tiny-llava").get_vocab()
    assert torch.equal(logits_of("back"), logits_of("tiny-llava"))


def a_published_folder(goldens_folder: str) -> str:
    """Like llava-hf/llava-1.5-7b-hf: no trace of the original, a `<pad>` after `<image>`, images cropped."""
    to_hf(goldens_folder, "published")
    Path("published/llava_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained("published")
    tokenizer.add_tokens([AddedToken("<pad>", special=True, normalized=False)])
    tokenizer.pad_token = "<pad>"
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained("published")
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path("published") / name
        path.write_text(path.read_text().replace('"do_pad": true', '"do_pad": false'))
    return "published"


@pytest.mark.golden
def test_a_folder_that_was_not_written_here_is_read_by_its_config(golden_world: Path) -> None:
    from_hf(a_published_folder("tiny-llava"), "back", image_aspect_ratio="pad", conv_mode="v1")
    assert_same_tensors("back/model.safetensors", "tiny-llava/model.safetensors")
    config = json.loads(Path("back/config.json").read_text())
    assert config["vocab_size"] == 1000
    assert config["conversation_version"] == "v1"
    assert config["mm_vision_select_layer"] == -2
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained("back")
    assert len(tokenizer) == 1000
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.padding_side == "right"
    assert torch.equal(logits_of("back"), logits_of("tiny-llava"))


def test_without_a_word_images_are_treated_as_the_folder_does(golden_world: Path) -> None:
    from_hf(a_published_folder("tiny-llava"), "back")
    assert json.loads(Path("back/config.json").read_text())["image_aspect_ratio"] == "square"


def test_a_folder_that_transformers_saved_itself_is_read(golden_world: Path) -> None:
    to_hf("tiny-llava", "hf")
    LlavaForConditionalGeneration.from_pretrained("hf").save_pretrained("saved")
    AutoProcessor.from_pretrained("hf").save_pretrained("saved")
    from_hf("saved", "back")
    assert_same_tensors("back/model.safetensors", "tiny-llava/model.safetensors")


def test_a_moved_checkpoint_finds_the_tower_in_its_folder(golden_world: Path) -> None:
    to_hf("tiny-llava", "hf")
    from_hf("hf", "back")
    shutil.rmtree("tiny-clip")
    Path("elsewhere").mkdir()
    Path("back").rename("elsewhere/moved")
    _, model, _, _ = load_pretrained_model("elsewhere/moved", None, "x", device="cpu")
    assert model.get_vision_tower().vision_tower_name == "elsewhere/moved/vision_tower"
    to_hf("elsewhere/moved", "again")
    assert_same_tensors("again/model.safetensors", "hf/model.safetensors")


def test_the_tower_is_named_where_its_weights_are_the_same(golden_world: Path) -> None:
    to_hf("tiny-llava", "hf")
    from_hf("hf", "back", vision_tower="tiny-clip")
    assert json.loads(Path("back/config.json").read_text())["mm_vision_tower"] == "tiny-clip"
    assert not Path("back/vision_tower").exists()


def test_a_tower_with_other_weights_is_not_named(golden_world: Path) -> None:
    to_hf("tiny-llava", "hf")
    shutil.copytree("tiny-clip", "other-clip")
    weights = load_file("other-clip/model.safetensors")
    changed = next(name for name in weights if "layers.0.mlp.fc1.weight" in name)
    weights[changed] = weights[changed] + 1
    save_file(weights, "other-clip/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other-clip: its encoder\.layers\.0\.mlp\.fc1\.weight is not that"):
        from_hf("hf", "back", vision_tower="other-clip")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer is 'list'"),
        ({"model_type": "llava_next"}, "model_type is `llava_next`"),
    ],
)
def test_what_llava_has_no_counterpart_for_is_refused_by_name(
    values: dict[str, Any], message: str, golden_world: Path
) -> None:
    to_hf("tiny-llava", "hf")
    set_config("hf", **values)
    with pytest.raises(ValueError, match=message):
        from_hf("hf", "back")
    assert not Path("back").exists()


def test_a_llava_checkpoint_is_not_taken_for_a_folder_of_transformers(golden_world: Path) -> None:
    with pytest.raises(ValueError, match="model_type is `llava_llama`, expected `llava`"):
        from_hf("tiny-llava", "back")
