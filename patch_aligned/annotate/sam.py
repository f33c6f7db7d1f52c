"""Masks for boxes, by SAM or SAM 2: pictures and their boxes in, run lengths out.

Images are encoded once, those without boxes never. The boxes of all images are then decoded in one flat list, each with
its own image's embedding, so that images may have any number of them; a box's mask doesn't depend on the others.

Letters: B images that have boxes, N boxes of all images together, n boxes of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers import Sam2ImageProcessor, Sam2Model, SamImageProcessorPil, SamModel

from patch_aligned.annotate.fetch import kind_of_checkpoint, load_whole_model
from patch_aligned.annotate.regions import NonFiniteScoresError
from patch_aligned.masks import areas_px

Box = Sequence[float]
"""Corners x1, y1, x2, y2 in pixels of the picture."""

_MASK_MODELS: dict[str, Any] = {
    "sam": SamModel,
    "sam2": Sam2Model,
    "sam2_video": Sam2Model,
}  # SAM 2 is published as a video model
_LARGEST_STEP_PX = 1 << 26  # of masks in the pictures' own size at a time: 256 MiB in float32


class Mask(NamedTuple):
    """The mask of one box.

    Attributes:
        rle: COCO compressed RLE string, of the picture's size.
        area_px: its pixels; 0 where the model found nothing.
        predicted_iou: the model's own guess of how good the mask is.
    """

    rle: str
    area_px: int
    predicted_iou: float


class SamSegmenter:
    """SAM or SAM 2 on one device.

    Attributes:
        settings: what decides the masks, as plain values for a manifest.
    """

    def __init__(
        self,
        model: SamModel | Sam2Model,
        image_processor: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        boxes_per_step: int = 64,
    ) -> None:
        """Places the model.

        Args:
            model: SAM or SAM 2.
            image_processor: the one that belongs to it.
            device: where it runs.
            dtype: what autocast computes in, float32 for none; by default bfloat16 on a GPU, float32 on a CPU.
            boxes_per_step: boxes decoded at a time. Each takes a copy of its image's embedding (4 MB for SAM, 16 MB for
                SAM 2, in float32).
        """
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model = model.requires_grad_(False).eval()
        self.model.to(device=self.device)
        self.image_processor = image_processor
        self.boxes_per_step = boxes_per_step
        self._pads = isinstance(model, SamModel)  # SAM keeps the aspect and pads, SAM 2 squashes
        self._side: int = image_processor.size["longest_edge"] if self._pads else image_processor.size["height"]
        self.settings: dict[str, Any] = {
            "kind": "sam" if self._pads else "sam2",
            "image_size": self._side,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_pretrained(cls, name_or_folder: str, *, revision: str = "main", **options: Any) -> SamSegmenter:
        """A segmenter of the hub (facebook/sam-vit-huge, facebook/sam2.1-hiera-large) or of a folder.

        Args:
            name_or_folder: of a checkpoint in transformers' format.
            revision: of the hub's repository.
            options: the constructor's.

        Raises:
            ValueError: for another kind of model, or where weights or SAM 2's torchvision are missing.
        """
        kind = kind_of_checkpoint(name_or_folder, revision, _MASK_MODELS)
        if kind != "sam" and find_spec("torchvision") is None:
            raise ValueError(
                f"{name_or_folder}: the image processor of SAM 2 needs torchvision, which isn't installed: pip install "
                "'patch-aligned-llava[annotate]'"
            )
        model = load_whole_model(_MASK_MODELS[kind], name_or_folder, revision)
        # SAM's default processor needs torchvision, this one doesn't. SAM 2 has only one, which does.
        processor_class: Any = SamImageProcessorPil if kind == "sam" else Sam2ImageProcessor
        processor = processor_class.from_pretrained(name_or_folder, revision=revision)
        segmenter = cls(model, processor, **options)
        segmenter.settings |= {"model": name_or_folder, "revision": revision}
        return segmenter

    @torch.inference_mode()
    def segment(self, images: Sequence[Image.Image], boxes_xyxy_px: Sequence[Sequence[Box]]) -> list[list[Mask]]:
        """The mask of each box.

        Args:
            images: pictures of any size. All that have boxes are encoded at once: the caller decides how many.
            boxes_xyxy_px: of each image, any number of them. What leaves the picture is cut off for the prompt.

        Returns:
            Masks in the boxes' order, for each image.

        Raises:
            ValueError: for other counts, or a box with a number that isn't finite.
            NonFiniteScoresError: where an image's masks aren't finite. Before that it is tried again in float32.
        """
        if len(images) != len(boxes_xyxy_px):
            raise ValueError(f"boxes_xyxy_px: found those of {len(boxes_xyxy_px)} images, expected {len(images)}")
        masks: list[list[Mask]] = [[] for _ in images]
        with_boxes = [position for position, boxes in enumerate(boxes_xyxy_px) if len(boxes)]
        if not with_boxes:
            return masks
        pictures = [images[position].convert("RGB") for position in with_boxes]
        prompts = [
            _scaled(boxes_xyxy_px[position], picture.size, self._resized_hw(picture.size), position)
            for position, picture in zip(with_boxes, pictures, strict=True)
        ]
        found = self._masks(pictures, prompts, self.dtype)
        again = [row for row, of_image in enumerate(found) if of_image is None]
        if again and self.dtype != torch.float32:
            second = self._masks([pictures[row] for row in again], [prompts[row] for row in again], torch.float32)
            for row, of_image in zip(again, second, strict=True):
                found[row] = of_image
        if not_finite := [position for position, of_image in zip(with_boxes, found, strict=True) if of_image is None]:
            raise NonFiniteScoresError("SAM", not_finite)
        for position, of_image in zip(with_boxes, found, strict=True):
            masks[position] = of_image or []
        return masks

    def _masks(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Tensor], dtype: torch.dtype
    ) -> list[list[Mask] | None]:
        """Masks of each picture's boxes `[boxes, 4]`; None for a picture whose numbers are not finite in this dtype."""
        pixel_values = self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        with self._autocast(dtype):
            embeddings = self.model.get_image_embeddings(pixel_values)  # SAM [B, C, h, w], SAM 2 a list of three
        image_of_box = torch.tensor(
            [row for row, boxes in enumerate(prompts) for _ in boxes], device=self.device
        )  # [N]
        all_boxes = torch.cat(list(prompts)).to(self.device)  # [N, 4]
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
        """Mask logits `[n, h, w]` in the decoder's size and predicted IoUs `[n]`, float32."""
        own = [level[rows] for level in embeddings] if isinstance(embeddings, list) else embeddings[rows]  # -> [n, ...]
        with self._autocast(dtype):
            output = self.model(image_embeddings=own, input_boxes=boxes[:, None], multimask_output=False)
        return output.pred_masks[:, 0, 0].float(), output.iou_scores[:, 0, 0].float()  # [n, 1, 1, h, w] -> [n, h, w]

    def _encoded(self, low_resolution: Tensor, predicted_iou: Tensor, size_wh: tuple[int, int]) -> list[Mask]:
        """Masks of one picture, from logits `[n, h, w]`."""
        encoded: list[dict[str, Any]] = []
        for logits in low_resolution.split(max(1, _LARGEST_STEP_PX // (size_wh[0] * size_wh[1]))):
            is_mask = self._upsampled(logits, size_wh) > 0  # [n, height, width]
            columns_first = is_mask.transpose(1, 2).to(torch.uint8).contiguous().cpu().numpy()  # [n, width, height]
            encoded += coco_mask.encode(columns_first.transpose(2, 1, 0))  # Fortran order, as COCO reads masks
        return [
            Mask(rle["counts"].decode("ascii"), int(area), iou)
            for rle, area, iou in zip(encoded, areas_px(encoded), predicted_iou.tolist(), strict=True)
        ]

    def _upsampled(self, logits: Tensor, size_wh: tuple[int, int]) -> Tensor:
        """Logits `[n, h, w]` in the picture's size, `[n, height, width]`."""
        if self._pads:  # in two steps, as SAM's authors do it: to the padded square, then without the padding
            height, width = self._resized_hw(size_wh)
            logits = _resize(logits, (self._side, self._side))[:, :height, :width]
        return _resize(logits, (size_wh[1], size_wh[0]))

    def _resized_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture in the model's square."""
        if not self._pads:
            return self._side, self._side
        scale = self._side / max(size_wh)
        return int(size_wh[1] * scale + 0.5), int(size_wh[0] * scale + 0.5)

    def _autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _scaled(boxes: Sequence[Box], size_wh: tuple[int, int], resized_hw: tuple[int, int], position: int) -> Tensor:
    """Boxes within the picture, in pixels of the model's square: `[boxes, 4]` float32."""
    corners = torch.tensor([[float(number) for number in box] for box in boxes], dtype=torch.float64)
    if corners.ndim != 2 or corners.shape[1] != 4 or not corners.isfinite().all():
        raise ValueError(f"boxes of image {position}: found {list(boxes)}, expected four finite numbers each")
    width, height = size_wh
    corners = corners.minimum(corners.new_tensor([width, height] * 2)).clamp(min=0)
    return (corners * corners.new_tensor([resized_hw[1] / width, resized_hw[0] / height] * 2)).float()


def _resize(logits: Tensor, shape_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(logits[:, None], shape_hw, mode="bilinear", align_corners=False)[:, 0]  # [n, h, w] -> [n, *hw]
