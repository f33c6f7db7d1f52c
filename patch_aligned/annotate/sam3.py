"""Every instance of a phrase, with its mask, by SAM 3.

Images are encoded once and alone, as phrases are, and an image's phrases are decoded some at a time. So what is found
in an image depends on nothing else: not on other images, and not on where a run was interrupted.

Letters: n phrases of one step, L tokens of a phrase, D width, Q the model's queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Sam3Model, Sam3Processor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput, Sam3VisionEncoderOutput

from patch_aligned.annotate.fetch import DeviceModel, class_of_checkpoint, load_model
from patch_aligned.annotate.options import CandidateThresholds
from patch_aligned.annotate.pipeline import Failure, ImageInWork, run_in_batches
from patch_aligned.annotate.regions import Candidate, Mask, NonFiniteScoresError
from patch_aligned.annotate.sam import LARGEST_STEP_PX, run_lengths_of
from patch_aligned.masks import areas_px

_MODELS: dict[str, Any] = {"sam3": Sam3Model, "sam3_video": Sam3Model}  # SAM 3 is published as a video model


class Sam3Segmenter(DeviceModel):
    """SAM 3 on one device."""

    phrases_per_step = 16  # each takes several maps of 85 MB in float32; fewer where memory runs out

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        candidate_thresholds: CandidateThresholds = CandidateThresholds(),  # noqa: B008 - it is immutable
        mask_threshold: float = 0.5,
        presence_threshold: float = 0.0,
    ) -> None:
        """Place the model on a device; for `dtype` see `DeviceModel`. Phrases are always encoded in float32.

        Instances with a score above `candidate_thresholds.box` are kept, if the presence of their phrase is at least
        `presence_threshold`. Pixels of a probability above `mask_threshold` are in a mask.
        """
        super().__init__(model, device, dtype)
        self.models: dict[str, DeviceModel] = {"sam3": self}
        self.processor = processor
        self.candidate_thresholds = candidate_thresholds
        self.mask_threshold, self.presence_threshold = mask_threshold, presence_threshold
        self._tokens: int = model.config.text_config.max_position_embeddings
        self._text = lru_cache(200_000)(self._encoded)  # of phrases, some 5 KB each
        self._text("object")  # sets the tokenizer's padding before threads share it
        self.settings = {
            "kind": "sam3",
            "image_size": self.processor.image_processor.size["height"],
            "candidate_thresholds": candidate_thresholds._asdict(),
            "mask_threshold": mask_threshold,
            "presence_threshold": presence_threshold,
            "dtype": self.dtype_name,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Sam3Segmenter:
        """Load a checkpoint in transformers' format (facebook/sam3). Its image processor needs torchvision."""
        model = load_model(class_of_checkpoint(folder, _MODELS), folder)
        return cls(model, Sam3Processor.from_pretrained(folder), **options)

    def bucket(self, item: ImageInWork) -> None:
        """Return the same for all: every image is resized to one square."""

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate] | Failure]:
        """Return the instances of each image's phrases, with their masks."""
        return [self.instances(item.image, [tag.name for tag in item.tags]) for item in items]

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Any]]:
        """Return the masks that came with the candidates."""
        return [[item.candidates[place].mask for place in item.to_segment] for item in items]

    @torch.inference_mode()
    def instances(self, image: Image.Image, phrases: Sequence[str]) -> list[Candidate] | Failure:
        """Return all instances of phrases, highest score first; equal ones in the order of phrases and queries.

        A score is the probability of the instance times that of the phrase's presence. It is a failure if one phrase
        does not fit in memory, or has scores that are not finite, in float32 either.
        """
        pixels = self.processor.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        outcomes: list[Any] = []
        failures: list[Failure] = []
        for dtype in dict.fromkeys((self.dtype, torch.float32)) if phrases else ():
            with self.autocast(dtype):
                vision = self.model.get_vision_features(pixels.to(self.device))
            decode = partial(self._decoded, vision, image.size, dtype)
            outcomes = list(run_in_batches(decode, phrases, self.phrases_per_step))
            failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
            if not failures:
                break
        return failures[0] if failures else sorted(chain(*outcomes), key=lambda candidate: -candidate.score)

    def _decoded(
        self, vision: Any, size_wh: tuple[int, int], dtype: torch.dtype, phrases: Sequence[str]
    ) -> list[list[Candidate]]:
        """Return the instances of each of some phrases in one image."""
        levels: dict[str, Any] = {
            name: tuple(level.expand(len(phrases), -1, -1, -1) for level in vision[name])  # -> [n, D, h, w]
            for name in ("fpn_hidden_states", "fpn_position_encoding")
        }
        texts = [self._text(phrase) for phrase in phrases]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        padded = torch.stack([F.pad(text, (0, 0, 0, self._tokens - len(text))) for text in texts])  # [n, L, D]
        with self.autocast(dtype):
            output = self.model(
                vision_embeds=Sam3VisionEncoderOutput(**levels),
                text_embeds=BaseModelOutputWithPooling(pooler_output=padded),
                attention_mask=torch.arange(self._tokens, device=self.device) < lengths[:, None],
            )
        names = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits")
        of_phrases = list(zip(*(output[name].float().split(1) for name in names), strict=True))  # each [1, ...]
        finite = [all(numbers.isfinite().all() for numbers in of_phrase) for of_phrase in of_phrases]
        if not all(finite):
            raise NonFiniteScoresError("SAM 3", [place for place, is_finite in enumerate(finite) if not is_finite])
        return [self._candidates(*pair, size_wh) for pair in zip(phrases, of_phrases, strict=True)]

    def _candidates(self, phrase: str, numbers: tuple[Tensor, ...], size_wh: tuple[int, int]) -> list[Candidate]:
        """Return the instances of a phrase, as many at a time as fit in memory in the image's size."""
        masks, boxes, logits, presence_logit = numbers  # [1, Q, h, w], [1, Q, 4], [1, Q], [1, 1]
        presence, threshold = presence_logit.sigmoid(), self.candidate_thresholds.box
        likely = (logits.sigmoid() * presence > threshold) & (presence >= self.presence_threshold)  # [1, Q]
        candidates = []
        at_once = max(1, LARGEST_STEP_PX // (8 * size_wh[0] * size_wh[1]))  # transformers' masks have 8 bytes a pixel
        for some in likely[0].nonzero()[:, 0].split(at_once):
            (found,) = self.processor.post_process_instance_segmentation(
                Sam3ImageSegmentationOutput(masks[:, some], boxes[:, some], logits[:, some], presence_logit),
                threshold=threshold,
                mask_threshold=self.mask_threshold,
                target_sizes=[size_wh[::-1]],
            )
            rles = run_lengths_of(found["masks"])
            results = zip(found["boxes"].tolist(), found["scores"].tolist(), rles, areas_px(rles), strict=True)
            for box, score, rle, area in results:
                if area:
                    mask = Mask(
                        rle_mask=rle["counts"].decode("ascii"), area_px=int(area), presence=round(presence.item(), 6)
                    )
                    candidates.append(replace(Candidate.rounded(box, score, phrase, score, ()), mask=mask))
        return candidates

    @torch.inference_mode()
    def _encoded(self, phrase: str) -> Tensor:
        """Return the features `[L, D]` of a phrase's own tokens; of a long one the first are read."""
        inputs = self.processor.tokenizer(
            phrase, padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        features: Tensor = self.model.get_text_features(**inputs).pooler_output[0]  # [longest, D]
        return features[inputs["attention_mask"][0].bool()]
