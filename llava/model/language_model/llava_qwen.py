"""Qwen2 and Qwen2.5, under the names that LLaVA-NeXT's checkpoints carry."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from llava.model.language_model.causal_lm import LlavaCausalLM, ReadableByTransformers4
from llava.model.llava_arch import LlavaMetaModel


class LlavaQwenConfig(ReadableByTransformers4, Qwen2Config):
    """Qwen2's config under the model type that LLaVA-NeXT's checkpoints carry."""

    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    """Qwen2's decoder with a vision tower and a projector."""

    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(LlavaCausalLM, Qwen2ForCausalLM):
    """Qwen2 with a vision tower and a projector."""

    config_class = LlavaQwenConfig
    decoder_class = LlavaQwenModel


AutoConfig.register("llava_qwen", LlavaQwenConfig)
AutoModel.register(LlavaQwenConfig, LlavaQwenForCausalLM)
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM)


# Qwen3's dense LLMs.


class LlavaQwen3Config(ReadableByTransformers4, Qwen3Config):
    """Qwen3's config under a model type of its own."""

    model_type = "llava_qwen3"


class LlavaQwen3Model(LlavaMetaModel, Qwen3Model):
    """Qwen3's decoder with a vision tower and a projector."""

    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaCausalLM, Qwen3ForCausalLM):
    """Qwen3 with a vision tower and a projector."""

    config_class = LlavaQwen3Config
    decoder_class = LlavaQwen3Model


AutoConfig.register("llava_qwen3", LlavaQwen3Config)
AutoModel.register(LlavaQwen3Config, LlavaQwen3ForCausalLM)
AutoModelForCausalLM.register(LlavaQwen3Config, LlavaQwen3ForCausalLM)
