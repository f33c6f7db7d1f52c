"""Each family gives the visual tokens that transformers' own model computes, and knows where its pixels land."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from llava.convert.to_hf import to_hf
from patch_aligned.masks import token_coverage_of_regions
from patch_aligned.models.load import load_models
from patch_aligned.models.transformers import family_of, load_family

SIDE, PATCH, WORDS = 32, 8, 1000
TEXT = {
    "vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUARE = {"height": SIDE, "width": SIDE}
TILES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def configured(family: str) -> tuple[Any, Any]:
    """Config and image processor of a tiny model."""
    text = LlamaConfig(**TEXT)
    if family.startswith("llava"):
        parts = {"vision_config": CLIPVisionConfig(**VISION), "text_config": text, "vision_feature_layer": -2}
        if family == "llava_next":
            pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
            config = LlavaNextConfig(**parts, image_grid_pinpoints=pinpoints)
            return config, LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=pinpoints)
        if family == "llava, padded":
            return LlavaConfig(**parts | {"vision_feature_layer": [-2, -1]}), LlavaImageProcessorPil(
                **CROP, do_pad=True
            )
        if family == "llava, DINOv2":  # its config keeps the side of its own training; the processor decides
            vision = Dinov2Config(**VISION | {"image_size": 5 * PATCH})
            return LlavaConfig(**parts | {"vision_config": vision}), CLIPImageProcessorPil(**CROP)
        return LlavaConfig(**parts), CLIPImageProcessorPil(**CROP)
    if family == "paligemma":
        vision = SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=TEXT["hidden_size"])
        text = GemmaConfig(**TEXT)
        config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=TEXT["hidden_size"])
        return config, SiglipImageProcessorPil(size=SQUARE)
    if family == "idefics3":
        config = Idefics3Config(vision_config=Idefics3VisionConfig(**VISION), text_config=text, scale_factor=2)
        return config, Idefics3ImageProcessorPil(**TILES)
    config = SmolVLMConfig(vision_config=SmolVLMVisionConfig(**VISION), text_config=text, scale_factor=2)
    return config, SmolVLMImageProcessorPil(**TILES)


FAMILIES = ("llava", "llava, padded", "llava, DINOv2", "llava_next", "paligemma", "idefics3", "smolvlm")


@pytest.fixture
def saved(golden_world: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    def save(family: str) -> tuple[Path, Any]:
        config, processor = configured(family)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        path = tmp_path / "model"
        model.save_pretrained(path)
        processor.save_pretrained(path)
        AutoTokenizer.from_pretrained("tiny-vicuna").save_pretrained(path)
        return path, model

    return save


def own_tokens(model: Any, family: str, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens of the model's own method, `[T, D]`."""
    if family == "llava_next":  # packs tiles on its own way: the base alone, through its projector
        model = model.model
        hidden = model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
        return model.multi_modal_projector(hidden)[0]
    batch = pixels[None, None] if family in ("idefics3", "smolvlm") else pixels[None]
    features = model.model.get_image_features(batch, return_dict=True).pooler_output
    return features[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_words_are_those_of_the_whole_model(saved: Callable, family: str):
    path, model = saved(family)
    assert family_of(path) is not None
    tiny = load_family("tiny", path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, 50, 3), dtype=np.uint8))
    pixels = tiny.inputs([image])
    assert pixels.shape == (1, 3, SIDE, SIDE)
    features = tiny.features(pixels)
    tokens = tiny.visual_tokens(features)
    assert features.shape == (1, 16, tiny.encoder.width)
    assert tiny.shape == ((2, 2) if family in ("idefics3", "smolvlm") else (4, 4))
    assert tiny.layouts([image.size])[0].length == tokens.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(tokens[0], own_tokens(model, family, pixels[0]), rtol=1e-5, atol=1e-6)
    assert torch.equal(tiny.words.table, model.get_input_embeddings().weight)
    for module in tiny.projector_modules:
        assert type(model.get_submodule(module)) is type(tiny.projector)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_marked_place_lands_where_the_cells_say(saved: Callable, family: str):
    """A bright block on black, drawn in the original, must show in the pixels of the cells that it covers."""
    path, _ = saved(family)
    encoder = load_family("tiny", path).encoder
    mask = np.zeros((40, 72))
    mask[10:26, 30:50] = 1
    image = Image.fromarray(np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2))
    processor = encoder.image_processor
    shown = encoder.inputs([image])[0, 0].double().numpy() * processor.image_std[0] + processor.image_mean[0]
    [grid] = encoder.layout(image.size, (SIDE, SIDE)).grids  # a cell for each pixel that the tower sees
    rle_mask = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    expected = token_coverage_of_regions([rle_mask], image.size, grid)[0]  # [side, side]
    inside, outside = shown[expected > 0.99], shown[expected < 0.01]
    if family == "llava, padded":
        outside = outside[outside < 0.4]  # the margin has the mean colour
    how = {"llava": "square", "llava, DINOv2": "square", "llava, padded": "pad"}
    assert encoder.image_aspect_ratio == how.get(family, "squeeze")
    assert inside.mean() > 0.9
    assert outside.mean() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_reads_the_patches_of_its_own_cell(saved: Callable, family: str):
    """Idefics3's connector joins blocks of patches: a changed patch changes the token over it and no other."""
    path, _ = saved(family)
    model = load_family("tiny", path)
    features = torch.randn(1, 16, model.encoder.width)
    tokens, (rows, cols) = model.visual_tokens(features), model.shape
    for patch in range(16):
        changed = features.clone()
        changed[:, patch] += 1
        differs = (model.visual_tokens(changed) != tokens).any(dim=-1)[0]  # [T]
        row, col = divmod(patch, 4)
        assert differs.nonzero().flatten().tolist() == [row * rows // 4 * cols + col * cols // 4]


@pytest.mark.golden
def test_a_converted_checkpoint_gives_the_recorded_tokens(golden_world: Path, goldens: Path, tmp_path: Path):
    golden = np.load(goldens / "g_tower.npz")
    model = load_family("converted", to_hf("tiny-llava", tmp_path / "converted", dtype="float32"))
    pixels = model.inputs([Image.open(golden_world / "images" / f"im{index}.png") for index in range(4)])
    tokens = model.visual_tokens(model.features(pixels))
    assert model.shape == (4, 4)
    np.testing.assert_allclose(tokens, golden["encode_images"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "paligemma", "smolvlm"])
def test_an_untrained_twin_has_the_shape_and_other_weights(saved: Callable, family: str):
    path, _ = saved(family)
    model = load_family("tiny", path)
    twin, again = model.untrained(3), model.untrained(3)
    shapes = [{name: weight.shape for name, weight in p.projector.state_dict().items()} for p in (model, twin)]
    assert shapes[0] == shapes[1]
    weights = [next(p.projector.parameters()) for p in (model, twin, again)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_the_layers_of_the_llm_are_not_built(saved: Callable):
    encoder: Any = load_family("tiny", saved("llava")[0]).encoder
    assert not [name for name, _ in encoder.model.named_parameters() if "language_model.layers" in name]


def test_a_checkpoint_without_projector_is_named(saved: Callable):
    path, _ = saved("llava")
    file = path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "multi_modal_projector" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 4 weights of a llava, such as 'multi_modal_projector"):
        load_family("tiny", path)


def test_embeddings_that_are_shorter_than_the_tokenizer_are_named(saved: Callable):
    path, model = saved("llava")
    model.resize_token_embeddings(900)
    model.save_pretrained(path)
    with pytest.raises(ValueError, match=r"ids up to 999.*has 900 rows"):
        load_family("tiny", path)


def test_llavas_own_folders_are_of_no_family_and_other_models_are_refused_by_type(golden_world: Path, tmp_path: Path):
    assert family_of(golden_world / "tiny-llava") is None  # LLaVA's own
    assert family_of(golden_world / "images") is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "text_config": {}}))
    with pytest.raises(ValueError, match=r"'qwen2_vl'; expected one of llava, llava_next, paligemma"):
        load_models([f"x={tmp_path / 'other'}"])
