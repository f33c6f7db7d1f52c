"""Watch alignment while a projector trains: heat maps and the curve of Align, on images that the training leaves out.

Vision tower and projector alone run. No random state is used, and nothing of the training changes.

Letters: R regions of an image, T visual tokens of an image, D width of the LLM, L labels.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from patch_aligned.analysis.alignment import over_grids, score_regions
from patch_aligned.analysis.localisation import PictureRow, picture_cell, place_jpeg, require_matplotlib
from patch_aligned.cells import Layout, TokenGrid
from patch_aligned.files import written_whole
from patch_aligned.images import ImageFileError, decode_image, image_path, stored_size_wh
from patch_aligned.labels import LabelTokenizer, label_embeddings, pad_label_ids
from patch_aligned.masks import areas_px, token_coverage_of_regions
from patch_aligned.pad import AnnotatedImage, AnnotationIndex
from patch_aligned.tables import number
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.web import jpeg_address, render

SEED = 0
"""Of the choice of held-out data: the same for all seeds of the training."""
PAGE, COLUMNS = "patch_pictures.html", "patch_pictures.jsonl"
_PICTURED = 8
_RULE = "mid_range"
_SCORES = {"eval/align": "iou_px", "eval/contrast": "contrast", "eval/retrieval": "top1"}

See = Callable[[Image.Image], tuple[Layout, Callable[[], Tensor]]]
"""An image -> its layout, and a function that computes its visual tokens `[T, D]` with the weights of the moment."""


def held_out_rows(
    index: AnnotationIndex, flag: str, count: int, least: int, is_usable: Callable[[AnnotatedImage], Any]
) -> tuple[int, ...]:
    """Choose `count` rows by `SEED`. Raises `ValueError` if there are fewer than `least`, or none is left to train."""
    order = random.Random(SEED).sample(range(len(index)), len(index))
    rows = tuple(islice((row for row in order if is_usable(index[row])), max(count, 0)))
    if not least <= len(rows) < len(index):
        raise ValueError(
            f"--{flag} {count}: found {len(rows)} {flag.rpartition('_')[2]} to hold out in {len(index)} records, "
            f"expected at least {least}, and records that are left for training. Pass a smaller number, or more data."
        )
    return rows


def rows_to_watch(arguments: PatchArguments, index: AnnotationIndex, image_folder: Path) -> tuple[int, ...]:
    """Choose images with regions to hold out; none if no steps are asked for."""

    def is_usable(image: AnnotatedImage) -> bool:
        try:
            return bool(image.regions) and stored_size_wh(image_folder, image.image_id) == image.size_wh
        except ImageFileError:
            return False

    is_asked = arguments.patch_picture_steps > 0 or arguments.eval_align_steps > 0
    return held_out_rows(index, "eval_align_images", arguments.eval_align_images, 1, is_usable) if is_asked else ()


class HeldOutCallback(TrainerCallback):
    """Calls `measure`, on all ranks, before the first step, every so many, and after the last."""

    def __init__(self, trainer: Any, *every: int) -> None:
        self.trainer, self._every = trainer, every

    def measure(self) -> None:
        """Measure and log, in eval mode: so TRL keeps its figures of the training for the next log."""
        raise NotImplementedError

    def is_due(self, steps: int) -> bool:
        """Whether it is time for what is measured every so many steps; never for 0."""
        step = self.trainer.state.global_step
        return steps > 0 and (step == self.trainer.state.max_steps or step % steps == 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, unless the run is resumed."""
        if not state.global_step:
            self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if any(map(self.is_due, self._every)):
            is_loss_due = control.should_log
            self.trainer.model.eval()
            self.measure()
            self.trainer.model.train()
            control.should_log = is_loss_due  # which logging has cleared


@dataclass(frozen=True)
class _Watched:
    visual_tokens: Callable[[], Tensor]  # [T, D]
    grids: list[tuple[TokenGrid, Tensor]]  # with [R, rows, cols], shares of cells that regions cover; whole image first
    own: Tensor  # [R], index of each region's label
    row: PictureRow
    region: int  # of the row


class AlignmentWatch(HeldOutCallback):
    """Logs `eval/align`, `eval/contrast` and `eval/retrieval`, as `patch-aligned analyze` measures them, and draws.

    The first few images are drawn, each with its largest region.
    """

    def __init__(
        self, trainer: Any, arguments: PatchArguments, images: Sequence[AnnotatedImage], image_folder: Path,
        labels: LabelTokenizer, see: See,
    ) -> None:  # fmt: skip
        super().__init__(trainer, arguments.eval_align_steps, arguments.patch_picture_steps)
        if arguments.patch_picture_steps > 0:
            require_matplotlib()
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "--patch_picture_steps and --eval_align_steps run the projector alone, but FSDP gathers its weights in "
                "whole passes only. Leave them out, or train by DDP or DeepSpeed."
            )
        self._arguments, self._folder = arguments, Path(trainer.args.output_dir)
        tags = sorted({region.tag for image in images for region in image.regions})
        self._label_ids = pad_label_ids([labels(tag) for tag in tags])
        self._watched = [_watched(image, image_folder, tags, see) for image in images]
        self._pictured = self._watched[:_PICTURED]

    @torch.no_grad()
    def measure(self) -> None:
        """Compute the visual tokens of all images, and log and draw what is due."""
        with self.trainer.compute_loss_context_manager():
            tokens = [watched.visual_tokens().float() for watched in self._watched]  # [T, D] each
        ids, lengths = (part.to(tokens[0].device) for part in self._label_ids)
        labels = label_embeddings(ids, lengths, self.trainer.model.get_input_embeddings()).to(tokens[0])
        directions = F.normalize(labels, dim=-1)  # [L, D]
        if self.is_due(self._arguments.eval_align_steps):
            pairs, least = zip(self._watched, tokens, strict=True), self._arguments.patch_min_coverage
            scores = [_scores(watched, of_image, directions, least) for watched, of_image in pairs]
            means = {name: torch.cat([of[score] for of in scores]).nanmean().item() for name, score in _SCORES.items()}
            self.trainer.log({name: mean for name, mean in means.items() if not math.isnan(mean)})
        if self.is_due(self._arguments.patch_picture_steps) and self.trainer.state.is_world_process_zero:
            self._draw(tokens, directions)

    def _draw(self, tokens: Sequence[Tensor], directions: Tensor) -> None:
        """Add a column to the strip, and hand its maps to TensorBoard and W&B."""
        step, cells, maps = self.trainer.state.global_step, [], {}
        for place, (watched, of_image) in enumerate(zip(self._pictured, tokens, strict=False), start=1):
            grid, coverage = watched.grids[0]
            label, share = directions[watched.own[watched.region]], coverage[watched.region].to(of_image.device)
            cell = picture_cell(grid, label, of_image, share, _RULE)
            jpeg = place_jpeg(watched.row, cell)
            maps[f"pictures/{place} {watched.row.label}"] = Image.open(io.BytesIO(jpeg))
            cosines = f"{number(cell.cosine.min().item(), 2)} … {number(cell.cosine.max().item(), 2)}"
            cells.append({"jpeg": jpeg_address(jpeg), "cosines": cosines, "iou": number(cell.iou_px, 2)})
        self._write({"step": step, "cells": cells, "of": [[w.row.image_id, w.row.label] for w in self._pictured]})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, shown in maps.items():
                    callback.tb_writer.add_image(name, np.asarray(shown), step, dataformats="HWC")
            elif isinstance(callback, WandbCallback):
                images = {name: callback._wandb.Image(shown) for name, shown in maps.items()}
                callback._wandb.log(images | {"train/global_step": step})

    def _write(self, column: Mapping[str, Any]) -> None:
        """Write the page with one more column. A resumed run keeps the columns up to its checkpoint."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / COLUMNS
        before = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else [])
        columns = [one for one in before if one["step"] < column["step"] and one["of"] == column["of"]] + [column]
        rows = [(watched.row, jpeg_address(place_jpeg(watched.row))) for watched in self._pictured]
        values = {"title": f"Training {self._folder.name}", "columns": columns, "rows": rows}
        with written_whole(self._folder / PAGE) as page, written_whole(file) as lines:
            page.write_text(render(__package__, "strip.html.j2", **values), encoding="utf-8")
            lines.write_text("".join(json.dumps(one) + "\n" for one in columns), encoding="utf-8")


def _watched(image: AnnotatedImage, image_folder: Path, tags: Sequence[str], see: See) -> _Watched:
    pixels = decode_image(image_path(image_folder, image.image_id))
    layout, visual_tokens = see(pixels)
    masks = [region.rle_mask for region in image.regions]
    grids = (layout.whole, *(grid for grid in layout.grids if grid is not layout.whole))
    coverages = (token_coverage_of_regions(masks, image.size_wh, grid, image.image_id) for grid in grids)
    own = torch.tensor([tags.index(region.tag) for region in image.regions])
    largest = int(areas_px(image.coco_masks()).argmax())
    truth = coco_mask.decode(image.coco_masks()[largest]).astype(bool)
    row = PictureRow(image.image_id, image.regions[largest].tag, np.asarray(pixels), truth)
    pairs = list(zip(grids, map(torch.from_numpy, coverages), strict=True))
    return _Watched(visual_tokens, pairs, own, row, largest)


def _scores(watched: _Watched, tokens: Tensor, directions: Tensor, min_coverage: float) -> dict[str, Tensor]:
    """Score the regions of an image by its tokens `[T, D]`: `[R]` each."""
    own, of_grids = watched.own.to(tokens.device), []
    for grid, coverage in watched.grids:
        seen, share = tokens[grid.tokens.ravel()], coverage.to(tokens.device)  # [S, D], [R, rows, cols]
        of_grids.append(score_regions(seen, directions, own, share, rule=_RULE, min_coverage=min_coverage))
    return over_grids(of_grids)
