"""Qwen3's dense LLMs."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from llava.model.language_model.causal_lm import LlavaCausalLM
from llava.model.language_model.written_config import ReadableByTransformers4
from llava.model.llava_arch import LlavaMetaModel


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
AutoModelForCausalLM.register(LlavaQwen3Config, LlavaQwen3ForCausalLM)
