"""Hugging Face's processor of a checkpoint: its tokenizer with `<image>`, its image processor, its chat template."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava.constants import DEFAULT_IMAGE_TOKEN

IMAGE_SETTINGS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def image_settings(image_processor: Any) -> dict[str, Any]:
    """What an image processor does to an image, as far as LLaVA's towers need any of it; values that JSON can hold."""
    values = image_processor.to_dict()
    return {name: values[name] for name in IMAGE_SETTINGS if values.get(name) is not None}


def llava_image_processor(image_processor: Any, pads: bool) -> LlavaImageProcessorPil:
    """Hugging Face's image processor with the pixels of `process_images`.

    Args:
        image_processor: the tower's.
        pads: whether images are padded to a square of the mean colour (`image_aspect_ratio: pad`) or cropped.
    """
    settings = image_settings(image_processor)
    if not settings.get("do_center_crop", False):  # SigLIP squeezes. Engines still ask for the crop's size.
        settings |= {"do_center_crop": False, "crop_size": settings["size"]}
    return LlavaImageProcessorPil(**settings, do_pad=pads)


def add_image_token(tokenizer: Any) -> int:
    """Adds `<image>` to the tokenizer and returns its id; fits the tokenizer for generation in batches."""
    tokenizer.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.padding_side = "left"  # new tokens follow the prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


def llava_processor(
    tokenizer: Any, image_processor: Any, patch_size: int, has_cls: bool, strategy: str, template: str | None
) -> LlavaProcessor:
    """The processor that expands `<image>` to as many tokens as the model has for an image.

    Args:
        tokenizer: with `<image>` among its tokens.
        image_processor: from `llava_image_processor`.
        patch_size: side of a patch, pixels.
        has_cls: whether the tower puts a CLS token before the patches.
        strategy: `default` drops the first token, `full` keeps all.
        template: chat template, or None.
    """
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_cls),
        chat_template=template,
    )
