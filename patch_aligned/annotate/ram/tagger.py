"""Tags for images, with their probabilities, by RAM or RAM++."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patch_aligned.annotate.fetch import DeviceModel
from patch_aligned.annotate.options import Resample
from patch_aligned.annotate.pipeline import ImageInWork
from patch_aligned.annotate.ram.model import RamModel, load_ram
from patch_aligned.annotate.regions import NonFiniteScoresError, Tag
from patch_aligned.files import sha256_of

# RAM's two text files: the tags in the order of the model's queries, and the threshold of each. Neither is shipped
# with this package.

_WHERE = "It is ram/data/{name} of https://github.com/xinyu1205/recognize-anything: download it and name it with {flag}"
_WHERE_TAGS = _WHERE.format(name="ram_tag_list.txt", flag="--ram_tag_list")
_WHERE_THRESHOLDS = _WHERE.format(name="ram_tag_list_threshold.txt", flag="--ram_thresholds")


def read_tag_list(path: Path) -> list[str]:
    """Read tags, one a line; `ValueError` names the line of an empty or repeated one."""
    first_line: dict[str, int] = {}
    for number, line in enumerate(_lines(path, _WHERE_TAGS), start=1):
        if not line:
            raise ValueError(f"{path}:{number}: found an empty line, expected a tag. {_WHERE_TAGS}")
        if line in first_line:
            raise ValueError(f"{path}:{number}: found {line!r} again, as in line {first_line[line]}. {_WHERE_TAGS}")
        first_line[line] = number
    return list(first_line)


def read_thresholds(path: Path) -> list[float]:
    """Read thresholds of the tags' probabilities, one a line, in the tags' order. 1.0 disables a tag."""
    thresholds = []
    for number, line in enumerate(_lines(path, _WHERE_THRESHOLDS), start=1):
        try:
            threshold = float(line)
        except ValueError:
            threshold = float("nan")
        if not 0 <= threshold <= 1:
            raise ValueError(f"{path}:{number}: found {line!r}, expected a number from 0 to 1. {_WHERE_THRESHOLDS}")
        thresholds.append(threshold)
    return thresholds


def _lines(path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: found no such file. {where}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found no UTF-8 text ({error}). {where}") from error
    return [line.strip() for line in text.splitlines()]


_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]  # ImageNet's, of RGB in 0..1: [3, 1, 1]
_DEVIATION = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def preprocess(images: Sequence[Image.Image], size: int, resample: Resample = "bilinear") -> Tensor:
    """Squash images of any size and mode to squares, and normalise them: `[B, 3, size, size]` float32.

    RAM's own repository resamples `bilinear`; `bicubic` the demo of Grounded-SAM, which resizes the image beforehand.
    """
    squares = [image.convert("RGB").resize((size, size), _FILTERS[resample]) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))  # [B, size, size, 3] uint8
    return (pixels.permute(0, 3, 1, 2) / 255 - _MEAN) / _DEVIATION  # -> [B, 3, size, size]


class RamTagger(DeviceModel):
    """RAM or RAM++ with its tag list, on one device. `tags` are in the order of the model's queries."""

    key = "ram"

    def __init__(
        self,
        model: RamModel,
        tags: Sequence[str],
        thresholds: Sequence[float],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        resample: Resample = "bilinear",
    ) -> None:
        """Place the model of `load_ram` on a device, with one tag and threshold a query; for `dtype` see `DeviceModel`.

        What does not depend on the image is computed here, once.
        """
        num_tags = model.config.num_tags
        for what, found, where in (("tags", tags, _WHERE_TAGS), ("thresholds", thresholds, _WHERE_THRESHOLDS)):
            if len(found) != num_tags:
                raise ValueError(f"found {len(found)} {what}, expected {num_tags}, as many as the model has. {where}")
        super().__init__(model, device, dtype)
        self.resample: Resample = resample
        self.tags = list(tags)
        if model.config.kind == "ram_plus" and self.dtype != torch.float32:
            # More than a third of RAM++. float16, since it keeps three bits more than bfloat16 of numbers of this size.
            model.label_embed.data = model.label_embed.data.half()
        self._thresholds = torch.tensor(thresholds, dtype=torch.float32)
        with torch.inference_mode():
            self._queries = self.model.tag_queries() if model.config.kind == "ram" else None
        self.settings = {
            "kind": model.config.kind,
            "image_size": model.config.image_size,
            "resample": resample,
            "dtype": self.dtype_name,
        }

    @classmethod
    def from_checkpoint(cls, path: Path, tag_list: Path, thresholds: Path, **options: Any) -> RamTagger:
        """Load published weights, with RAM's ram_tag_list.txt and ram_tag_list_threshold.txt."""
        names, limits = read_tag_list(tag_list), read_thresholds(thresholds)  # first: cheaper to fail on
        model, published = load_ram(path)
        tagger = cls(model, names, limits, **options)
        tagger.settings |= {
            "checkpoint": published.name,
            "checkpoint_sha256": published.sha256,
            "tag_list_sha256": sha256_of(tag_list),
            "thresholds_sha256": sha256_of(thresholds),
        }
        return tagger

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Prepare images as this model takes them: `[B, 3, image_size, image_size]` float32 on the CPU."""
        return preprocess(images, self.model.config.image_size, self.resample)

    @torch.inference_mode()
    def scores(self, pixel_values: Tensor) -> Tensor:
        """Return the probability of each tag, `[B, T]` float32 on the CPU, for images from `preprocess`."""
        pixel_values = pixel_values.to(self.device)  # [B, 3, image_size, image_size]

        def logits(rows: Sequence[int], dtype: torch.dtype) -> list[Tensor | None]:
            with self.autocast(dtype):
                found = self.model(pixel_values[list(rows)], self._queries).float().cpu()  # [rows, T]
            return [of_image if of_image.isfinite().all() else None for of_image in found]

        found = self.finite_or_none(logits, len(pixel_values))
        if not_finite := [row for row, of_image in enumerate(found) if of_image is None]:
            raise NonFiniteScoresError("RAM", not_finite)
        return torch.stack(found).sigmoid()

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        """Return each image's tags whose probability is above their threshold, in the tag list's order."""
        return self.select(self.scores(self.preprocess([item.image for item in items]))) if items else []

    def select(self, scores: Tensor) -> list[list[Tag]]:
        """Return the tags of each row of `scores` `[B, T]` that are strictly above their threshold."""
        tags: list[list[Tag]] = [[] for _ in scores]
        rows, queries = torch.nonzero(scores > self._thresholds, as_tuple=True)
        for row, query in zip(rows.tolist(), queries.tolist(), strict=True):
            tags[row].append(Tag(self.tags[query], scores[row, query].item()))
        return tags
