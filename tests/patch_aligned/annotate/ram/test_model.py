"""RAM and RAM++ compute what the original classes computed.

They compute it in float64 here. Float32's rounding differs between CPUs, and RAM++'s softmax of 860 times a cosine
magnifies it; so what remains is the rounding of the recording, which is the same everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from patch_aligned.annotate.ram.model import RamModel, config_of, renamed_state


def close_to_recorded(found: Tensor, recorded: Tensor, atol: float) -> None:
    assert_close(found, recorded.double(), rtol=1e-5, atol=atol)


@pytest.mark.golden
def test_ram_equals_the_original_from_pixels_to_logits(ram: RamModel, ram_golden: dict[str, Tensor]) -> None:
    ram, images = ram.double(), ram_golden["input.image"].double()
    tokens = ram.image_tokens(images)
    # Values reach 9 and 21: the bounds are a few units of their last place in float32.
    close_to_recorded(tokens, ram_golden["output.image_embeds"], atol=1e-5)
    close_to_recorded(ram.tag_logits(tokens), ram_golden["output.logits"], atol=2e-5)
    close_to_recorded(ram(images), ram_golden["output.logits"], atol=2e-5)


@pytest.mark.golden
def test_the_encoder_gives_the_mean_token_and_the_patches_of_the_original(
    ram: RamModel, ram_golden: dict[str, Tensor]
) -> None:
    output = ram.double().visual_encoder(ram_golden["input.image"].double())
    tokens = torch.cat([output.pooler_output[:, None], output.last_hidden_state], dim=1)
    close_to_recorded(tokens, ram_golden["output.visual_encoder_out"], atol=1e-5)


@pytest.mark.golden
def test_ram_plus_equals_the_original_from_the_encoders_output_to_logits(
    ram_plus: RamModel, ram_plus_golden: dict[str, Tensor]
) -> None:
    ram_plus = ram_plus.double()
    tokens = ram_plus.image_proj(ram_plus_golden["output.visual_encoder_out"].double())
    close_to_recorded(tokens, ram_plus_golden["output.image_embeds"], atol=1e-5)
    queries = ram_plus.tag_queries(tokens[:, 0])
    # The recorded embeddings have length 60 and the scale is 14: a softmax of 860 times a cosine, so rounding shows.
    close_to_recorded(queries.hidden, ram_plus_golden["output.wordvec_proj_out"].relu(), atol=5e-4)
    close_to_recorded(ram_plus.tag_logits(tokens, queries), ram_plus_golden["output.logits"], atol=2e-4)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["ram", "ram_plus"])
def test_the_mapping_covers_the_full_models_exactly(kind: str, ram_goldens: Path) -> None:
    shapes = json.loads((ram_goldens / f"official_keys_{kind}_swin_large_384.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
        config = config_of(published)
        model = RamModel(config)
    assert (config.kind, config.num_tags, config.descriptions_per_tag) == (kind, 4585, 1 if kind == "ram" else 51)
    assert (config.image_size, config.window_size, config.depths) == (384, 12, (2, 2, 18, 2))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed_state(published).items()} == expected


def test_a_batch_gives_what_its_images_give_alone(model: RamModel, golden: dict[str, Tensor]) -> None:
    model, images = model.double(), golden["input.image"].double()
    alone = torch.cat([model(image[None]) for image in images])
    assert_close(model(images), alone, rtol=1e-9, atol=1e-9)


def test_queries_computed_once_give_the_same_logits(ram: RamModel, ram_golden: dict[str, Tensor]) -> None:
    images = ram_golden["input.image"]
    assert_close(ram(images, ram.tag_queries()), ram(images), rtol=0, atol=0)


def test_queries_of_ram_plus_follow_from_the_image(ram_plus: RamModel) -> None:
    first, second = ram_plus.tag_queries(torch.eye(2, 512)).hidden
    assert not torch.allclose(first, second)


def test_a_tags_logit_does_not_depend_on_the_other_tags(model: RamModel, golden: dict[str, Tensor]) -> None:
    model, images = model.double(), golden["input.image"].double()
    tags = [6, 1]
    state = model.state_dict()
    sizes = (model.config.num_tags, model.config.descriptions_per_tag)
    state["label_embed"] = state["label_embed"].unflatten(0, sizes)[tags].flatten(0, 1)
    fewer = RamModel(type(model.config)(**{**vars(model.config), "num_tags": len(tags)}))
    fewer.double().load_state_dict(state)
    assert_close(fewer.eval()(images), model(images)[:, tags], rtol=1e-9, atol=1e-9)


def test_descriptions_are_mixed_by_their_likeness_to_the_image(ram_plus: RamModel) -> None:
    ram_plus = ram_plus.double()
    ram_plus.label_embed.data /= 60
    mean_token = torch.linspace(-1, 1, 512, dtype=torch.float64)
    mixed = []
    for tag in range(ram_plus.config.num_tags):
        descriptions = ram_plus.label_embed[51 * tag : 51 * (tag + 1)]
        likeness = torch.stack([mean_token @ row for row in descriptions]) / mean_token.norm()
        weights = (likeness * ram_plus.reweight_scale.exp()).softmax(dim=0)
        mixed.append(sum(weight * row for weight, row in zip(weights, descriptions, strict=True)))
    expected = F.relu(ram_plus.wordvec_proj(torch.stack(mixed)))
    assert_close(ram_plus.tag_queries(mean_token[None]).hidden[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("windows", "image_size"), [(None, 96), (64, 96), (256, 192)])
def test_the_image_size_is_read_off_the_masked_windows(
    ram_golden: dict[str, Tensor], windows: int | None, image_size: int
) -> None:
    state = {name.removeprefix("state."): tensor for name, tensor in ram_golden.items()}
    if windows is not None:
        state["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(windows, 9, 9)
    assert config_of(state).image_size == image_size


def test_tensors_of_another_model_are_refused_by_name(ram_plus_golden: dict[str, Tensor]) -> None:
    state = {name.removeprefix("state."): tensor for name, tensor in ram_plus_golden.items()}
    with pytest.raises(ValueError, match="no layers of a tag decoder"):
        config_of({name: tensor for name, tensor in state.items() if "tagging_head" not in name})
    with pytest.raises(ValueError, match=r"label_embed: found 407 rows, expected a multiple of 51"):
        config_of({**state, "label_embed": state["label_embed"][1:]})
    with pytest.raises(ValueError, match=r"wordvec_proj\.weight: missing"):
        config_of({name: tensor for name, tensor in state.items() if name != "wordvec_proj.weight"})
