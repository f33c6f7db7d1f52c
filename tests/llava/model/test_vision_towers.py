"""Every kind of vision tower: which features are taken, which image they come from, and whether they are trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from tests.folders import save_tower, set_config

# kind -> side of the image, patches along a side, tokens before the patches
KINDS = {
    "clip": (56, 4, 1),
    "siglip": (48, 3, 0),
    "dinov2": (56, 4, 1),
    "dinov2_with_registers": (56, 4, 5),
    "dinov3": (64, 4, 5),
}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., VisionTower]:
    def build(kind: str, layer: int = -2, feature: str = "patch") -> VisionTower:
        settings = {"mm_vision_select_layer": layer, "mm_vision_select_feature": feature}
        return build_vision_tower(SimpleNamespace(mm_vision_tower=save_tower(kind, tmp_path / kind), **settings))

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_layer(kind: str, build: Callable[..., VisionTower]) -> None:
    side, per_side, front = KINDS[kind]
    tower = build(kind)
    assert (tower.image_side, tower.num_patches_per_side, tower.num_patches) == (side, per_side, per_side**2)
    assert (tower.tokens_in_front, tower.hidden_size) == (front, 32)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        hidden = tower.vision_tower(images, output_hidden_states=True).hidden_states
    assert len(hidden) == 4  # the embeddings and three layers
    assert torch.equal(tower(images), hidden[2][:, front:])
    assert tower(images).shape == (2, per_side**2, 32)
    assert tower(list(images))[1].shape == (1, per_side**2, 32)
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_feature_belongs_to_its_patch(kind: str, build: Callable[..., VisionTower]) -> None:
    """Before the first layer no patch knows of another: a patch of the image changes its own feature alone."""
    side, per_side, _ = KINDS[kind]
    tower, image = build(kind, layer=0), torch.randn(1, 3, side, side)
    plain, patch = tower(image), tower.config.patch_size
    for place in range(per_side**2):
        row, col = divmod(place, per_side)
        changed = image.clone()
        changed[..., row * patch : (row + 1) * patch, col * patch : (col + 1) * patch] += 1
        different = (tower(changed) != plain).any(dim=-1)[0]
        assert different.nonzero().flatten().tolist() == [place]
    beyond = image.clone()
    beyond[..., tower.seen_side :] += 1
    beyond[..., tower.seen_side :, :] += 1
    assert torch.equal(tower(beyond), plain)
    assert side - tower.seen_side == (6 if kind == "siglip" else 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "siglip"])
def test_cls_patch_keeps_cls_and_drops_registers(kind: str, build: Callable[..., VisionTower]) -> None:
    side, per_side, _ = KINDS[kind]
    image = torch.randn(1, 3, side, side)
    tower = build(kind, feature="cls_patch")
    with torch.no_grad():
        hidden = tower.vision_tower(image, output_hidden_states=True).hidden_states[-2]
    features = tower(image)
    assert features.shape == (1, 1 + per_side**2, 32)
    assert torch.equal(features[:, 0], hidden[:, 0])
    tower.select_feature = "patch"
    assert torch.equal(features[:, 1:], tower(image))


def test_siglip_has_no_cls_to_keep(build: Callable[..., VisionTower]) -> None:
    with pytest.raises(ValueError, match=r"cls_patch, but .*siglip has no CLS token"):
        build("siglip", feature="cls_patch")


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_stays_in_evaluation_mode(kind: str, build: Callable[..., VisionTower]) -> None:
    """DINOv3 stretches its positions at random in training mode."""
    side = KINDS[kind][0]
    tower, image = build(kind).train(), torch.randn(1, 3, side, side)
    assert not tower.vision_tower.training
    assert torch.equal(tower(image), tower(image)) and not tower(image).requires_grad
    tower.requires_grad_(True)
    assert tower.train().vision_tower.training
    assert not tower.eval().vision_tower.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_reaches_a_tower_that_is_trained(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlavaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model: Any = LlavaLlamaForCausalLM(config)
    flags = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
    model.get_model().initialize_vision_modules(
        SimpleNamespace(vision_tower=save_tower(kind, tmp_path / kind), **flags)
    )
    tower = model.get_vision_tower().requires_grad_(True)
    side, per_side, _ = KINDS[kind]
    assert model.visual_grid == (per_side, per_side)
    ids = torch.tensor([[1, -200, 5, 6]])
    model.train()(input_ids=ids, labels=ids.clamp(min=-100), images=torch.randn(1, 3, side, side)).loss.backward()
    untouched = [name for name, weight in tower.named_parameters() if weight.grad is None or not weight.grad.any()]
    # What comes after the selected layer learns nothing, and nothing is masked.
    after = ("layers.2.", "layer.2.", "norm", "head", "mask_token", "k_proj.bias", "key.bias")
    assert not [name for name in untouched if not any(part in name for part in after)]


def test_a_whole_siglip_gives_its_vision_half(tmp_path: Path) -> None:
    vision = build_vision_tower(
        SimpleNamespace(mm_vision_tower=save_tower("siglip", tmp_path / "vision"), mm_vision_select_layer=-2)
    )
    text = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "bos_token_id": 0}
    text |= {"num_attention_heads": 2, "eos_token_id": 1}
    whole: Any = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict(), text_config=text))
    whole.vision_model.load_state_dict(vision.vision_tower.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    vision.image_processor.save_pretrained(tmp_path / "whole")
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tmp_path / "whole"), mm_vision_select_layer=-2))
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(tower(image), vision(image))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_weights_of_a_checkpoint_find_their_places_under_old_and_new_names(
    kind: str, build: Callable[..., VisionTower]
) -> None:
    tower = build(kind)
    name = next(iter(tower.state_dict()))
    stored = tower.checkpoint_name(f"model.vision_tower.{name}")
    assert stored == f"model.vision_tower.{name}".replace("tower.vision_tower.", "tower.vision_tower.vision_model.")
    assert tower.checkpoint_name(stored) == stored
    state = {key: value + 1 for key, value in tower.state_dict().items()}
    tower.load_state_dict({key.replace("vision_tower.", "vision_tower.vision_model.", 1): state[key] for key in state})
    assert torch.equal(tower.state_dict()[name], state[name])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("siglip2_vision_model", "naflex"),
        ("siglip2", "naflex"),
        ("dinov3_convnext", "convolutional"),
        ("vit", "of model type `vit`"),
    ],
)
def test_encoders_that_do_not_fit_are_refused_by_name(model_type: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=message):
        build_vision_tower(SimpleNamespace(mm_vision_tower=str(tmp_path), mm_vision_select_layer=-2))


def test_dinov3_says_that_it_needs_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    with pytest.raises(ImportError, match=r"needs torchvision.*pip install 'patch-aligned-llava\[dinov3\]'"):
        build_vision_tower(SimpleNamespace(mm_vision_tower=str(tmp_path), mm_vision_select_layer=-2))


def test_several_scales_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "mm_vision_tower": save_tower("clip", tmp_path),
        "mm_vision_select_layer": -2,
        "s2": True,
    }
    with pytest.raises(ValueError, match="several scales"):
        build_vision_tower(SimpleNamespace(**settings))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_image_processor_of_another_side_is_refused(kind: str, tmp_path: Path) -> None:
    folder = Path(save_tower(kind, tmp_path))
    set_config(folder, image_size=70)
    with pytest.raises(ValueError, match=r"gives \d+ pixels .* has positions for 70"):
        build_vision_tower(SimpleNamespace(mm_vision_tower=str(folder), mm_vision_select_layer=-2), delay_load=True)
