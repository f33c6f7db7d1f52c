"""Registry of supported language models. A new family is a file beside this one, and a row here."""

from __future__ import annotations

from typing import Any, NamedTuple

from llava.model.language_model.causal_lm import LlavaCausalLM
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import (
    LlavaQwen3Config,
    LlavaQwen3ForCausalLM,
    LlavaQwenConfig,
    LlavaQwenForCausalLM,
)


class Family(NamedTuple):
    """The LLaVA classes of an LLM's architecture."""

    config_class: type
    model_class: type[LlavaCausalLM]


FAMILIES: dict[str, Family] = {
    "llama": Family(LlavaConfig, LlavaLlamaForCausalLM),
    "mistral": Family(LlavaMistralConfig, LlavaMistralForCausalLM),
    "qwen2": Family(LlavaQwenConfig, LlavaQwenForCausalLM),
    "qwen3": Family(LlavaQwen3Config, LlavaQwen3ForCausalLM),
}
"""By the `model_type` of the plain LLM."""


def llava_config(config: Any) -> Any:
    """Convert an LLM's config to that of its LLaVA; a LLaVA config is returned unchanged.

    Raises:
        ValueError: there is no family for the LLM's architecture.
    """
    if any(isinstance(config, family.config_class) for family in FAMILIES.values()):
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
    """The model that reads the LLaVA config `config`.

    Raises:
        ValueError: it is not a LLaVA config.
    """
    for family in FAMILIES.values():
        if isinstance(config, family.config_class):
            return family.model_class
    raise ValueError(f"No LLaVA config: model type `{config.model_type}`. Pass what llava_config() returns.")
