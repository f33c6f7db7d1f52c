"""Training plugin that adds the patch loss to LLaVA's stage 1, from the regions of a PAD file.

Letters: B rows of the batch, N images, S visual tokens of an image, D width of the LLM, R regions of the batch,
K tokens of the longest label.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.plugin import AlignmentContext, AuxiliaryOutput, ImageView, TrainingPlugin
from patch_aligned.images import ImageFileError, UnreadableImageError, decode_image, image_path
from patch_aligned.labels import LabelTokenizer, label_embeddings, pad_label_ids
from patch_aligned.loss import patch_loss, region_cosines
from patch_aligned.masks import PatchMaskError, covered_tokens_of_regions
from patch_aligned.models.llava import layout_of
from patch_aligned.pad import (
    AnnotatedImage,
    AnnotationError,
    AnnotationIndex,
    image_id_of,
    iter_records,
    open_annotation_index,
)
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.picture import PicturedImage, PicturedRegion, save_picture

logger = logging.getLogger(__name__)

_NO_RECORD = -1


class PatchAlignedPlugin(TrainingPlugin):
    """Adds the loss `patch` to a run. `PatchArguments` has its flags.

    Tensors in the batch (integers or bools, since engines may cast floats):
        region_row `[R]`, region_tokens `[R, S]`, label_ids `[R, K]`, label_lengths `[R]`: inputs of the loss.
        image_row, record_row `[N]`, region_position `[R]`: their origin, for the picture.
        counts `[3]`: images without a record, regions that cover no token, records skipped for their size.
    """

    arguments_class = PatchArguments

    arguments: PatchArguments
    index: AnnotationIndex
    labels: LabelTokenizer
    image_folder: Path | None

    def setup(
        self,
        arguments: PatchArguments,
        tokenizer: Any,
        *,
        data_path: str | None = None,
        image_folder: str | None = None,
        output_dir: Path | None = None,
    ) -> None:
        """Open the PAD file and count the training images that have regions.

        Raises:
            ValueError: if no PAD file is given, or no image of the training file has a region.
            AnnotationError: if the PAD file has broken records and `--patch_on_error` is `fail`.
        """
        self.arguments = arguments
        self.labels = LabelTokenizer(tokenizer)
        self.image_folder = None if image_folder is None else Path(image_folder)
        source = arguments.patch_data_path or _annotated_training_file(data_path)
        self.index = open_annotation_index(source, arguments.patch_cache_dir)
        self._judge_rejections(output_dir)
        if data_path is not None:
            self._report_share(Path(data_path))

    def transform_sample(self, record: Mapping[str, Any], view: ImageView) -> dict[str, Tensor]:
        """Return the tokens that each region of the image covers, and the ids of its label. anyres: base tile only.

        Raises:
            PatchMaskError: if the record's size is not the image's and `--patch_on_error` is `fail`.
        """
        image_id = image_id_of(record)
        row = self.index.find(image_id) if image_id is not None else None
        found = self._tags_and_tokens(row, str(image_id), view) if row is not None else None
        unlabelled, is_skipped = row is None, row is not None and found is None
        if row is None or found is None:
            row, found = _NO_RECORD, ([], np.zeros((0, view.grid[0] * view.grid[1]), dtype=bool))
        tags, covered = found  # covered [regions, S]
        position = np.flatnonzero(covered.any(axis=1))  # [R] regions that cover a token
        labels = [self.labels(tags[index]) for index in position.tolist()]
        return {
            "region_tokens": torch.from_numpy(covered[position]),
            "region_position": torch.from_numpy(position),
            "label_ids": torch.tensor([token for label in labels for token in label], dtype=torch.int64),
            "label_lengths": torch.tensor([len(label) for label in labels], dtype=torch.int64),
            "record_row": torch.tensor(row),
            "counts": torch.tensor([unlabelled, len(covered) - len(position), is_skipped], dtype=torch.int64),
        }

    def collate(self, extras: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenate the regions of all rows; rows without image have none."""
        rows = torch.tensor([row for row, extra in enumerate(extras) if extra], dtype=torch.int64)  # [rows with image]
        given = [extra for extra in extras if extra]
        regions = torch.tensor([len(extra["label_lengths"]) for extra in given], dtype=torch.int64)
        label_ids = _join(given, "label_ids").split(_join(given, "label_lengths").tolist())
        padded, lengths = pad_label_ids(label_ids)
        return {
            "region_row": rows.repeat_interleave(regions),
            "region_tokens": _join(given, "region_tokens", torch.zeros(0, 0, dtype=torch.bool)),
            "region_position": _join(given, "region_position"),
            "label_ids": padded,
            "label_lengths": lengths,
            "image_row": rows,
            "record_row": torch.tensor([int(extra["record_row"]) for extra in given], dtype=torch.int64),
            "counts": sum((extra["counts"] for extra in given), start=torch.zeros(3, dtype=torch.int64)),
        }

    def auxiliary_losses(self, context: AlignmentContext, batch: Mapping[str, Tensor]) -> AuxiliaryOutput:
        """Return `patch`, the loss of Eq. 5, with the counts and the mean cosine of this micro-batch."""
        tokens = context.visual_tokens
        # Each rank calls the embedding once per micro-step, even without regions: under ZeRO-3 it is a collective call.
        embeddings = label_embeddings(batch["label_ids"], batch["label_lengths"], context.embed_words)  # [R, D]
        regions = embeddings.shape[0]
        region_tokens = batch["region_tokens"] if regions else batch["region_tokens"].new_zeros(0, tokens.shape[1])
        # Images are in the order of their rows. The regions of a row with several images belong to the first; those of
        # a row without its image belong to none.
        region_image = torch.searchsorted(context.sample_of_image, batch["region_row"])  # [R]
        is_there = (batch["region_row"][:, None] == context.sample_of_image).any(dim=1)
        region_image = region_image.where(is_there, tokens.shape[0])
        cosines = region_cosines(tokens, region_image, region_tokens, embeddings)  # [R]
        unlabelled, dropped, wrong_size = batch["counts"].float()
        metrics = {
            "patch/regions": cosines.new_full((), regions),
            "patch/cosine": cosines.detach().mean(),  # NaN, hence not logged, if there is no region
            "patch/dropped_regions": dropped,
            "patch/images_without_record": unlabelled,
            "patch/skipped_images": wrong_size,
        }
        return AuxiliaryOutput({"patch": patch_loss(cosines, region_image, tokens.shape[0])}, metrics)

    def loss_weights(self, progress: float) -> dict[str, float]:
        """Return beta, interpolated linearly from start to end of the run, exact at both."""
        start, end = self.arguments.patch_beta_start, self.arguments.patch_beta_end
        return {"patch": start * (1 - progress) + end * progress}

    def describe_first_batch(self, images: Tensor, grid: tuple[int, int], batch: Mapping[str, Any], path: Path) -> None:
        """Save images, masks, covered tokens and labels of the first batch as `path`.png."""
        batch = {key: value.cpu() for key, value in batch.items()}
        if len(images) != len(batch["image_row"]):
            logger.info("No picture of the first batch: %d images in %d rows", len(images), len(batch["image_row"]))
            return
        save_picture([self._pictured(image, index, batch) for index, image in enumerate(images)], grid, path)

    def _pictured(self, model_image: Tensor, index: int, batch: Mapping[str, Tensor]) -> PicturedImage:
        """Collect what the loss reads for one image, from the batch itself."""
        row = int(batch["record_row"][index])
        annotated = self.index[row] if row != _NO_RECORD else None
        is_own = batch["region_row"] == batch["image_row"][index]  # [R]
        region_at = {int(batch["region_position"][region]): int(region) for region in is_own.nonzero()}
        regions = []
        for position, annotation in enumerate(annotated.regions if annotated is not None else ()):
            region = region_at.get(position)
            if region is None:
                regions.append(PicturedRegion(annotation.tag, annotation.rle_mask, None))
                continue
            ids = batch["label_ids"][region, : batch["label_lengths"][region]]
            tokens = batch["region_tokens"][region].numpy()
            regions.append(PicturedRegion(self.labels.decode(ids.tolist()), annotation.rle_mask, tokens))
        title = "(image without a record)" if annotated is None else annotated.image_id
        if annotated is not None and not regions:
            title += "  (record without regions)"
        return PicturedImage(self._original(annotated), model_image, title, regions)

    def _original(self, annotated: AnnotatedImage | None) -> Image.Image | None:
        """Read a record's image file. Returns None if it cannot be read: the picture must not stop a run."""
        if annotated is None or self.image_folder is None:
            return None
        try:
            image = decode_image(image_path(self.image_folder, annotated.image_id))
        except (ImageFileError, UnreadableImageError, OSError) as error:
            logger.warning("Not in the picture of the first batch: %s", error)
            return None
        return image if image.size == annotated.size_wh else None

    def _tags_and_tokens(self, row: int, image_id: str, view: ImageView) -> tuple[Sequence[str], np.ndarray] | None:
        """Return tags and bool `[regions, S]`, or None if the record does not fit the image and is to be skipped."""
        try:
            image = self.index[row]
            masks = [region.rle_mask for region in image.regions]
            name = f"{self.index.source}: image_id {image_id!r}"
            least = self.arguments.patch_min_coverage
            [grid] = layout_of(view).grids
            covered = covered_tokens_of_regions(masks, image.size_wh, grid, least, name)
            return [region.tag for region in image.regions], covered
        except PatchMaskError as error:
            if self.arguments.patch_on_error == "fail":
                raise
            logger.warning("Skipped: %s", error)
            return None

    def _judge_rejections(self, output_dir: Path | None) -> None:
        if not self.index.rejected:
            return
        message = self.index.rejection_message()
        if self.arguments.patch_on_error == "fail":
            advice = "Correct them, or pass --patch_on_error skip."
            raise AnnotationError(f"{message}\n{advice}", -1, "")
        logger.warning("Skipped, %s", message)
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / "patch_skipped.jsonl").write_bytes((self.index.folder / "rejected.jsonl").read_bytes())

    def _report_share(self, data_path: Path) -> None:
        images, with_regions = self.index.coverage_of(data_path)
        if with_regions == 0:
            first_here = next(filter(None, map(image_id_of, iter_records(data_path))), None)
            first_there = self.index[0].image_id if len(self.index) else None
            raise ValueError(
                f"{data_path}: found no image that has a region in {self.index.source}; expected the same paths in "
                f"both. The first image here is {first_here!r}, the first one there {first_there!r}. "
                "Check --data_path and --patch_data_path."
            )
        share = 100 * with_regions / images
        logger.info("%d of %d training images (%.1f%%) have regions", with_regions, images, share)
        logger.info("%d regions of %d images in %s", self.index.regions, len(self.index), self.index.source)


def _annotated_training_file(data_path: str | None) -> str:
    for record in islice(iter_records(Path(data_path)), 1) if data_path else ():
        if isinstance(record, Mapping) and {"image_id", "size", "labels"} <= record.keys():
            return str(data_path)
    raise ValueError(
        f"--data_path {data_path}: found no regions in its records; expected PAD records, or a separate PAD file: "
        "--patch_data_path PAD.json"
    )


def _join(extras: list[dict[str, Tensor]], key: str, empty: Tensor | None = None) -> Tensor:
    if not extras:
        return torch.zeros(0, dtype=torch.int64) if empty is None else empty
    return torch.cat([extra[key] for extra in extras])
