"""Layouts of the visual tokens of transformers' vision-language models, from their processors. No pixels are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from patch_aligned.cells import Layout
from patch_aligned.models.layout_rules import NO_PLACE, RULES, Rule, Settings, Size


@lru_cache(maxsize=4096)
def _layout(settings: Settings, rule: Rule, image_wh: Size, images: int) -> Layout:
    return rule(settings, image_wh, images)


def layouts_of(processor: Any, images: Sequence[Any]) -> list[Layout]:
    """Return where the visual tokens of the images of one sample look.

    Args:
        processor: what `transformers.AutoProcessor` loads for a vision-language model.
        images: the images of one sample, or their sizes (width, height) in pixels as the processor sees them, that is
            after EXIF rotation. Some processors treat several images differently from one.

    Returns:
        A layout for each image. Equal settings, sizes and numbers of images give the same object.

    Raises:
        ValueError: the processor is unknown, the model's tokens have no place, or a size is not positive.
    """
    settings, rule = _settings_and_rule(processor)
    sizes = [tuple(getattr(image, "size", image)) for image in images]
    for size in sizes:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image size: found {size}, expected a width and a height in pixels of at least 1")
    return [_layout(settings, rule, size, len(sizes)) for size in sizes]


def _settings_and_rule(processor: Any) -> tuple[Settings, Rule]:
    name = type(processor).__name__
    if name in NO_PLACE:
        raise ValueError(f"{name}: {NO_PLACE[name]}. There is no layout of such a model.")
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        raise ValueError(
            f"{name}: found no image_processor, expected a processor of text and images. Pass what "
            "AutoProcessor.from_pretrained(MODEL) returns."
        )
    for known in type(image_processor).__mro__:
        if rule := RULES.get(known.__name__.removesuffix("Pil")):
            settings = Settings(processor, image_processor, sys.modules[known.__module__])
            if settings.values.get("do_resize") is False:
                raise ValueError(f"{known.__name__}: found do_resize=False, expected True, as the model is made for")
            return settings, rule
    raise ValueError(
        f"{name}: found an image processor of the class {type(image_processor).__name__}, expected one of "
        f"{', '.join(RULES)}. To add a class, add its rule to RULES in patch_aligned/models/layout_rules.py."
    )
