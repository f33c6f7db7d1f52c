"""Add the targets of the patch loss to the batches of any data collator for a vision-language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers.image_utils import load_image

from patch_aligned.cells import Layout
from patch_aligned.masks import rle_of_mask
from patch_aligned.models.layouts import layouts_of
from patch_aligned.pad import AnnotatedImage, Region
from patch_aligned.train.objective import PatchObjective
from patch_aligned.train.picture import PicturedImage, PicturedRegion, save_picture

TARGETS = "patch_targets"
"""Key of the targets in a batch."""
IGNORED = -100
"""Label of a token that the caption loss leaves out."""
_PANEL = 420  # pixels


@dataclass(frozen=True)
class _Sample:
    name: str
    images: list[Image.Image]
    layouts: list[Layout]
    annotations: list[AnnotatedImage | None]
    targets: list[dict[str, Tensor]]


@dataclass
class RegionCollator:
    """Calls a trainer's data collator, and adds the targets of the samples' regions under `TARGETS`."""

    collator: Callable[[list[Any]], Any]  # the trainer's own
    processor: Any  # of the model
    objective: PatchObjective  # makes the targets
    token_id: int  # stands for a visual token in `input_ids`
    regions: str | None  # column of regions; None if the objective's PAD file has them
    image_id: str  # column of the paths by which the PAD file names images
    picture: Path | None = None  # where to draw the next batch, without suffix; None for not at all

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """Collate samples, and check that regions fit their images, and image tokens the layouts."""
        read = [self._read(sample, row) for row, sample in enumerate(samples)]  # before the collator changes them
        unanswered = [row for row, sample in enumerate(samples) if _is_unanswered(sample)]
        batch = self.collator([{key: sample[key] for key in sample if key != self.regions} for sample in samples])
        labels = batch.get("labels")
        if unanswered and labels is not None and len(labels) == len(read):
            labels = batch["labels"] = labels.index_fill(0, torch.tensor(unanswered), IGNORED)
        self._check_image_tokens(batch["input_ids"], read)
        worker = get_worker_info()
        if self.picture is not None and (worker is None or worker.id == 0):
            _draw(read, self.picture)
        self.picture = None
        targets = [image for sample in read for image in sample.targets]
        batch[TARGETS] = self.objective.collate(targets, is_joined=True) | {
            "samples": [sample.name for sample in read],
            "visual_tokens": sum(layout.length for sample in read for layout in sample.layouts),
            "has_text": labels is None or bool((labels != IGNORED).any()),
        }
        return batch

    def _read(self, sample: Mapping[str, Any], row: int) -> _Sample:
        given = _images_of(sample)
        ids = listed(sample.get(self.image_id))
        name = f"sample {sample.get('id') or ', '.join(map(str, ids)) or f'in row {row} of the batch'}"
        images = [load_image(image) if isinstance(image, str) else image for image in given]  # as processors do
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"{name}: found an image of type {type(image).__name__}, expected one of PIL or a path"
                )
        layouts = layouts_of(self.processor, images) if images else []
        annotations: list[AnnotatedImage | None]
        index = self.objective.index
        if index is not None:
            rows = [index.find(image_id) for image_id in ids] if ids else [None] * len(images)
            annotations = [None if row is None else index[row] for row in rows]
            name = f"{index.source}: {name}"
        else:
            size = sample.get("size")
            stated: Any = size if isinstance(size, list | tuple) and size else [image.size for image in images]
            sizes = [stated] if stated and isinstance(stated[0], int) else stated
            annotations = _annotations_of(listed(sample.get(str(self.regions))), sizes, name)
        if len(annotations) != len(images):
            raise ValueError(
                f"{name}: found {len(annotations)} image ids or sizes, expected one for each of {len(images)} images"
            )
        pairs = zip(annotations, layouts, strict=True)
        targets = [self.objective.targets_of(annotation, layout, name) for annotation, layout in pairs]
        return _Sample(name, images, layouts, annotations, targets)

    def _check_image_tokens(self, input_ids: Tensor, read: Sequence[_Sample]) -> None:
        found = (input_ids == self.token_id).sum(dim=1).tolist()
        rows = [[sample] for sample in read]
        if len(found) != len(read):  # packed: samples share rows, in order
            found, rows = [sum(found)], [list(read)]
        for tokens, samples in zip(found, rows, strict=True):
            layouts = [layout for sample in samples for layout in sample.layouts]
            expected = sum(layout.length for layout in layouts)
            if tokens != expected:
                sizes = ", ".join("{} x {}".format(*layout.image_wh) for layout in layouts)
                raise ValueError(
                    f"{'; '.join(sample.name for sample in samples)}: found {tokens} image tokens in input_ids, "
                    f"expected {expected} by {type(self.processor).__name__} for images of {sizes or 'no size'}. The "
                    "collator must process the sample's `image`, `images` or `messages` unchanged, with the trainer's "
                    "processor, and leave room for them (max_length)."
                )


def _images_of(sample: Mapping[str, Any]) -> list[Any]:
    """Return the images of a sample: of its columns `images` or `image`, or of its messages."""
    if (images := sample.get("images", sample.get("image"))) is not None:
        return listed(images)
    parts = [part for turn in listed(sample.get("messages")) for part in listed(turn["content"])]
    return [part["image"] for part in parts if isinstance(part, Mapping) and part.get("image") is not None]


def listed(value: Any) -> list[Any]:
    """Return the values as a list: empty for None, of one value for what is not a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _is_unanswered(sample: Mapping[str, Any]) -> bool:
    """Whether a conversation has answers, and all are empty: an image without caption."""
    turns = listed(sample.get("completion", sample.get("messages")))
    turns = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in turns]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    texts = [part if isinstance(part, str) else part.get("text") or "" for text in answers for part in listed(text)]
    return bool(answers) and not "".join(texts).strip()


def _annotations_of(
    regions: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]], name: str
) -> list[AnnotatedImage | None]:
    """Group a sample's regions, which may be as PAD's `labels`, by image."""
    of_image: list[list[Region]] = [[] for _ in sizes]
    for number, region in enumerate(regions):
        image, tag, rle_mask, box = (region.get(key) for key in ("image", "tag", "rle_mask", "bbox"))
        image, box = image or 0, tuple(box or ())
        if not 0 <= image < len(sizes):
            raise ValueError(f"{name}, region {number}: found image {image}, but the sample has {len(sizes)} images")
        if not isinstance(tag, str) or not (isinstance(rle_mask, str) or box):
            raise ValueError(
                f"{name}, region {number}: found {sorted(key for key in region if region[key])}, expected 'tag', and "
                "'rle_mask' as a string of COCO's compressed RLE or 'bbox' as [x1, y1, x2, y2] in pixels"
            )
        if not rle_mask:
            mask = np.zeros(sizes[image][::-1], dtype=bool)
            left, top, right, bottom = (max(0, round(edge)) for edge in box)
            mask[top:bottom, left:right] = True
            rle_mask = rle_of_mask(mask)
        of_image[image].append(Region(tag, box, rle_mask))
    return [AnnotatedImage(name, (size[0], size[1]), "", tuple(own)) for size, own in zip(sizes, of_image, strict=True)]


def _draw(read: Sequence[_Sample], path: Path) -> None:
    """Draw what the loss reads: each grid of tokens, over the part of the image that it looks at."""
    pictured = []
    for sample in read:
        for image, layout, annotation, targets in zip(
            sample.images, sample.layouts, sample.annotations, sample.targets, strict=True
        ):
            original, is_skipped = image.convert("RGB"), bool(targets["counts"][2])
            regions = () if annotation is None or is_skipped else annotation.regions
            covered = np.zeros((len(regions), layout.length), dtype=bool)
            region_of_view = targets["region_position"][targets["view_region"]].numpy()
            np.logical_or.at(covered, region_of_view, targets["region_tokens"].numpy())
            for grid in layout.grids:
                left, top, right, bottom = grid.box_xyxy_px
                scale = _PANEL / max(right - left, bottom - top)
                panel_wh = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
                seen = original.transform(panel_wh, Image.Transform.EXTENT, grid.box_xyxy_px)
                shown = [
                    PicturedRegion(region.tag, region.rle_mask, tokens[grid.tokens.ravel()] if tokens.any() else None)
                    for region, tokens in zip(regions, covered, strict=True)
                ]
                x_edges01 = (np.array(grid.x_edges) - left) / (right - left)
                y_edges01 = (np.array(grid.y_edges) - top) / (bottom - top)
                pixels = torch.from_numpy(np.asarray(seen) / np.float32(255)).permute(2, 0, 1)  # [3, height, width]
                title = f"{sample.name}, {grid.kind}, {grid.rows} x {grid.cols} tokens"
                pictured.append(PicturedImage(original, pixels, title, shown, (x_edges01, y_edges01)))
    save_picture(pictured, None, path)
