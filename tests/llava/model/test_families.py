"""What holds for every family of LLMs, on tiny models with random weights, with and without tied word embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config
from transformers import Qwen3Config as PlainQwen3Config

import llava.model
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.families import FAMILIES, llava_config, llava_model_class

PLAIN_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": PlainQwen3Config}
NAMES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "qwen3": ("llava_qwen3", "LlavaQwen3ForCausalLM"),
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
VISION = SimpleNamespace(
    vision_tower="tiny-clip",
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_patch_merge_type="flat",
    pretrain_mm_mlp_adapter=None,
)


def plain_config(family: str, **values: Any) -> Any:
    return PLAIN_CONFIGS[family](**SIZES | {"bos_token_id": 1, "eos_token_id": 2} | values)


def tiny_model(family: str, **values: Any) -> Any:
    torch.manual_seed(0)
    config = llava_config(plain_config(family, **values))
    model = llava_model_class(config)(config)
    model.get_model().initialize_vision_modules(VISION)
    return model


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (False, True)], ids=str)
def model(request: pytest.FixtureRequest, golden_world: Path) -> Any:
    family, tied = request.param
    return tiny_model(family, tie_word_embeddings=tied).eval()


def batch() -> dict[str, Tensor]:
    """Two rows of one image each; the second is shorter and padded."""
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 2] = IMAGE_TOKEN_INDEX
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :4] = IGNORE_INDEX
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels}


def test_every_family_has_a_config_to_test_it_with() -> None:
    assert set(PLAIN_CONFIGS) == set(NAMES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_published_checkpoints(family: str) -> None:
    model_type, class_name = NAMES[family]
    config = llava_config(plain_config(family))
    assert (config.model_type, llava_model_class(config).__name__) == (model_type, class_name)
    assert getattr(llava.model, class_name) is llava_model_class(config)
    assert llava_config(config) is config


def test_the_image_reaches_the_logits(model: Any) -> None:
    inputs = batch()
    with torch.no_grad():
        first = model(**inputs).logits
        second = model(**inputs | {"images": inputs["images"].flip(0)}).logits
    assert first.shape == (2, 8 + 16, 300)
    assert (first[:, -1] - second[:, -1]).abs().max() > 1e-4


def test_a_model_without_images_is_its_text_only_original(model: Any) -> None:
    ids = torch.arange(5, 25)[None]
    values = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    family = next(name for name, classes in FAMILIES.items() if isinstance(model, classes))
    original: Any = AutoModelForCausalLM.from_config(PLAIN_CONFIGS[family](**values)).eval()
    text_weights = {name: tensor for name, tensor in model.state_dict().items() if "vision" not in name}
    original.load_state_dict({name: t for name, t in text_weights.items() if "mm_projector" not in name})
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, original(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_answers_of_a_batch_equal_those_one_by_one(model: Any) -> None:
    inputs = batch()
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    together = model.generate(
        inputs["input_ids"], images=inputs["images"], attention_mask=inputs["attention_mask"], **options
    )
    for row, length in enumerate((9, 7)):
        ids, image = inputs["input_ids"][row : row + 1, :length], inputs["images"][row : row + 1]
        assert model.generate(ids, images=image, **options)[0].tolist() == together[row].tolist()


def test_generation_stops_at_each_of_several_end_tokens(model: Any) -> None:
    ids, images = batch()["input_ids"][:1], batch()["images"][:1]
    free = model.generate(ids, images=images, do_sample=False, min_new_tokens=6, max_new_tokens=6, pad_token_id=0)
    wanted = free[0, 0].item()
    model.generation_config.eos_token_id = [299, wanted] if wanted != 299 else [298, wanted]
    assert model.generate(ids, images=images, do_sample=False, max_new_tokens=6, pad_token_id=0)[0].tolist() == [wanted]


def test_a_saved_folder_gives_the_same_model(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    again, report = loaded
    assert type(again) is type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tied = model.config.tie_word_embeddings
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    again.get_vision_tower().load_model()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch()).logits, model(**batch()).logits, rtol=1e-5, atol=1e-6)


def test_a_step_of_training_lowers_the_loss(model: Any) -> None:
    model.train()
    model.get_vision_tower().requires_grad_(False)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-1)
    before = model(**batch()).loss
    before.backward()
    assert all(param.grad is not None for param in trained)
    optimizer.step()
    assert model(**batch()).loss < before
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_leaving_out_what_no_loss_reads_changes_no_loss_and_no_gradient(model: Any, checkpointing: bool) -> None:
    """The plain path, which computes all positions under a mask of the padding, is that of evaluation."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = [], []
    for training in (True, False):
        model.train(training).zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


def test_the_last_layer_runs_where_a_label_stands(model: Any) -> None:
    rows: dict[str, int] = {}
    layer = model.get_model().layers[-1]
    parts = {"mlp": layer.mlp.down_proj, "attention": layer.self_attn.o_proj, "keys": layer.self_attn.k_proj,
             "norm": model.get_model().norm, "head": model.lm_head}  # fmt: skip
    for name, part in parts.items():
        part.register_forward_hook(
            lambda module, inputs, output, name=name: rows.update({name: output.numel() // output.shape[-1]})
        )
    inputs = batch()
    labelled, everywhere = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum()), 2 * (9 - 1 + 16)
    model.train()(**inputs)
    assert rows == {**dict.fromkeys(("mlp", "attention", "norm", "head"), labelled), "keys": everywhere}
    model(**inputs, output_hidden_states=True)
    assert rows["mlp"] == everywhere


def test_tied_word_embeddings_learn_from_both_ends(golden_world: Path) -> None:
    """The gradient of the one table is the sum of those that two separate tables get."""
    tied, untied = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("qwen2", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.get_input_embeddings().weight.detach().clone()})
    for model in (tied, untied):
        model.train()(**batch()).loss.backward()
    expected = untied.get_input_embeddings().weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.get_input_embeddings().weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_stage_1_trains_the_projector_alone(model: Any) -> None:
    model.train().requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    model(**batch()).loss.backward()
    with_gradient = {name for name, param in model.named_parameters() if param.grad is not None}
    assert with_gradient == {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def test_an_llm_without_a_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model type `gpt2`.*llama, mistral, qwen2, qwen3"):
        llava_config(GPT2Config())
    with pytest.raises(ValueError, match="No LLaVA config: model type `llama`"):
        llava_model_class(LlamaConfig())


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (LLAMA_3_ROPE, LLAMA_3_ROPE),
    ],
    ids=["plain", "linear", "llama3"],
)
def test_config_json_says_rope_and_dtype_under_the_names_of_transformers_4_too(
    family: str, rope: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    config = llava_config(plain_config(family, rope_parameters={"rope_theta": 500000.0, **rope}))
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written.get("rope_scaling")) == (500000.0, scaling)
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    again = AutoConfig.from_pretrained(tmp_path)
    assert {key: again.rope_parameters[key] for key in config.rope_parameters} == config.rope_parameters
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_theta"] == 500000.0


def test_settings_of_sampling_without_sampling_do_not_stop_a_save(golden_world: Path) -> None:
    """Vicuna's generation config has them; transformers 5 refuses to write such a config."""
    model = tiny_model("llama")
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    model.save_pretrained("saved")
    assert "temperature" not in json.loads(Path("saved/generation_config.json").read_text())
