"""Every family gives the visual tokens of the whole model without its LLM, and random projectors beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.convert.to_hf import to_hf
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.load import load_models
from patch_aligned.models.tokens import PROJECTORS, image_inputs, visual_tokens
from patch_aligned.models.transformers import is_of_transformers, load_transformers
from tests.patch_aligned.models.families import FAMILIES, save_tiny

ONE_OF_EACH = [name for name in FAMILIES if "," not in name]


def noise(size_wh: tuple[int, int] = (300, 200)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    def save(name: str) -> tuple[Path, Any]:
        if not FAMILIES[name].is_installed:
            pytest.skip(f"needs transformers >= {FAMILIES[name].since}")
        return tmp_path / "model", save_tiny(name, tmp_path / "model")

    return save


def lose_the_llm(folder: Path, model: Any) -> None:
    """Shard a checkpoint into tower, projector and words, and a second shard that is not there: the LLM's layers."""
    embedding = model.get_input_embeddings()
    words = {id(weight) for weight in embedding.parameters()}
    layers = [weight for weight in model.get_decoder().parameters() if id(weight) not in words]
    tensors = load_file(folder / "model.safetensors")
    lost = {
        name
        for name, tensor in tensors.items()
        if any(tensor.shape == weight.shape and torch.equal(tensor, weight) for weight in layers)
    }
    assert lost
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file({name: tensors[name] for name in tensors.keys() - lost}, folder / first, metadata={"format": "pt"})
    index = {name: second if name in lost else first for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


def tokens_of(model: VisionLanguageModel, image: Image.Image) -> torch.Tensor:
    [tokens] = model.visual_tokens(model.encode([image]))
    return tokens


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tokens_and_words_are_those_of_the_whole_model_where_the_llms_shard_is_missing(saved: Callable, name: str):
    path, whole = saved(name)
    lose_the_llm(path, whole)
    assert is_of_transformers(str(path))
    tiny = load_transformers("tiny", str(path))
    encoder: Any = tiny.encoder
    expected = visual_tokens(whole, image_inputs(encoder.processor, [[noise()]]))
    encoded = tiny.encode([noise()])
    [tokens] = tiny.visual_tokens(encoded)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
    assert tiny.layout((300, 200), tokens).length == len(tokens)
    assert encoded.features.ndim == 2
    assert encoded.features.isfinite().all()
    table = torch.cat(list(whole.get_input_embeddings().parameters()))
    assert torch.equal(tiny.words.table, table)

    # Random projectors share the tower's features, and leave the trained one alone.
    twins = [tiny.untrained(seed) for seed in (3, 3, 4)]
    [first], [again], [other] = (twin.visual_tokens(encoded) for twin in twins)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.any(dim=-1).all()
    assert torch.equal(tiny.visual_tokens(encoded)[0], tokens)
    alone: Any = twins[0].projector
    torch.testing.assert_close(first, visual_tokens(alone.model, image_inputs(encoder.processor, [[noise()]])))


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_an_untrained_twin_differs_in_the_projector_alone(saved: Callable, name: str):
    tiny = load_transformers("tiny", str(saved(name)[0]))
    trained: Any = tiny.projector
    twin: Any = tiny.untrained(0).projector
    differing = {
        name
        for (name, weight), other in zip(trained.model.named_parameters(), twin.model.parameters(), strict=True)
        if weight is not other
    }
    own = PROJECTORS[trained.model.config.model_type]
    assert differing
    assert {part for part in own if any(name == part or name.startswith(f"{part}.") for name in differing)} == set(own)
    assert all(name.startswith(own) for name in differing)


def test_zero_matrices_of_fresh_projectors_are_drawn(saved: Callable):
    """Gemma 3 initialises its projector to zero, whose tokens have neither entropy nor direction."""
    tiny = load_transformers("tiny", str(saved("gemma3")[0]))
    twin: Any = tiny.untrained(0).projector
    matrix = twin.model.multi_modal_projector.mm_input_projection_weight
    assert float(matrix.detach().std()) == pytest.approx(twin.model.config.get_text_config().initializer_range, rel=0.2)


def test_the_tower_runs_once_for_all_projectors(saved: Callable, monkeypatch: pytest.MonkeyPatch):
    tiny = load_transformers("tiny", str(saved("llava_next")[0]))
    encoder: Any = tiny.encoder
    calls = []
    tower = type(encoder.projector.model.vision_tower)
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    encoded = tiny.encode([noise()])
    for model in (tiny, tiny.untrained(0), tiny.untrained(1)):
        model.visual_tokens(encoded)
    assert len(calls) == 1


@pytest.mark.golden
def test_a_converted_checkpoint_gives_the_recorded_tokens(golden_world: Path, goldens: Path, tmp_path: Path):
    golden = np.load(goldens / "g_tower.npz")
    model = load_transformers("converted", str(to_hf("tiny-llava", tmp_path / "converted", dtype="float32")))
    images = [Image.open(golden_world / "images" / f"im{index}.png").convert("RGB") for index in range(4)]
    tokens = torch.stack([tokens_of(model, image) for image in images])
    np.testing.assert_allclose(tokens, golden["encode_images"], rtol=1e-5, atol=1e-5)


def without(file: Path, part: str) -> None:
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_checkpoint_without_projector_is_named(saved: Callable):
    path, _ = saved("llava")
    without(path / "model.safetensors", "multi_modal_projector")
    with pytest.raises(ValueError, match=r"lacks 4 weights of a llava, such as 'multi_modal_projector"):
        load_transformers("tiny", str(path))


def test_a_missing_shard_of_the_tower_is_named(saved: Callable):
    path, whole = saved("llava")
    lose_the_llm(path, whole)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_transformers("tiny", str(path))


def test_a_processor_of_another_model_is_named(saved: Callable):
    path, _ = saved("internvl")
    model = load_transformers("tiny", str(path))
    with pytest.raises(ValueError, match=r"found 5 visual tokens .* expected 112"):
        model.layout((300, 200), torch.zeros(5, 32))


def test_embeddings_that_are_shorter_than_the_tokenizer_are_named(saved: Callable):
    path, whole = saved("llava")
    whole.resize_token_embeddings(9)
    whole.save_pretrained(path)
    with pytest.raises(ValueError, match=r"ids up to \d+.*has 9 rows"):
        load_transformers("tiny", str(path))


def test_what_is_no_model_of_transformers_is_told_apart(golden_world: Path, tmp_path: Path):
    for place in ("tiny-llava", "images", "train_init/mm_projector.bin", "random:3", "./no/such/folder"):
        assert not is_of_transformers(place)  # LLaVA's own, or nothing
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "mllama", "text_config": {}}))
    with pytest.raises(ValueError, match=r"'mllama'; expected one of qwen2_vl, .*PROJECTORS in patch_aligned"):
        load_models([f"x={tmp_path / 'other'}"])
    with pytest.raises(FileNotFoundError, match="no folder some/model, and no model of this name can be fetched"):
        load_models(["x=some/model"])
