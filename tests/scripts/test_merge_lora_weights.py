"""A merged LoRA run is a whole checkpoint that says what the adapter says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

pytest.importorskip("peft", reason="peft is part of the extra `train`")

from llava.model.builder import load_pretrained_model
from llava.train.train import train

SCRIPT = Path(__file__).parents[2] / "scripts" / "merge_lora_weights.py"
TRAINING = (
    "--bf16 False --use_cpu True --report_to none --vision_tower tiny-clip --mm_projector_type mlp2x_gelu "
    "--mm_vision_select_layer -2 --mm_use_im_patch_token False --model_name_or_path tiny-vicuna "
    "--image_folder images --version v1 --data_path data_mix.json --image_aspect_ratio pad --lora_enable True "
    "--learning_rate 1e-2 --max_steps 2 --per_device_train_batch_size 4 --disable_tqdm True --save_strategy no "
    "--model_max_length 2048 --output_dir run"
)


@pytest.mark.parametrize(
    "flags",
    ["", "--bits 4", "--unfreeze_mm_vision_tower True", "--lora_bias all", "--lora_bias lora_only"],
    ids=["lora", "qlora", "tower", "all biases", "biases of adapted layers"],
)
def test_merged_logits_equal_the_adapters(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch, run_python: Any, flags: str
) -> None:
    if "bits" in flags:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra `train`")
    if "bias" in flags:
        LlamaForCausalLM.from_pretrained("tiny-vicuna", attention_bias=True).save_pretrained("tiny-vicuna")
    monkeypatch.setattr(sys, "argv", ["train.py", *TRAINING.split(), *flags.split()])
    trained = train().model.eval()
    folders = ["--model-path", "run", "--model-base", "tiny-vicuna", "--save-model-path", "merged"]
    assert run_python(str(SCRIPT), *folders).returncode == 0
    _, merged, _, _ = load_pretrained_model("merged", None, "merged", device="cpu")
    batch = {"input_ids": torch.tensor([[1, 5, -200, 9, 30, 7]]), "images": torch.randn(1, 3, 56, 56)}
    if "bits" in flags:  # training saw a rounded base; the adapter, on the base itself, is what the folder means
        trained = load_unmerged("run", "tiny-vicuna")
    with torch.no_grad():
        expected, found = trained(**batch).logits, merged(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert json.loads(Path("merged/config.json").read_text())["mm_vision_tower"] == "tiny-clip"
    assert Path("merged/tokenizer.model").is_file()
    with safe_open("merged/model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora_" in name or "base_" in name]  # noqa: SIM118


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ("nowhere tiny-vicuna merged", "No checkpoint at nowhere"),
        ("tiny-llava tiny-vicuna merged", "--model-path tiny-llava holds a whole model; expected a LoRA adapter"),
        ("adapter nowhere merged", "No checkpoint at nowhere"),
        ("adapter adapter merged", "--model-base adapter holds a LoRA adapter"),
        ("adapter tiny-vicuna adapter", "adapter is not empty"),
        ("adapter tiny-vicuna tiny-vicuna", "tiny-vicuna is not empty"),
        ("adapter tiny-vicuna merged", "holds an adapter_config.json, but no adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_merged_is_said_in_a_sentence(
    golden_world: Path, run_python: Any, folders: str, said: str
) -> None:
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path="tiny-vicuna", target_modules=["q_proj"]).save_pretrained("adapter")
    before = sorted(path for folder in ("tiny-vicuna", "adapter") for path in Path(folder).iterdir())
    adapter, base, merged = folders.split()
    flags = ["--model-path", adapter, "--model-base", base, "--save-model-path", merged]
    result = run_python(str(SCRIPT), *flags)
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr
    assert sorted(path for folder in ("tiny-vicuna", "adapter") for path in Path(folder).iterdir()) == before
    assert not Path("merged").exists()


def load_unmerged(folder: str, base: str) -> Any:
    """The base with the adapter beside its weights, put together by peft alone."""
    from peft import PeftModel

    from llava.model import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(folder)
    model: Any = LlavaLlamaForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    prefix = "base_model.model."
    rest = {
        name.removeprefix(prefix): tensor for name, tensor in torch.load(f"{folder}/non_lora_trainables.bin").items()
    }
    model.load_state_dict(rest, strict=False)
    adapted = PeftModel.from_pretrained(model, folder)
    model.get_vision_tower().load_model()  # only now, as some of its layers are called as the LLM's
    return adapted.eval()
