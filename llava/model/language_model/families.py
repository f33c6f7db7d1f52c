"""Registry of supported language models. A new family is a file beside this one, and a row here."""

from __future__ import annotations

from typing import Any

from llava.model.language_model.causal_lm import LlavaCausalLM
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwen3ForCausalLM, LlavaQwenForCausalLM

FAMILIES: dict[str, type[LlavaCausalLM]] = {
    "llama": LlavaLlamaForCausalLM,
    "mistral": LlavaMistralForCausalLM,
    "qwen2": LlavaQwenForCausalLM,
    "qwen3": LlavaQwen3ForCausalLM,
}
"""By the `model_type` of the plain LLM."""


def llava_config(config: Any) -> Any:
    """Convert an LLM's config to that of its LLaVA; a LLaVA config is returned unchanged.

    Raises:
        ValueError: there is no family for the LLM's architecture.
    """
    if any(isinstance(config, model_class.config_class) for model_class in FAMILIES.values()):
        return config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"The LLM is of model type `{config.model_type}`; those that can be used are {', '.join(sorted(FAMILIES))} "
            "(Vicuna, Llama and SmolLM2 are of type llama, Qwen2.5 of type qwen2)."
        )
    values = config.to_dict()
    values.pop("model_type")
    return FAMILIES[config.model_type].config_class(**values)


def llava_model_class(config: Any) -> type[LlavaCausalLM]:
    """Return the class of the model that a LLaVA config describes, or raise `ValueError` for another config."""
    for model_class in FAMILIES.values():
        if isinstance(config, model_class.config_class):
            return model_class
    raise ValueError(f"No LLaVA config: model type `{config.model_type}`. Pass what llava_config() returns.")
