"""What the page asks for: pictures, the words of tokens and regions, maps of words, and differences of maps."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from patch_aligned.analysis.localisation import PictureCell, map_difference, picture_cell
from patch_aligned.analysis.token_map import map_entry
from patch_aligned.analysis.words import MappedImage, PursuitSettings, colours_of_words, english_words, mappers_of
from patch_aligned.annotated_sets import union_rle
from patch_aligned.cells import TokenGrid
from patch_aligned.images import ImageFileError, decode_image, decode_upload, image_path, thumbnail
from patch_aligned.masks import covered_tokens_of_regions, token_coverage_of_regions
from patch_aligned.models.base import VisionLanguageModel, tokens_of_image
from patch_aligned.pad import AnnotatedImage, AnnotationIndex
from patch_aligned.web import grid_edges, jpeg_address

RULE = "mid_range"
MIN_COVERAGE = 0.5
MOST_PIXELS = 50_000_000
"""Of an upload: 150 MB once it is decoded."""
MOST_OPEN = 8
"""Images that are kept with their visual tokens. An upload before them must be sent again."""
_UPLOAD = "upload:"
_SHOWN_SIDE, _THUMBNAIL_SIDE = 1600, 120
_LISTED, _SEARCHED = 24, 5000  # records of one answer, and records that it looks through


@dataclass
class OpenImage:
    """An image with its annotations, and what the models make of it."""

    key: str
    image: Image.Image
    record: AnnotatedImage | None = None
    tokens: dict[str, tuple[Tensor, TokenGrid]] = field(default_factory=dict)  # by model: [S, D] in the cells' order
    colours: dict[str, str] = field(default_factory=dict)  # of words on the whole image

    def truth(self, label: str) -> str | None:
        """The mask of all regions of a label, whatever its case, as compressed RLE; None where there is none."""
        regions, masks = (self.record.regions, self.record.coco_masks()) if self.record else ((), [])
        wanted = label.strip().lower()
        own = [mask for region, mask in zip(regions, masks, strict=True) if region.tag.strip().lower() == wanted]
        return coco_mask.merge(own)["counts"].decode() if own else None

    def described(self) -> dict[str, Any]:
        """A picture of it, its size, and the labels of its annotations."""
        shown = self.image.copy()
        shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        labels = dict.fromkeys(region.tag for region in (self.record.regions if self.record else ()))
        return {"image": self.key, "size": self.image.size, "picture": jpeg_address(shown), "labels": list(labels)}


class Session:
    """Models with the images of a set, and with uploads. Models of one tower share its features."""

    def __init__(
        self, models: Sequence[VisionLanguageModel], index: AnnotationIndex | None, image_folder: Path, rounds: int = 5
    ):
        self.models, self.index, self.image_folder = list(models), index, image_folder
        self.settings, self.word_list = PursuitSettings(rounds), english_words()
        self._mappers = mappers_of(models, self.settings, self.word_list)
        self._open: OrderedDict[str, OpenImage] = OrderedDict()
        self._lock = RLock()  # questions of several tabs are answered one by one

    def images(self, text: str = "", start: int = 0) -> dict[str, Any]:
        """List images of the set from a record on, whose id, caption or a label has the text, ignoring case."""
        listed: list[dict[str, Any]] = []
        row, total = start, 0 if self.index is None else len(self.index)
        while row < min(total, start + _SEARCHED) and len(listed) < _LISTED:
            record = self.index[row]  # type: ignore[index]  # total is 0 without an index
            searched = (record.image_id, record.caption, *(region.tag for region in record.regions))
            if any(text.lower() in words.lower() for words in searched):
                picture = None
                with contextlib.suppress(ImageFileError):  # the reason is said when it is opened
                    smaller = thumbnail(self.image_folder, record.image_id, record.size_wh, _THUMBNAIL_SIDE)
                    picture = jpeg_address(smaller)
                listed.append({"image": record.image_id, "thumbnail": picture})
            row += 1
        return {"images": listed, "next": row if row < total else None}

    def upload(self, content: bytes) -> dict[str, Any]:
        """Open an image from its file's bytes, and describe it."""
        image = decode_upload(content, MOST_PIXELS)
        key = _UPLOAD + hashlib.sha256(content).hexdigest()[:32]
        return self._keep(OpenImage(key, image)).described()

    def picture(self, image: str) -> dict[str, Any]:
        """Open an image of the set, or an upload again, and describe it. No model runs yet."""
        with self._lock:
            return self._opened(image).described()

    def words(self, image: str) -> dict[str, Any]:
        """The first word of each token, in every model."""
        with self._lock:
            opened = self._seen(image)
            maps = {name: self._mappers[name].map(*seen, rounds=1) for name, seen in opened.tokens.items()}
            mapped = MappedImage(image, np.asarray(opened.image), maps)
            opened.colours = colours_of_words(mapped)
            entries = [map_entry(*item, opened.colours) | {"grid": grid_edges(item[1].grid)} for item in maps.items()]
            return {"top_cosine": mapped.top_cosine, "maps": entries}

    def region(
        self, image: str, point: tuple[float, float] | None = None, polygon: list[float] | None = None
    ) -> dict[str, Any]:
        """The words of the token at a point, or of the mean of the tokens that a polygon covers, in every model.

        Both are in pixels; a polygon has x and y of each corner in turn, and covers tokens by half, as in training.
        """
        if (point is None) == (polygon is None):
            raise ValueError("Found both or neither of a point and a polygon; expected one of them.")
        with self._lock:
            opened = self._seen(image)
            rle_masks = [union_rle([polygon], opened.image.size, "region")] if polygon else []
            found = []
            for name, (tokens, grid) in opened.tokens.items():
                covered = covered_tokens_of_regions(rle_masks, grid.image_wh, grid, MIN_COVERAGE, "region")
                cells = grid.cells_under(point[:1], point[1:]).ravel() if point else np.flatnonzero(covered)
                cells = cells[cells >= 0]
                entry: dict[str, Any] = {"projector": name, "cells": cells.tolist()}
                if len(cells):
                    width, height = grid.image_wh
                    mean = tokens[torch.from_numpy(cells)].mean(dim=0, keepdim=True)  # [S, D] -> [1, D]
                    one_cell = TokenGrid(grid.image_wh, (0, width), (0, height))
                    entry |= map_entry(name, self._mappers[name].map(mean, one_cell), opened.colours)
                found.append(entry)
            return {"regions": found}

    def heat(self, image: str, word: str, less: list[str] | None = None) -> dict[str, Any]:
        """The cosine of a word with each token, in every model; with IoU where the image has regions of this label.

        `less` names two models, of which the second's map is subtracted from the first's.
        """
        names = [model.name for model in self.models]
        if less and (len(less) != 2 or not set(less) <= set(names)):
            raise ValueError(f"less: found {less}, expected two of the models {', '.join(names)}.")
        with self._lock:
            opened = self._seen(image)
            truth, cells = opened.truth(word), {}
            for model in self.models:
                tokens, grid = opened.tokens[model.name]
                areas = np.zeros((1, *grid.shape))
                if truth is not None:
                    areas = token_coverage_of_regions([truth], grid.image_wh, grid, image)  # [1, rows, cols]
                direction = model.words.directions_of_labels([word])[0].to(tokens)  # [D]
                coverage = torch.from_numpy(areas[0]).to(tokens.device)
                cells[model.name] = picture_cell(grid, direction, tokens, coverage, RULE)
        answer: dict[str, Any] = {"truth": truth, "maps": [_heat_entry(name, cell) for name, cell in cells.items()]}
        if less:
            grid, values = map_difference(*(cells[name] for name in less))
            answer["difference"] = {"grid": grid_edges(grid), "cosine": values.ravel().tolist()}
        return answer

    def _opened(self, key: str) -> OpenImage:
        """An image that is open, or one of the set."""
        if key in self._open:
            return self._keep(self._open[key])
        row = None if self.index is None or key.startswith(_UPLOAD) else self.index.find(key)
        if row is None:
            raise FileNotFoundError(f"{key}: found no such image, expected one of the set; send an upload again.")
        assert self.index is not None
        record = self.index[row]
        image = decode_image(image_path(self.image_folder, record.image_id))
        if image.size != record.size_wh:
            sizes = f"found {list(image.size)} pixels, expected {list(record.size_wh)} as in its record"
            raise ValueError(f"{key}: {sizes}. Is --image-folder {self.image_folder} the right one?")
        return self._keep(OpenImage(key, image, record))

    def _keep(self, opened: OpenImage) -> OpenImage:
        with self._lock:
            opened = self._open.setdefault(opened.key, opened)
            self._open.move_to_end(opened.key)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return opened

    def _seen(self, key: str) -> OpenImage:
        """An image with its visual tokens in every model."""
        opened = self._opened(key)
        for model, tokens, grid in tokens_of_image([] if opened.tokens else self.models, opened.image):
            own = TokenGrid(grid.image_wh, grid.x_edges, grid.y_edges)
            opened.tokens[model.name] = tokens[torch.from_numpy(grid.tokens).ravel()], own  # [T, D] -> [S, D]
        return opened


def _heat_entry(name: str, cell: PictureCell) -> dict[str, Any]:
    return {
        "projector": name,
        "grid": grid_edges(cell.grid),
        "cosine": cell.cosine.ravel().tolist(),
        "predicted": cell.predicted.ravel().nonzero().ravel().tolist(),
        "iou": None if math.isnan(cell.iou_px) else cell.iou_px,
    }
