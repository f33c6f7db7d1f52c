"""Masks for boxes, by SAM or SAM 2.

Images are encoded once, those without boxes never. The boxes of all images are then decoded in one flat list, each with
its own image's embedding, so that images may have any number of them; a box's mask does not depend on the others.

Letters: B images that have boxes, N boxes of all images together, n boxes of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers import Sam2ImageProcessor, Sam2Model, SamImageProcessorPil, SamModel

from patch_aligned.annotate.fetch import DeviceModel, class_of_checkpoint, load_model
from patch_aligned.annotate.regions import Mask, NonFiniteScoresError
from patch_aligned.masks import areas_px

Box = Sequence[float]
"""Corners x1, y1, x2, y2 in pixels of the image."""

_MASK_MODELS: dict[str, Any] = {
    "sam": SamModel,
    "sam2": Sam2Model,
    "sam2_video": Sam2Model,
}  # SAM 2 is published as a video model
LARGEST_STEP_PX = 1 << 26  # of masks in the images' own size at a time: 256 MiB in float32


class SamSegmenter(DeviceModel):
    """SAM or SAM 2 on one device."""

    def __init__(
        self,
        model: SamModel | Sam2Model,
        image_processor: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        boxes_per_step: int = 64,
    ) -> None:
        """Place the model and its image processor on a device; for `dtype` see `DeviceModel`.

        Each of the `boxes_per_step` boxes that are decoded at a time takes a copy of its image's embedding: 4 MB for
        SAM, 16 MB for SAM 2, in float32.
        """
        super().__init__(model, device, dtype)
        self.image_processor, self.boxes_per_step = image_processor, boxes_per_step
        self._pads = isinstance(model, SamModel)  # SAM keeps the aspect and pads, SAM 2 squashes
        self._side: int = image_processor.size["longest_edge"] if self._pads else image_processor.size["height"]
        self.settings = {
            "kind": "sam" if self._pads else "sam2",
            "image_size": self._side,
            "dtype": self.dtype_name,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> SamSegmenter:
        """Load a checkpoint in transformers' format (facebook/sam-vit-huge, facebook/sam2.1-hiera-large)."""
        model_class = class_of_checkpoint(folder, _MASK_MODELS)
        if model_class is Sam2Model and find_spec("torchvision") is None:
            raise ValueError(
                f"{folder}: the image processor of SAM 2 needs torchvision, which is not installed: pip install "
                "'patch-aligned-llava[annotate]'"
            )
        # SAM's default processor needs torchvision, this one does not. SAM 2 has only one, which does.
        processor_class: Any = Sam2ImageProcessor if model_class is Sam2Model else SamImageProcessorPil
        return cls(load_model(model_class, folder), processor_class.from_pretrained(folder), **options)

    @torch.inference_mode()
    def segment(self, images: Sequence[Image.Image], boxes_xyxy_px: Sequence[Sequence[Box]]) -> list[list[Mask]]:
        """Return the masks of any number of boxes of each image, in their order.

        All images that have boxes are encoded at once. Boxes are cut at the image's border for the prompt.
        `NonFiniteScoresError` names images whose masks are not finite, in float32 either.
        """
        with_boxes = [position for position, (_, own) in enumerate(zip(images, boxes_xyxy_px, strict=True)) if own]
        if not with_boxes:
            return [[] for _ in images]
        pictures = [images[position].convert("RGB") for position in with_boxes]
        prompts = [
            _scaled(boxes_xyxy_px[position], picture.size, self._resized_hw(picture.size), position)
            for position, picture in zip(with_boxes, pictures, strict=True)
        ]
        masks = self.finite_or_none(partial(self._masks, pictures, prompts), len(pictures))
        found = dict(zip(with_boxes, masks, strict=True))
        if not_finite := [position for position, of_image in found.items() if of_image is None]:
            raise NonFiniteScoresError("SAM", not_finite)
        return [found.get(position, []) for position in range(len(images))]

    def _masks(
        self, images: Sequence[Image.Image], boxes_of: Sequence[Tensor], chosen: Sequence[int], dtype: torch.dtype
    ) -> list[list[Mask] | None]:
        """Return the masks of the boxes `[boxes, 4]` of chosen images; None for one whose numbers are not finite."""
        pictures, prompts = [images[row] for row in chosen], [boxes_of[row] for row in chosen]
        pixel_values = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
        with self.autocast(dtype):
            embeddings = self.model.get_image_embeddings(pixel_values)  # SAM [B, C, h, w], SAM 2 a list of three
        image_of_box = torch.tensor(
            [row for row, boxes in enumerate(prompts) for _ in boxes], device=self.device
        )  # [N]
        all_boxes = torch.cat(prompts).to(self.device)  # [N, 4]
        masks: list[list[Mask]] = [[] for _ in pictures]
        broken: set[int] = set()
        steps = zip(all_boxes.split(self.boxes_per_step), image_of_box.split(self.boxes_per_step), strict=True)
        for boxes, rows in steps:
            logits, predicted_iou = self._decoded(embeddings, rows, boxes, dtype)
            for row in rows.unique().tolist():
                own = rows == row
                if not (logits[own].isfinite().all() and predicted_iou[own].isfinite().all()):
                    broken.add(row)
                if row not in broken:
                    masks[row] += self._encoded(logits[own], predicted_iou[own], pictures[row].size)
        return [None if row in broken else of_image for row, of_image in enumerate(masks)]

    def _decoded(
        self, embeddings: Tensor | list[Tensor], rows: Tensor, boxes: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits `[n, h, w]` in the decoder's size and predicted IoUs `[n]`, float32."""
        own = [level[rows] for level in embeddings] if isinstance(embeddings, list) else embeddings[rows]  # -> [n, ...]
        with self.autocast(dtype):
            output = self.model(image_embeddings=own, input_boxes=boxes[:, None], multimask_output=False)
        return output.pred_masks[:, 0, 0].float(), output.iou_scores[:, 0, 0].float()  # [n, 1, 1, h, w] -> [n, h, w]

    def _encoded(self, low_resolution: Tensor, predicted_iou: Tensor, size_wh: tuple[int, int]) -> list[Mask]:
        """Return the masks of one image, from logits `[n, h, w]`."""
        encoded: list[dict[str, Any]] = []
        for logits in low_resolution.split(max(1, LARGEST_STEP_PX // (size_wh[0] * size_wh[1]))):
            encoded += run_lengths_of(self._upsampled(logits, size_wh) > 0)
        return [
            Mask(rle_mask=rle["counts"].decode("ascii"), area_px=int(area), predicted_iou=iou)
            for rle, area, iou in zip(encoded, areas_px(encoded), predicted_iou.tolist(), strict=True)
        ]

    def _upsampled(self, logits: Tensor, size_wh: tuple[int, int]) -> Tensor:
        """Resize logits `[n, h, w]` to the image: `[n, height, width]`."""
        if self._pads:  # in two steps, as SAM's authors do it: to the padded square, then without the padding
            height, width = self._resized_hw(size_wh)
            logits = _resize(logits, (self._side, self._side))[:, :height, :width]
        return _resize(logits, (size_wh[1], size_wh[0]))

    def _resized_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of an image in the model's square."""
        if not self._pads:
            return self._side, self._side
        scale = self._side / max(size_wh)
        return int(size_wh[1] * scale + 0.5), int(size_wh[0] * scale + 0.5)


def run_lengths_of(is_mask: Tensor) -> list[dict[str, Any]]:
    """Return pycocotools' RLEs of masks `[n, height, width]`."""
    columns_first = is_mask.transpose(1, 2).to(torch.uint8).contiguous().cpu().numpy()  # [n, width, height]
    return coco_mask.encode(columns_first.transpose(2, 1, 0))  # Fortran order, as COCO reads masks


def _scaled(boxes: Sequence[Box], size_wh: tuple[int, int], resized_hw: tuple[int, int], position: int) -> Tensor:
    """Return the boxes within the image, in pixels of the model's square: `[boxes, 4]` float32."""
    corners = torch.tensor([[float(number) for number in box] for box in boxes], dtype=torch.float64)
    if corners.ndim != 2 or corners.shape[1] != 4 or not corners.isfinite().all():
        raise ValueError(f"boxes of image {position}: found {list(boxes)}, expected four finite numbers each")
    width, height = size_wh
    corners = corners.minimum(corners.new_tensor([width, height] * 2)).clamp(min=0)
    return (corners * corners.new_tensor([resized_hw[1] / width, resized_hw[0] / height] * 2)).float()


def _resize(logits: Tensor, shape_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(logits[:, None], shape_hw, mode="bilinear", align_corners=False)[:, 0]  # [n, h, w] -> [n, *hw]
