"""Llama-architecture LLMs: Vicuna, Llama 2 and 3, SmolLM2, ..."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.causal_lm import LlavaCausalLM, ReadableByTransformers4
from llava.model.llava_arch import LlavaMetaModel


class LlavaConfig(ReadableByTransformers4, LlamaConfig):
    """Llama's config under the model type that upstream's checkpoints carry."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama's decoder with a vision tower and a projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):
    """Llama with a vision tower and a projector."""

    config_class = LlavaConfig
    decoder_class = LlavaLlamaModel


AutoConfig.register("llava_llama", LlavaConfig)
AutoModel.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)  # a config of transformers has the same name
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
