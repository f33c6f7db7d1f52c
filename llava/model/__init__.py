"""Multimodal LLMs. Importing this package registers their configs with transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import (
    LlavaQwen3Config,
    LlavaQwen3ForCausalLM,
    LlavaQwenConfig,
    LlavaQwenForCausalLM,
)

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwen3Config",
    "LlavaQwen3ForCausalLM",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
]


def __getattr__(name: str) -> Any:
    if name in ("LlavaMptForCausalLM", "LlavaMptConfig"):
        raise ImportError(
            f"{name} is not part of this package: MPT left transformers, and the original's MPT forward pass could not "
            "run. The conversation template `mpt` is kept. See docs/differences.md."
        )
    raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
