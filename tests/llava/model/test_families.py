"""What holds for every family of LLMs, on tiny models with random weights."""

from __future__ import annotations

import pytest
from transformers import GPT2Config

from llava.model.language_model.families import llava_config


def test_an_llm_without_a_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model type `gpt2`.*llama, mistral, qwen2, qwen3"):
        llava_config(GPT2Config())
