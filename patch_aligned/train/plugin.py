"""Training plugin that adds the patch loss to LLaVA's stage 1, from the regions of a PAD file.

Letters: N images of the batch, R regions of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from llava.mm_utils import image_view_of, process_images
from llava.plugin import AlignmentContext, AuxiliaryOutput, ImageView, TrainingPlugin
from patch_aligned.cells import Layout
from patch_aligned.images import ImageFileError, UnreadableImageError, decode_image, image_path
from patch_aligned.labels import LabelTokenizer
from patch_aligned.models.llava import layout_of
from patch_aligned.pad import AnnotatedImage, AnnotationIndex, image_id_of, normal_path
from patch_aligned.record_files import iter_records
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.objective import NO_RECORD, PatchObjective, open_regions
from patch_aligned.train.picture import PicturedImage, PicturedRegion, save_picture
from patch_aligned.train.watch import AlignmentWatch, rows_to_watch

logger = logging.getLogger(__name__)


class PatchAlignedPlugin(TrainingPlugin):
    """Adds the loss `patch` to a run of LLaVA. Flags: `PatchArguments`; tensors and loss: `PatchObjective`."""

    arguments_class = PatchArguments
    warmup_folder = "patch_warmup"

    arguments: PatchArguments
    index: AnnotationIndex
    objective: PatchObjective
    image_folder: Path | None
    _watched: Sequence[AnnotatedImage] = ()

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
        self.auxiliary_only_ratio = arguments.patch_regions_only_ratio
        self.warmup_steps = arguments.patch_warmup_steps
        self.image_folder = None if image_folder is None else Path(image_folder)
        source = arguments.patch_data_path or _annotated_training_file(data_path)
        self.index = open_regions(arguments, source, output_dir)
        self.objective = PatchObjective(arguments, LabelTokenizer(tokenizer), self.index)
        self._watched = [self.index[row] for row in rows_to_watch(arguments, self.index, self.image_folder or Path())]
        self.held_out = frozenset(normal_path(image.image_id) for image in self._watched)
        if data_path is not None:
            self._report_share(Path(data_path))

    def supervises(self, records: Iterable[Mapping[str, Any]]) -> Sequence[bool]:
        """Return which records have an image with at least one region."""
        return self.index.has_regions(image_id_of(record) or "" for record in records).tolist()

    def transform_sample(self, record: Mapping[str, Any], view: ImageView) -> dict[str, Tensor]:
        """Return the tokens that each region of the image covers, and the ids of its label. anyres: base tile only."""
        return self.objective.targets(image_id_of(record), layout_of(view))

    def collate(self, extras: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenate the regions of all rows; rows without image have none."""
        return self.objective.collate(extras)

    def auxiliary_losses(self, context: AlignmentContext, batch: Mapping[str, Tensor]) -> AuxiliaryOutput:
        """Return `patch`, the loss of Eq. 5, with the metrics of this micro-batch."""
        tokens = context.visual_tokens
        loss, metrics = self.objective.loss(tokens, context.sample_of_image, batch, context.embed_words)
        return AuxiliaryOutput({"patch": loss}, metrics)

    def initial_metrics(self, embed_words: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the cosine that a constant vector reaches: what `patch/cosine` must be read against."""
        return {"patch/floor": self.objective.constant_vector_floor(embed_words)}

    def loss_weights(self, progress: float) -> dict[str, float]:
        """Return beta, interpolated linearly from start to end of the run, exact at both."""
        return {"patch": self.arguments.beta(progress)}

    def callbacks(self, trainer: Any) -> list[AlignmentWatch]:
        """Return what watches the held-out images, of anyres the base tiles; nothing if none are."""
        if not self._watched:
            return []
        model, folder, labels = trainer.model, self.image_folder or Path(), self.objective.labels
        tower, config = model.get_vision_tower(), model.config

        def see(image: Image.Image) -> tuple[Layout, Callable[[], Tensor]]:
            processor, ratio = tower.image_processor, config.image_aspect_ratio
            view = image_view_of(image.size, processor, ratio, model.visual_grid, tower.seen_side)
            pixels = process_images([image], processor, config)[0]
            base_tile = pixels[:1] if pixels.dim() == 4 else pixels[None]  # [1, 3, H, W]
            return layout_of(view), lambda: model.encode_images(base_tile)[0]

        return [AlignmentWatch(trainer, self.arguments, self._watched, folder, labels, see)]

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
        annotated = self.index[row] if row != NO_RECORD else None
        is_own = batch["region_row"] == batch["image_row"][index]  # [R]
        region_at = {int(batch["region_position"][region]): int(region) for region in is_own.nonzero()}
        regions = []
        for position, annotation in enumerate(annotated.regions if annotated is not None else ()):
            region = region_at.get(position)
            if region is None:
                regions.append(PicturedRegion(annotation.tag, annotation.rle_mask, None))
                continue
            label = batch["region_label"][region]
            ids = batch["label_ids"][label, : batch["label_lengths"][label]]
            tokens = batch["region_tokens"][region].numpy()
            regions.append(PicturedRegion(self.objective.labels.decode(ids.tolist()), annotation.rle_mask, tokens))
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
