"""Boxes for tags, by Grounding DINO or MM Grounding DINO.

The images of one call have the same size once they are resized (`resized_shape_hw`): the model would see the padding
of smaller ones, and find other boxes than in the image alone. Images without tags never reach the model; one whose tags
fill several prompts has the candidates of all of them.

Letters: B images that have tags, P pairs of an image and a prompt in one step, Q the model's queries, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    MMGroundingDinoForObjectDetection,
)
from transformers.image_transforms import get_size_with_aspect_ratio

from patch_aligned.annotate.fetch import DeviceModel, class_of_checkpoint, load_model
from patch_aligned.annotate.options import CandidateThresholds, PromptJoin
from patch_aligned.annotate.regions import NO_TAG, Candidate, NonFiniteScoresError, Prompt, PromptBuilder

_DETECTION_MODELS: dict[str, Any] = {
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}


class GroundingDetector(DeviceModel):
    """Grounding DINO or MM Grounding DINO on one device."""

    def __init__(
        self,
        model: GroundingDinoForObjectDetection | MMGroundingDinoForObjectDetection,
        tokenizer: Any,
        image_processor: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        prompt_join: PromptJoin = ", ",
        candidate_thresholds: CandidateThresholds = CandidateThresholds(),  # noqa: B008 - it is immutable
    ) -> None:
        """Place the model on a device.

        Args:
            model: Grounding DINO or MM Grounding DINO.
            tokenizer: the model's.
            image_processor: the model's.
            device: of the model.
            dtype: see `DeviceModel`.
            prompt_join: between the tags of a prompt, see `PromptBuilder`.
            candidate_thresholds: boxes below them, and tokens in them, are not kept.

        Raises:
            ValueError: the image processor does not resize by the shortest edge, or the tokenizer is not the model's.
        """
        super().__init__(model, device, dtype)
        self.image_processor = image_processor
        size = image_processor.size
        self._shortest_edge, self._longest_edge = size.get("shortest_edge"), size.get("longest_edge")
        if not self._shortest_edge or not self._longest_edge:
            raise ValueError(f"image processor: found size {dict(size)}, expected shortest_edge and longest_edge")
        max_tokens = model.config.max_text_len
        self.prompts = PromptBuilder(tokenizer, join=prompt_join, max_tokens=max_tokens)
        self.tokenizer = tokenizer
        self.candidate_thresholds = candidate_thresholds
        self.settings = {
            "kind": model.config.model_type,
            "shortest_edge": self._shortest_edge,
            "longest_edge": self._longest_edge,
            "max_text_tokens": max_tokens,
            "prompt_join": prompt_join,
            "candidate_thresholds": candidate_thresholds._asdict(),
            "dtype": self.dtype_name,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> GroundingDetector:
        """Load a checkpoint in transformers' format (IDEA-Research/grounding-dino-tiny and the like).

        Raises:
            ValueError: for another kind of model, or where weights are missing; or a tokenizer that is not the model's.
        """
        model = load_model(class_of_checkpoint(folder, _DETECTION_MODELS), folder)
        # The default processor needs torchvision, this one does not.
        image_processor = GroundingDinoImageProcessorPil.from_pretrained(folder)
        return cls(model, AutoTokenizer.from_pretrained(folder), image_processor, **options)

    def resized_shape_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Return height and width at which the model sees an image. Images of one call have to share them."""
        return get_size_with_aspect_ratio((size_wh[1], size_wh[0]), self._shortest_edge, self._longest_edge)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[list[Candidate]]:
        """Find each image's tags.

        Args:
            images: of one resized size and any mode. No step takes more pairs of image and prompt than there are
                images.
            tags: of each image, any number of them.

        Returns:
            Candidates of each image, highest score first; equal ones in the order of prompts and queries.

        Raises:
            ValueError: for other counts, images of several resized sizes, or a tag that makes no prompt.
            NonFiniteScoresError: an image has no finite scores, in float32 either.
        """
        if len(images) != len(tags):
            raise ValueError(f"tags: found those of {len(tags)} images, expected {len(images)}")
        with_tags = [position for position, own in enumerate(tags) if len(own)]
        shapes = {self.resized_shape_hw(images[position].size) for position in with_tags}
        if len(shapes) > 1:
            raise ValueError(f"images: found the resized sizes {sorted(shapes)} (height, width), expected one a batch")
        found: list[list[Candidate]] = [[] for _ in images]
        if not with_tags:
            return found
        pictures = [images[position].convert("RGB") for position in with_tags]
        pixel_values = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
        pairs = [
            (row, prompt) for row, position in enumerate(with_tags) for prompt in self.prompts.build(tags[position])
        ]
        not_finite: set[int] = set()
        for start in range(0, len(pairs), len(images)):
            rows, prompts = zip(*pairs[start : start + len(images)], strict=True)
            logits, boxes = self._forward(pixel_values[list(rows)], prompts)
            for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
                position = with_tags[row]
                if not _is_finite(logits[index], boxes[index], prompt):
                    not_finite.add(position)
                    continue
                found[position] += self._candidates(logits[index], boxes[index], prompt, images[position].size)
        if not_finite:
            raise NonFiniteScoresError("Grounding DINO", sorted(not_finite))
        return [sorted(candidates, key=lambda candidate: -candidate.score) for candidates in found]

    def _forward(self, pixel_values: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Return logits `[P, Q, max_text_tokens]` and boxes `[P, Q, 4]` (centre and size, 0 to 1), on the CPU."""
        logits, boxes = self._computed(pixel_values, prompts, self.dtype)
        again = [pair for pair, prompt in enumerate(prompts) if not _is_finite(logits[pair], boxes[pair], prompt)]
        if again and self.dtype != torch.float32:
            logits[again], boxes[again] = self._computed(
                pixel_values[again], [prompts[pair] for pair in again], torch.float32
            )
        return logits, boxes

    def _computed(self, pixel_values: Tensor, prompts: Sequence[Prompt], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        texts = self.tokenizer.pad({"input_ids": [list(prompt.input_ids) for prompt in prompts]}, return_tensors="pt")
        with self.autocast(dtype):
            output = self.model(pixel_values=pixel_values, **texts.to(self.device))
        return output.logits.float().cpu(), output.pred_boxes.float().cpu()

    def _candidates(self, logits: Tensor, boxes: Tensor, prompt: Prompt, size_wh: tuple[int, int]) -> list[Candidate]:
        """Return what one prompt finds in one image, from logits `[Q, max_text_tokens]` and boxes `[Q, 4]`."""
        scores = logits[:, : len(prompt.input_ids)].sigmoid().double()  # [Q, L]
        best = scores.amax(dim=1)
        likely = torch.nonzero(best > self.candidate_thresholds.box)[:, 0]
        centre, size = boxes[likely].double().split(2, dim=1)  # [likely, 4] -> 2 x [likely, 2]
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=1) * torch.tensor(size_wh * 2)  # [likely, 4]
        tag_of_token = torch.tensor(prompt.tag_of_token)
        membership = (tag_of_token == torch.arange(len(prompt.tags))[:, None]).double()  # [tags, L]
        tag_scores = scores[likely] @ (membership / membership.sum(dim=1, keepdim=True)).T  # [likely, tags]
        is_in_phrase = (scores[likely] > self.candidate_thresholds.text) & (tag_of_token != NO_TAG)  # [likely, L]
        candidates = []
        for row, query in enumerate(likely.tolist()):
            best_tag = tag_scores[row].numpy().argmax()  # numpy's takes the first of equal ones
            tokens = torch.nonzero(is_in_phrase[row])[:, 0].tolist()
            candidates.append(
                Candidate.rounded(
                    corners[row].tolist(),
                    best[query].item(),
                    prompt.tags[best_tag],
                    tag_scores[row, best_tag].item(),
                    [(prompt.pieces[token], scores[query, token].item()) for token in tokens],
                )
            )
        return candidates


def _is_finite(logits: Tensor, boxes: Tensor, prompt: Prompt) -> bool:
    """Whether all numbers of one pair are finite; padding of the text is minus infinity on purpose."""
    return bool(logits[:, : len(prompt.input_ids)].isfinite().all() and boxes.isfinite().all())
