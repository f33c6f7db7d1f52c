"""A small Qwen with tied word embeddings through both stages; its folder says how to talk to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llava.conversation import conversation_mode
from llava.model.builder import load_pretrained_model
from tests.training import logged


@pytest.fixture
def qwen(golden_world: Path) -> str:
    """A plain LLM as its makers publish it: the end of text is no end mark of ChatML."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("tiny-tok-mpt")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    Qwen2ForCausalLM(config).save_pretrained("qwen")
    tokenizer.save_pretrained("qwen")
    return "qwen"


def test_qwen_goes_through_both_stages(qwen: str, run_stage_1: Any) -> None:
    own = f"--model_name_or_path {qwen} --learning_rate 1e-2"
    stage_1 = run_stage_1("stage1", own)
    assert logged(stage_1)[-1] < logged(stage_1)[0]
    stage_2 = run_stage_1(
        "stage2",
        f"{own} --version qwen_2 --data_path data_mix.json --tune_mm_mlp_adapter False --image_aspect_ratio pad "
        "--pretrain_mm_mlp_adapter stage1/mm_projector.bin",
    )
    assert logged(stage_2)[-1] < logged(stage_2)[0]

    config = json.loads(Path("stage2/config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llava_qwen", True)
    for path, base in (("stage1", qwen), ("stage2", None)):
        tokenizer, model, _, _ = load_pretrained_model(path, base, "any-name", device="cpu")
        assert type(model).__name__ == "LlavaQwenForCausalLM"
        assert model.lm_head.weight is model.get_input_embeddings().weight
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert mark in model.generation_config.eos_token_id  # though the LLM came with its end of text alone
    assert conversation_mode("any-name", model.config) == "qwen_2"
