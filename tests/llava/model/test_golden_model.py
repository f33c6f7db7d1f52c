"""Tower, projector, merge, logits, loss and generation against outputs recorded from the original LLaVA."""

from __future__ import annotations

import json
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava.model import LlavaLlamaForCausalLM
from llava.model.multimodal_projector.builder import build_vision_projector

pytestmark = pytest.mark.golden


def load(**overrides: Any) -> LlavaLlamaForCausalLM:
    model = LlavaLlamaForCausalLM.from_pretrained("tiny-llava", dtype=torch.float32)
    model.get_vision_tower().load_model()
    for key, value in overrides.items():
        setattr(model.config, key, value)
    return model.eval()


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected).double(), rtol=tolerance, atol=tolerance)


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values as they were recorded with: normals seeded by the name's checksum, scaled by the shape."""
    normals = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    scale = 0.05 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy((scale * normals).astype(np.float32))


@pytest.fixture
def recorded(goldens: Path) -> Any:
    return lambda name: dict(np.load(goldens / name))


@pytest.fixture
def model(golden_world: Path) -> LlavaLlamaForCausalLM:
    return load()


@pytest.fixture
def pixels(goldens: Path) -> Tensor:
    """The seven golden images as the `pad` preprocessing gives them."""
    images = np.load(goldens / "g_images.npz")
    return torch.stack([torch.from_numpy(images[f"pad/{i}"]) for i in range(7)])


def test_tower_reports_the_recorded_properties(model: LlavaLlamaForCausalLM, goldens: Path) -> None:
    tower = model.get_vision_tower()
    expected = json.loads((goldens / "g_tower.json").read_text())
    assert tower.num_patches == expected["num_patches"]
    assert tower.num_patches_per_side == expected["num_patches_per_side"]
    assert tower.hidden_size == expected["hidden_size"]
    assert list(tower.dummy_feature.shape) == expected["dummy_feature"]
    assert tower.vision_tower_name == expected["name"]
    assert not any(p.requires_grad for p in tower.parameters())


def test_tower_features_for_every_layer_and_selection(model: LlavaLlamaForCausalLM, recorded: Any) -> None:
    golden = recorded("g_tower.npz")
    pixels = torch.from_numpy(golden["pixels"])
    tower = model.get_vision_tower()
    close(tower(pixels), golden["tower/patch_-2"])
    close(tower([pixels[0], pixels[1]])[0], golden["tower/list_input0"])
    for layer in (-1, -2, 1):
        for feature in ("patch", "cls_patch"):
            tower.select_layer, tower.select_feature = layer, feature
            close(tower(pixels[:1]), golden[f"tower/select/{feature}/{layer}"])


def test_encode_images(model: LlavaLlamaForCausalLM, recorded: Any) -> None:
    golden = recorded("g_tower.npz")
    close(model.encode_images(torch.from_numpy(golden["pixels"])), golden["encode_images"])


@pytest.mark.parametrize("projector_type", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_projector_keys(projector_type: str, goldens: Path) -> None:
    config = types.SimpleNamespace(mm_projector_type=projector_type, mm_hidden_size=32, hidden_size=64)
    projector = build_vision_projector(config)
    expected = json.loads((goldens / "g_projectors.json").read_text())[projector_type]["state_dict"]
    assert {name: list(t.shape) for name, t in projector.state_dict().items()} == expected


@pytest.mark.parametrize("projector_type", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_projector_outputs(projector_type: str, goldens: Path) -> None:
    config = types.SimpleNamespace(mm_projector_type=projector_type, mm_hidden_size=32, hidden_size=64)
    projector = build_vision_projector(config)
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            parameter.copy_(fill(f"model.mm_projector.{name}", tuple(parameter.shape)))
        close(projector(fill("x", (2, 16, 32))), np.load(goldens / f"g_proj_{projector_type}.npy"))


def test_projector_classes_of_a_missing_type_and_of_no_layers(goldens: Path) -> None:
    recorded = json.loads((goldens / "g_projectors.json").read_text())
    config = types.SimpleNamespace(mm_hidden_size=32, hidden_size=64)
    assert type(build_vision_projector(config)).__name__ == recorded["default_when_missing"]
    config.mm_projector_type = "mlp0x_gelu"
    assert type(build_vision_projector(config)).__name__ == recorded["mlp0x_gelu"]


def test_unknown_projector_types_are_refused_by_name() -> None:
    for name in ("mlp2x_silu", "foo"):
        with pytest.raises(ValueError, match=f"Unknown projector type: {name}"):
            build_vision_projector(types.SimpleNamespace(mm_projector_type=name, mm_hidden_size=32, hidden_size=64))


PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
CASES = json.loads((Path(__file__).parents[2] / "goldens" / "llava" / "g_prepare.json").read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_merge_of_text_and_images(name: str, golden_world: Path, goldens: Path, pixels: Tensor, recorded: Any) -> None:
    case, golden = CASES[name]["case"], recorded("g_prepare.npz")
    merge_type = name.split("_", 1)[1] if name.startswith(("anyres", "single")) else None
    model = load()
    for key, value in {"tokenizer_padding_side": "right", "tokenizer_model_max_length": 2048, **case["cfg"]}.items():
        setattr(model.config, key, value)
    images: Any
    if merge_type is not None:
        model.config.mm_patch_merge_type = merge_type
        model.config.image_aspect_ratio, model.config.image_grid_pinpoints = "anyres", PINPOINTS
        if "unpad" in merge_type:
            model.model.image_newline = torch.nn.Parameter(fill("model.image_newline", (64,)))
        tiles = np.load(goldens / "g_images.npz")
        images = [torch.from_numpy(tiles[f"anyres/{i}"]) if name.startswith("anyres") else pixels[i] for i in (1, 4)]
    elif isinstance(case["imgs"][0], list):
        images = torch.stack([pixels[group] for group in case["imgs"]])
    else:
        images = pixels[case["imgs"]]
        images = list(images) if case.get("as_list") else images

    ids, mask = torch.from_numpy(golden[f"{name}/in_ids"]), torch.from_numpy(golden[f"{name}/in_mask"])
    labels = torch.from_numpy(golden[f"{name}/in_labels"]) if f"{name}/in_labels" in golden else None
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1) if case.get("pos") else None
    with torch.no_grad():
        result = model.prepare_inputs_labels_for_multimodal(
            ids, positions, None if case.get("nomask") else mask, None, labels, images, image_sizes=case.get("sizes")
        )
    for key, value in zip(
        ("input_ids", "position_ids", "attention_mask", "past", "embeds", "labels"), result, strict=True
    ):
        assert (value is None) == (key in CASES[name]["none"]), key
        if value is not None:
            assert str(value.dtype) == CASES[name]["dtypes"][key]
            close(value, golden[f"{name}/{key}"])


@pytest.mark.parametrize("name", ["mixed_right", "mixed_left", "truncated_20_right", "text_only_batch"])
def test_logits_and_loss(name: str, model: LlavaLlamaForCausalLM, pixels: Tensor, recorded: Any) -> None:
    golden, inputs, case = recorded("g_forward.npz"), recorded("g_prepare.npz"), CASES[name]["case"]
    for key, value in {"tokenizer_padding_side": "right", "tokenizer_model_max_length": 2048, **case["cfg"]}.items():
        setattr(model.config, key, value)
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(inputs[f"{name}/in_ids"]),
            attention_mask=torch.from_numpy(inputs[f"{name}/in_mask"]),
            labels=torch.from_numpy(inputs[f"{name}/in_labels"]),
            images=pixels[case["imgs"]],
        )
    assert list(output.logits.shape) == golden[f"{name}/shape"].tolist()
    close(output.loss, golden[f"{name}/loss"])
    at_tokens = inputs[f"{name}/attention_mask"]  # what stands at padding is never read
    close(output.logits.sum(-1)[at_tokens], golden[f"{name}/logits_sum"][at_tokens], 2e-4)  # a sum of 1,000 logits
    close(output.logits.amax(-1)[at_tokens], golden[f"{name}/logits_max"][at_tokens])
    assert (output.logits.argmax(-1).numpy() == golden[f"{name}/argmax"])[at_tokens].all()


def test_full_logits(model: LlavaLlamaForCausalLM, pixels: Tensor, recorded: Any) -> None:
    golden = recorded("g_forward.npz")
    ids, mask = torch.from_numpy(golden["full_logits/in_ids"]), torch.from_numpy(golden["full_logits/in_mask"])
    with torch.no_grad():  # in float64, so that what remains is the rounding of the recording, the same on every CPU
        logits = model.double()(input_ids=ids, attention_mask=mask, images=pixels[:2].double()).logits
    length = torch.from_numpy(golden["full_logits/in_mask"]).sum(1) + 15  # 16 visual tokens in the place of one id
    for row in range(2):  # what stands at padding is never read
        close(logits[row, : length[row]], golden["full_logits"][row, : length[row]])


@pytest.mark.parametrize("index", range(5))
def test_greedy_and_beam_generation(index: int, model: LlavaLlamaForCausalLM, pixels: Tensor, goldens: Path) -> None:
    case = json.loads((goldens / "g_generate.json").read_text())[index]
    images = None if case["image"] is None else pixels[case["image"]][None]
    ids = torch.tensor([case["input_ids"]])
    greedy = model.generate(ids, images=images, do_sample=False, max_new_tokens=16)
    assert greedy[0].tolist() == case["output_ids"][1:]  # the original's output starts with a BOS of its own
    beam = model.generate(ids, images=images, do_sample=False, num_beams=3, max_new_tokens=8)
    assert beam[0].tolist() == case["beam3_8"][1:]


def test_manual_stage_1_losses_and_gradients(golden_world: Path, recorded: Any) -> None:
    golden = recorded("g_stage1_manual.npz")
    model = load().train()
    model.requires_grad_(False)
    projector = model.get_model().mm_projector.requires_grad_(True)
    batch = {
        key: torch.from_numpy(golden[f"batch/{key}"]) for key in ("input_ids", "labels", "attention_mask", "images")
    }
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(5):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in projector.named_parameters():
                close(parameter.grad, golden[f"grad0/{name}"])
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
    for name, parameter in projector.named_parameters():
        # AdamW's early steps divide by tiny gradients, which magnifies rounding.
        close(parameter, golden[f"final/model.mm_projector.{name}"], 1e-4)
