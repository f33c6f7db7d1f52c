"""Tagging images with RAM: pictures in, tags with their probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patch_aligned.annotate.ram.model import RamModel, load_ram
from patch_aligned.annotate.regions import NonFiniteScoresError
from patch_aligned.files import sha256_of

# RAM's two text files: the tags in the order of the model's queries, and the threshold of each.
#
# Neither is shipped with this package.

_WHERE = "It is ram/data/{name} of https://github.com/xinyu1205/recognize-anything: fetch it and name it with {flag}"
_WHERE_TAGS = _WHERE.format(name="ram_tag_list.txt", flag="--ram_tag_list")
_WHERE_THRESHOLDS = _WHERE.format(name="ram_tag_list_threshold.txt", flag="--ram_thresholds")


def read_tag_list(path: Path) -> list[str]:
    """Tags, one a line.

    Raises:
        ValueError: names the file and the line of an empty or repeated tag.
    """
    first_line: dict[str, int] = {}
    for number, line in enumerate(_lines(path, _WHERE_TAGS), start=1):
        if not line:
            raise ValueError(f"{path}:{number}: found an empty line, expected a tag. {_WHERE_TAGS}")
        if line in first_line:
            raise ValueError(f"{path}:{number}: found {line!r} again, as in line {first_line[line]}. {_WHERE_TAGS}")
        first_line[line] = number
    return list(first_line)


def read_thresholds(path: Path) -> list[float]:
    """Thresholds of the tags' probabilities, one a line, in the tags' order. A tag with 1.0 is never given.

    Raises:
        ValueError: names the file and the line of what isn't a number from 0 to 1.
    """
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


def check_counts(tags: list[str], thresholds: list[float], num_tags: int) -> None:
    """Refuses tags or thresholds that are more or fewer than the model's queries.

    Raises:
        ValueError: names both counts.
    """
    for what, found, where in (
        ("tags", len(tags), _WHERE_TAGS),
        ("thresholds", len(thresholds), _WHERE_THRESHOLDS),
    ):
        if found != num_tags:
            raise ValueError(f"found {found} {what}, expected {num_tags}, as many as the model scores. {where}")


def _lines(path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: found no such file. {where}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found no UTF-8 text ({error}). {where}") from error
    return [line.strip() for line in text.splitlines()]


Resample = Literal["bilinear", "bicubic"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in 0..1
_DEVIATION = (0.229, 0.224, 0.225)


class Tag(NamedTuple):
    """A tag of an image and its probability."""

    name: str
    score: float


def preprocess(images: Sequence[Image.Image], size: int, resample: Resample = "bilinear") -> Tensor:
    """Pictures as RAM takes them: squashed to a square, whatever their aspect, and normalised.

    Args:
        images: pictures of any size and mode.
        size: side of the square in pixels.
        resample: `bilinear` as in RAM's own repository; `bicubic` as in the demo of Grounded-SAM, which resizes the
            picture before it hands it over.

    Returns:
        `[B, 3, size, size]` float32.
    """
    squares = [image.convert("RGB").resize((size, size), _FILTERS[resample]) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))  # [B, size, size, 3] uint8
    return (pixels.permute(0, 3, 1, 2) / 255 - _channels(_MEAN)) / _channels(_DEVIATION)  # -> [B, 3, size, size]


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]  # [3, 1, 1]


class RamTagger:
    """RAM or RAM++ with its tag list, on one device, its weights fixed.

    Attributes:
        model: the model. Its weights may not change: what doesn't depend on the image was computed once.
        tags: names, in the order of the model's queries.
        settings: all that decides which tags an image gets, as plain values for a manifest.
    """

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
        """Places the model.

        Args:
            model: see `load_ram`.
            tags: one a query.
            thresholds: of probabilities, one a query.
            device: where the model runs.
            dtype: what autocast computes in, float32 for none; by default bfloat16 on a GPU, float32 on a CPU.
            resample: see `preprocess`.

        Raises:
            ValueError: if the counts differ from the model's number of tags; or for an unknown filter.
        """
        check_counts(list(tags), list(thresholds), model.config.num_tags)
        if resample not in _FILTERS:
            raise ValueError(f"resample: found {resample!r}, expected one of {', '.join(_FILTERS)}")
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.resample: Resample = resample
        self.tags = list(tags)
        self.model = model.to(self.device).requires_grad_(False).eval()
        if model.config.kind == "ram_plus" and self.dtype != torch.float32:
            # More than a third of RAM++. float16, since it keeps three bits more than bfloat16 of numbers of this size.
            model.label_embed.data = model.label_embed.data.half()
        self._thresholds = torch.tensor(thresholds, dtype=torch.float32)
        with torch.inference_mode():
            self._queries = self.model.tag_queries() if model.config.kind == "ram" else None
        self.settings: dict[str, Any] = {
            "kind": model.config.kind,
            "image_size": model.config.image_size,
            "resample": resample,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        tag_list: Path,
        thresholds: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        resample: Resample = "bilinear",
        converted_folder: Path | None = None,
    ) -> RamTagger:
        """A tagger of published weights.

        Args:
            path: .pth or converted safetensors, see `load_ram`.
            tag_list: RAM's ram_tag_list.txt.
            thresholds: RAM's ram_tag_list_threshold.txt.
            device: see the constructor.
            dtype: see the constructor.
            resample: see `preprocess`.
            converted_folder: see `load_ram`.

        Raises:
            ValueError: if the weights can't be read.
            ValueError: if the lists can't be read, or don't belong to the weights.
        """
        names, limits = read_tag_list(tag_list), read_thresholds(thresholds)  # first: cheaper to fail on
        model, checkpoint = load_ram(path, converted_folder)
        tagger = cls(model, names, limits, device=device, dtype=dtype, resample=resample)
        tagger.settings |= {
            "checkpoint": checkpoint.source_name,
            "checkpoint_sha256": checkpoint.source_sha256,
            "tag_list_sha256": sha256_of(tag_list),
            "thresholds_sha256": sha256_of(thresholds),
        }
        return tagger

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as this model takes them: `[B, 3, image_size, image_size]` float32 on the CPU."""
        return preprocess(images, self.model.config.image_size, self.resample)

    @torch.inference_mode()
    def scores(self, pixel_values: Tensor) -> Tensor:
        """Probability of each tag.

        Args:
            pixel_values: `[B, 3, image_size, image_size]` from `preprocess`.

        Returns:
            `[B, T]` float32 on the CPU.

        Raises:
            ValueError: for another shape.
            NonFiniteScoresError: where an image has no finite scores. Before that it is tried again in float32.
        """
        side = self.model.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pixel_values: found shape {list(pixel_values.shape)}, expected [B, 3, {side}, {side}]")
        pixel_values = pixel_values.to(self.device)
        logits = self._logits(pixel_values, self.dtype)
        again = _rows_not_finite(logits)
        if again and self.dtype != torch.float32:
            logits[again] = self._logits(pixel_values[again], torch.float32)
            again = _rows_not_finite(logits)
        if again:
            raise NonFiniteScoresError("RAM", again)
        return logits.sigmoid()

    def tag(self, images: Sequence[Image.Image]) -> list[list[Tag]]:
        """Tags of each picture whose probability is above their threshold, in the tag list's order."""
        if not images:
            return []
        return self.select(self.scores(self.preprocess(images)))

    def select(self, scores: Tensor) -> list[list[Tag]]:
        """Tags of each row of `scores` `[B, T]` that are strictly above their threshold, in the tag list's order."""
        tags: list[list[Tag]] = [[] for _ in scores]
        rows, queries = torch.nonzero(scores > self._thresholds, as_tuple=True)
        for row, query in zip(rows.tolist(), queries.tolist(), strict=True):
            tags[row].append(Tag(self.tags[query], scores[row, query].item()))
        return tags

    def _logits(self, pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(pixel_values, self._queries).float().cpu()  # [B, T]


def _rows_not_finite(logits: Tensor) -> list[int]:
    return torch.nonzero(~logits.isfinite().all(dim=1))[:, 0].tolist()
