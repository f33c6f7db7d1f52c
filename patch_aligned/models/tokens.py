"""Read the visual tokens of any vision-language model of transformers, as its LLM receives them.

Letters: B rows of the batch, L tokens of a row, T visual tokens of the batch, D width of the LLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PROJECTORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"], ("visual.merger",)),
    **dict.fromkeys(["qwen3_vl", "qwen3_vl_moe"], ("visual.merger", "visual.deepstack_merger_list")),
    "glm4v": ("visual.post_layernorm", "visual.downsample", "visual.merger"),
    "kimi_k25": ("mm_projector",),
    "video_llama_3": ("projector",),
    "ernie4_5_vl_moe": ("resampler_model",),
    "paddleocr_vl": ("projector",),
    "ovis2": ("vision_tower.head_linear", "vision_tower.head_norm", "visual_embeddings_table"),
    "llama4": ("vision_model.vision_adapter", "multi_modal_projector"),
    "minicpmv4_6": ("merger", "vision_tower.vit_merger"),
    "lighton_ocr": ("vision_projection",),
    "deepseek_vl": ("aligner",),
    **dict.fromkeys(["idefics3", "smolvlm"], ("connector",)),
    **dict.fromkeys(["gemma4", "gemma4_unified"], ("embed_vision",)),
    **dict.fromkeys(["llava_next", "llava_onevision"], ("multi_modal_projector", "image_newline")),
    **dict.fromkeys(
        ["aya_vision", "cohere2_vision", "gemma3", "internvl", "lfm2_vl", "llava", "mistral3", "molmo2", "paligemma"],
        ("multi_modal_projector",),
    ),
}
"""Modules, or parameters, between vision encoder and LLM, by `model_type`; names within the base model. The first reads
the encoder's features."""


def image_token_id(config: Any) -> int:
    """Return the id of the token that stands for a visual token in `input_ids`.

    Raises:
        ValueError: the config names none, so the model reads no images in its input sequence.
    """
    token_id = getattr(config, "image_token_id", None)
    if token_id is None:
        raise ValueError(
            f"model_type {config.model_type!r}: found no image_token_id in the config, expected a "
            "vision-language model whose LLM reads visual tokens in its input sequence."
        )
    return token_id


def image_inputs(processor: Any, samples: Sequence[Sequence[Any]]) -> Any:
    """Process samples of images with a text that holds their placeholders, as tensors."""
    # A word between images: some models cannot number positions where two images touch.
    texts = [f"image {processor.image_token}" * len(images) for images in samples]
    return processor(text=texts, images=[list(images) for images in samples], padding=True, return_tensors="pt")


@torch.no_grad()
def visual_tokens(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Compute the visual tokens of a processor's batch without its LLM, in the order of the images: `[T, D]`."""
    accepted = inspect.signature(model.get_image_features).parameters
    dtype = next(model.parameters()).dtype
    given = {
        name: value.to(dtype) if name == "pixel_values" else value
        for name, value in inputs.items()
        if name in accepted and name not in ("input_ids", "attention_mask")
    }
    if "kwargs" in accepted and "image_sizes" in inputs:  # Pixtral's tower reads it to leave out what pads an image
        given["image_sizes"] = inputs["image_sizes"]
    features = model.get_image_features(**given, return_dict=True)
    if features.pooler_output is None:  # Llama 4
        return _joined(model.multi_modal_projector(features.last_hidden_state))
    return _joined(features.pooler_output)


def _joined(features: Any) -> Tensor:
    """Join tensors of images, of tiles or of samples: `[T, D]`."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([_joined(part) for part in features])


class VisualTokenHook:
    """Keeps the visual tokens of a forward pass, as the LLM receives them. A context manager.

    Attributes:
        tokens: `[T, D]` of the last forward pass, in the order of the rows; None before it.
    """

    def __init__(self, model: Any):
        base = getattr(model, "base_model", model)
        self.tokens: Tensor | None = None
        self._input_ids: Tensor | None = None
        self._token_id = image_token_id(model.config)
        self._embed = model.get_input_embeddings()
        # Molmo 2 adds image features to the embedding of their placeholder.
        self._is_added = model.config.model_type == "molmo2"
        self._handles = [
            base.register_forward_pre_hook(self._remember_ids, with_kwargs=True),
            model.get_decoder().register_forward_pre_hook(self._read_tokens, with_kwargs=True),
        ]

    def _remember_ids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)

    def _read_tokens(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._input_ids is None:
            raise ValueError("The model was called without input_ids, by which its visual tokens are found. Pass them.")
        is_visual = self._input_ids == self._token_id  # [B, L]
        self.tokens = kwargs["inputs_embeds"][is_visual]  # [B, L, D] -> [T, D]
        if self._is_added:
            self.tokens = self.tokens - self._embed(self._input_ids[is_visual])

    def __enter__(self) -> VisualTokenHook:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
