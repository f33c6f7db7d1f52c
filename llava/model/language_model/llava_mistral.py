"""Mistral's LLMs."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.causal_lm import LlavaCausalLM, ReadableByTransformers4
from llava.model.llava_arch import LlavaMetaModel


class LlavaMistralConfig(ReadableByTransformers4, MistralConfig):
    """Mistral's config under the model type that upstream's checkpoints carry."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral's decoder with a vision tower and a projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):
    """Mistral with a vision tower and a projector."""

    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel


AutoConfig.register("llava_mistral", LlavaMistralConfig)
AutoModel.register(LlavaMistralConfig, LlavaMistralForCausalLM)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
