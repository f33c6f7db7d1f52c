"""The patch objective, for any trainer: targets from PAD records and layouts, loss from visual tokens and targets.

A region counts once in each grid of its image in which it covers a token: that is a view of the region. Its cosine is
the mean of its views' cosines, so that an image's many tiles do not drown its thumbnail.

Letters: N images, S visual tokens of an image, T of all images, D width of the LLM, R regions of the batch, V views of
them (V = R where images have one grid), L distinct labels of the batch, K tokens of the longest label.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patch_aligned.cells import Layout
from patch_aligned.labels import LabelTokenizer, label_embeddings, pad_label_ids
from patch_aligned.loss import (
    contrast_and_retrieval,
    contrastive_loss,
    cosine_table,
    patch_loss,
    region_cosines,
    region_embeddings,
)
from patch_aligned.masks import PatchMaskError, covered_tokens_of_grids
from patch_aligned.pad import AnnotatedImage, AnnotationError, AnnotationIndex, open_annotation_index
from patch_aligned.train.arguments import Grids, PatchArguments

logger = logging.getLogger(__name__)

NO_RECORD = -1
SYNONYM_COSINE = 0.8
"""Labels whose embeddings have a larger cosine are no negatives of each other ("man", "person")."""
_LABELS_AT_ONCE = 1024
_SMALLEST_NORM = 1e-6
"""Shorter views get no gradient, since that of a cosine grows as one over the norm. Fresh projectors may be zero."""


class PatchObjective:
    """Targets of images, and the patch loss and its metrics of a batch.

    A batch has integers and bools only, since engines may cast floats:
        region_row `[R]`, region_tokens `[V, S]`, view_region `[V]`, region_label `[R]`, label_ids `[L, K]`,
            label_lengths `[L]`: inputs of the loss. `region_row` is the sample's row in the batch.
        image_row, record_row `[N]`, region_position `[R]`: their origin, for the picture.
        counts `[3]`: images without a record, regions that cover no token, records skipped for their size.

    `index` has the annotated images; it is None if each sample brings its regions. `grids` are those that regions are
    read in, of images that have several; of one that lacks them, all.
    """

    def __init__(
        self, arguments: PatchArguments, labels: LabelTokenizer, index: AnnotationIndex | None, grids: Grids = "all"
    ) -> None:
        self.arguments = arguments
        self.labels = labels
        self.index = index
        self.grids = grids

    def targets(self, image_id: str | None, layout: Layout) -> dict[str, Tensor]:
        """Return the tokens that each region of an image covers, and the ids of its label."""
        assert self.index is not None
        row = self.index.find(image_id) if image_id is not None else None
        image = self.index[row] if row is not None else None
        targets = self.targets_of(image, layout, f"{self.index.source}: image_id {image_id!r}")
        is_used = row is not None and not targets["counts"][2]
        return targets | {"record_row": torch.tensor(row if is_used else NO_RECORD)}

    def targets_of(self, image: AnnotatedImage | None, layout: Layout, name: str) -> dict[str, Tensor]:
        """Return the same of an image whose annotation is at hand, or None. `name` is that of the record in errors.

        Raises:
            PatchMaskError: if the record's size is not the image's and `--patch_on_error` is `fail`.
        """
        found = self._covered_tokens(image, layout, name) if image is not None else None
        is_skipped = image is not None and found is None
        covered = np.zeros((0, 1, layout.length), dtype=bool) if found is None else found
        regions, grids = covered.any(axis=2).nonzero()  # [V] views that cover a token, in the order of their regions
        position, view_region = np.unique(regions, return_inverse=True)  # [R], [V]
        labels = [self.labels(image.regions[index].tag) for index in position.tolist()] if image is not None else []
        return {
            "region_tokens": torch.from_numpy(covered[regions, grids]),
            "view_region": torch.from_numpy(view_region),
            "region_position": torch.from_numpy(position),
            "label_ids": torch.tensor([token for label in labels for token in label], dtype=torch.int64),
            "label_lengths": torch.tensor([len(label) for label in labels], dtype=torch.int64),
            "record_row": torch.tensor(NO_RECORD),
            "counts": torch.tensor([image is None, len(covered) - len(position), is_skipped], dtype=torch.int64),
        }

    def collate(self, targets: Sequence[dict[str, Tensor]], is_joined: bool = False) -> dict[str, Tensor]:
        """Concatenate the regions of all rows, with each label once; rows without image are `{}`.

        With `is_joined` the rows are images of different lengths: `region_tokens` are then `[V, T]`.
        """
        rows = torch.tensor([row for row, extra in enumerate(targets) if extra], dtype=torch.int64)  # [rows with image]
        given = [extra for extra in targets if extra]
        regions = torch.tensor([len(extra["label_lengths"]) for extra in given], dtype=torch.int64)
        label_ids = _join(given, "label_ids").split(_join(given, "label_lengths").tolist())
        labels = [tuple(ids.tolist()) for ids in label_ids]  # [R]
        place = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        padded, lengths = pad_label_ids(list(place))
        views = torch.tensor([len(extra["view_region"]) for extra in given], dtype=torch.int64)
        first_region = (regions.cumsum(0) - regions).repeat_interleave(views)  # [V]
        blocks = [extra["region_tokens"] for extra in given]
        return {
            "region_row": rows.repeat_interleave(regions),
            "region_tokens": torch.block_diag(*blocks) if is_joined and blocks else _join(given, "region_tokens"),
            "view_region": first_region + _join(given, "view_region"),
            "region_position": _join(given, "region_position"),
            "region_label": torch.tensor([place[label] for label in labels], dtype=torch.int64),
            "label_ids": padded,
            "label_lengths": lengths,
            "image_row": rows,
            "record_row": torch.tensor([int(extra["record_row"]) for extra in given], dtype=torch.int64),
            "counts": sum((extra["counts"] for extra in given), start=torch.zeros(3, dtype=torch.int64)),
        }

    def loss(
        self,
        visual_tokens: Tensor,
        sample_of_image: Tensor,
        batch: Mapping[str, Tensor],
        embed_words: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of Eq. 5 (with `cosine+nce`, InfoNCE added) and the metrics of this micro-batch.

        Args:
            visual_tokens: `[N, S, D]`, or `[T, D]` of images of different lengths, joined.
            sample_of_image: `[N]`, row of the batch that each image belongs to, rising.
            batch: output of `collate`.
            embed_words: ids `[...]` -> `[..., D]`.
        """
        # Each rank calls the embedding once per micro-step, even without regions: under ZeRO-3 it is a collective call.
        labels = label_embeddings(batch["label_ids"], batch["label_lengths"], embed_words)  # [L, D]
        region_label, view_region, images = batch["region_label"], batch["view_region"], len(sample_of_image)
        regions, region_tokens = len(region_label), batch["region_tokens"]
        if not regions:
            region_tokens = torch.zeros(0, visual_tokens.shape[-2], dtype=torch.bool, device=visual_tokens.device)
        # Images are in the order of their rows. The regions of a row with several images belong to the first; those of
        # a row without its image belong to none.
        region_image = torch.searchsorted(sample_of_image, batch["region_row"])  # [R]
        is_there = (batch["region_row"][:, None] == sample_of_image).any(dim=1)
        region_image = region_image.where(is_there, images)

        is_joined = visual_tokens.ndim == 2
        view_image = torch.zeros_like(view_region) if is_joined else region_image[view_region]  # [V]
        means = region_embeddings(visual_tokens[None] if is_joined else visual_tokens, view_image, region_tokens)
        means = means.where(means.norm(dim=1, keepdim=True) > _SMALLEST_NORM, means.detach())  # [V, D]
        cosines = region_cosines(means, labels[region_label[view_region]])  # [V]
        cosines = _mean_of_views(cosines, view_region, regions)  # [R]
        is_contrastive = self.arguments.patch_loss == "cosine+nce"
        label_cosines = cosine_table(means if is_contrastive else means.detach(), labels)  # [V, L]
        label_cosines = _mean_of_views(label_cosines, view_region, regions)  # [R, L]
        loss = patch_loss(cosines, region_image, images)
        contrast, retrieval = contrast_and_retrieval(label_cosines.detach(), region_label)
        unlabelled, dropped, wrong_size = batch["counts"].float()
        # NaN, hence not logged, is what has no region, or no other label to compare with.
        metrics = {
            "patch/regions": cosines.new_full((), regions),
            "patch/cosine": cosines.detach().mean(),
            "patch/contrast": contrast,
            "patch/retrieval": retrieval,
            "patch/norm": visual_tokens.detach().to(labels.dtype).norm(dim=-1).mean() / labels.norm(dim=-1).mean(),
            "patch/dropped_regions": dropped,
            "patch/images_without_record": unlabelled,
            "patch/skipped_images": wrong_size,
        }
        if is_contrastive:
            negatives = cosine_table(labels, labels) <= SYNONYM_COSINE
            temperature = self.arguments.patch_nce_temperature
            nce = contrastive_loss(label_cosines, region_label, negatives, region_image, images, temperature)
            loss, metrics["patch/nce"] = loss + self.arguments.patch_nce_weight * nce, nce.detach()
        return loss, metrics

    @torch.no_grad()
    def constant_vector_floor(self, embed_words: Callable[[Tensor], Tensor]) -> float:
        """Return the mean cosine that the best constant vector reaches over all regions: `|mean of unit labels|`."""
        assert self.index is not None
        counts = self.index.tag_counts()
        tags, total = list(counts), torch.zeros(())
        for start in range(0, len(tags), _LABELS_AT_ONCE):
            chunk = tags[start : start + _LABELS_AT_ONCE]
            labels = label_embeddings(*pad_label_ids([self.labels(tag) for tag in chunk]), embed_words)  # [L, D]
            total = total + torch.tensor([counts[tag] for tag in chunk]).to(labels) @ F.normalize(labels, dim=-1)  # [D]
        return float(total.norm() / max(sum(counts.values()), 1))

    def _covered_tokens(self, image: AnnotatedImage, layout: Layout, name: str) -> np.ndarray | None:
        """Return bool `[regions, grids, S]`, or None if the annotation does not fit the image and is to be skipped."""
        masks = [region.rle_mask for region in image.regions]
        grids = [grid for grid in layout.grids if self.grids in ("all", "tiles" if grid.kind == "crop" else grid.kind)]
        grids = grids or list(layout.grids)
        covered = np.zeros((len(masks), len(grids), layout.length), dtype=bool)
        try:
            of_grids = covered_tokens_of_grids(masks, image.size_wh, grids, self.arguments.patch_min_coverage, name)
        except PatchMaskError as error:
            if self.arguments.patch_on_error == "fail":
                raise
            logger.warning("Skipped: %s", error)
            return None
        for index, (grid, cells) in enumerate(zip(grids, of_grids, strict=True)):
            covered[:, index, grid.tokens.ravel()] = cells
        return covered


def open_regions(arguments: PatchArguments, source: str, output_dir: Path | None) -> AnnotationIndex:
    """Open a PAD file. Its broken records are refused, or listed beside the run's output if they are to be skipped."""
    index = open_annotation_index(source, arguments.patch_cache_dir)
    if not index.rejected:
        return index
    message = index.rejection_message()
    if arguments.patch_on_error == "fail":
        raise AnnotationError(f"{message}\nCorrect them, or pass --patch_on_error skip.", -1, "")
    logger.warning("Skipped, %s", message)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "patch_skipped.jsonl").write_bytes((index.folder / "rejected.jsonl").read_bytes())
    return index


def _mean_of_views(values: Tensor, view_region: Tensor, regions: int) -> Tensor:
    """Average values `[V, ...]` over the views of each region: `[R, ...]`."""
    if len(values) == regions:  # one view each
        return values
    sums = values.new_zeros(regions, *values.shape[1:]).index_add(0, view_region, values)
    views = values.new_zeros(regions).index_add(0, view_region, values.new_ones(len(values)))
    return sums / views.view(-1, *[1] * (values.ndim - 1))


def _join(targets: Sequence[dict[str, Tensor]], key: str) -> Tensor:
    return torch.cat([extra[key] for extra in targets]) if targets else torch.zeros(0, dtype=torch.int64)
