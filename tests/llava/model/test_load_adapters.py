"""LoRA folders: base, projector and adapter come together, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.builder import load_pretrained_model
from tests.folders import set_config

pytest.importorskip("peft", reason="peft is part of the extra `train`")

ADAPTER, BESIDE = "lora/adapter_model.safetensors", "lora/non_lora_trainables.bin"
IDS = torch.tensor([[1, -200, 20, 30, 40]])


@pytest.fixture(autouse=True)
def lora_folder(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_lora", "lora")


def load(folder: str = "lora", base: str | None = "tiny-vicuna", **kwargs: Any) -> Any:
    return load_pretrained_model(folder, base, "x", device="cpu", **kwargs).model


def logits(model: Any) -> torch.Tensor:
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=IDS, images=images).logits


def test_the_merged_weights_are_the_sum_by_hand() -> None:
    base, adapter = load_file("tiny-vicuna/model.safetensors"), load_file(ADAPTER)
    merged = load().state_dict()
    changed = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    assert len(changed) == 3 * 7
    for name in changed:
        delta = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        own = name.removeprefix("base_model.model.") + ".weight"
        torch.testing.assert_close(merged[own], base[own] + 8 / 4 * delta, rtol=1e-6, atol=1e-7)  # lora_alpha / r
    untouched = base.keys() - {name.removeprefix("base_model.model.") + ".weight" for name in changed}
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


def test_weights_of_torch_and_other_prefixes_are_read() -> None:
    expected = logits(load())
    torch.save(load_file(ADAPTER), "lora/adapter_model.bin")
    Path(ADAPTER).unlink()
    beside = torch.load(BESIDE, weights_only=True)
    torch.save({name.removeprefix("base_model.model."): tensor for name, tensor in beside.items()}, BESIDE)
    assert torch.equal(logits(load()), expected)


def test_an_adapter_asks_for_its_base_by_name() -> None:
    with pytest.raises(ValueError, match=r"LoRA adapter.*--model-base FOLDER_OR_HUB_NAME \(in training it was tiny-vi"):
        load(base=None)


def test_unknown_and_missing_weights_of_an_adapter_are_named() -> None:
    adapter = load_file(ADAPTER)
    first = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    adapter["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = adapter.pop(first)
    save_file(adapter, ADAPTER)
    pattern = r"layers\.0\.mlp\.up_proj\.lora_A\.weight: model \(4, 64\), file has no.*layers\.9.*: model has no"
    with pytest.raises(ValueError, match=pattern):
        load()


def test_what_was_trained_beside_the_adapter_must_fit() -> None:
    beside = torch.load(BESIDE, weights_only=True)
    torch.save(beside | {"base_model.model.model.surprise": torch.zeros(2)}, BESIDE)
    with pytest.raises(ValueError, match=r"model\.surprise: model has no such tensor, file \(2,\)"):
        load()
    del beside["base_model.model.model.mm_projector.2.bias"]
    torch.save(beside, BESIDE)
    with pytest.raises(ValueError, match=r"mm_projector\.2\.bias: model \(64,\), file has no such tensor"):
        load()
    Path(BESIDE).unlink()
    with pytest.raises(ValueError, match=r"no non_lora_trainables\.bin.*mm_projector\.0\.bias: model \(64,\)"):
        load()


def test_an_adapter_of_another_llm_is_refused() -> None:
    set_config("lora", intermediate_size=96)
    with pytest.raises(ValueError, match=r"tiny-vicuna do not fit.*model \(64, 96\), file \(64, 128\)"):
        load()


def test_the_base_may_be_a_llava_that_brings_the_projector() -> None:
    Path(BESIDE).unlink()
    projector = load("tiny-llava", None).model.mm_projector.state_dict()
    found = load(base="tiny-llava").model.mm_projector.state_dict()
    assert all(torch.equal(found[name], projector[name]) for name in projector)


def test_an_adapter_without_a_config_takes_its_bases() -> None:
    expected = logits(load(base="tiny-llava"))
    Path("lora/config.json").unlink()
    assert torch.equal(logits(load(base="tiny-llava")), expected)


def test_generation_stops_at_the_end_mark_of_the_adapters_template() -> None:
    Path("tiny-vicuna/generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    set_config("lora", conversation_version="v1")
    assert load().generation_config.eos_token_id == [1, 2]


def test_an_adapter_of_a_plain_llm_is_merged() -> None:
    config = json.loads(Path("tiny-vicuna/config.json").read_text())
    Path("lora/config.json").write_text(json.dumps(config))
    merged = load()
    assert type(merged).__name__ == "LlamaForCausalLM"
    ids = IDS[:, 2:]
    Path("lora/config.json").write_text(Path("tiny-llava/config.json").read_text())
    torch.testing.assert_close(merged(input_ids=ids).logits, load()(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_tables_that_training_enlarged_are_read(golden_world: Path) -> None:
    table, head = torch.randn(1001, 64), torch.randn(1001, 64)
    beside = torch.load(BESIDE, weights_only=True)
    tables = {"base_model.model.model.embed_tokens.weight": table, "base_model.model.lm_head.weight": head}
    torch.save(beside | tables, BESIDE)
    set_config("lora", vocab_size=1001)
    model = load()
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert torch.equal(model.lm_head.weight, head)
    assert model.config.vocab_size == 1001


def test_a_vocabulary_smaller_than_the_bases_is_refused() -> None:
    set_config("lora", vocab_size=900)
    with pytest.raises(ValueError, match=r"trained with 900 words .* the base has 1000"):
        load()


def test_a_tower_trained_beside_the_adapter_is_used() -> None:
    tower = load_file("tiny-clip/model.safetensors")
    trained = {f"base_model.model.model.vision_tower.vision_tower.{name}": t + 1 for name, t in tower.items()}
    torch.save(torch.load(BESIDE, weights_only=True) | trained, BESIDE)
    found = load().get_vision_tower().vision_tower.state_dict()
    assert all(torch.equal(found[name.removeprefix("vision_model.")], tensor + 1) for name, tensor in tower.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_stays_whole_beside_quantised_weights(bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra `train`")
    options = {f"load_{bits}bit": True}
    adapter = load_file(ADAPTER)
    large = {name: tensor * (20 if "lora_B" in name else 1) for name, tensor in adapter.items()}
    save_file({name: tensor * 0 for name, tensor in adapter.items()}, ADAPTER)
    base, base_quantised = logits(load()), logits(load(**options))
    save_file(large, ADAPTER)
    whole, quantised = logits(load()), logits(load(**options))
    assert type(load(**options)).__name__ == "LlavaLlamaForCausalLM"
    assert (quantised - whole).norm() < (base_quantised - whole).norm()  # nearer to the adapted model than without
    assert (quantised - whole).norm() < 2 * (base_quantised - base).norm()  # no more is lost than in the base
