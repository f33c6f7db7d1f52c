"""Qwen2 and Qwen2.5, under the names that LLaVA-NeXT's checkpoints carry."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.language_model.causal_lm import LlavaCausalLM
from llava.model.language_model.written_config import ReadableByTransformers4
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
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM)
