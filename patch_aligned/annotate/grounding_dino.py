"""Boxes for tags, by Grounding DINO or MM Grounding DINO.

The images of one call have the same size once they are resized (`resized_shape_hw`): the model would see the padding
of smaller ones, and find other boxes than in the image alone. Images without tags never reach the model; one whose tags
fill several prompts has the candidates of all of them.

Letters: B images that have tags, P pairs of an image and a prompt in one step, Q the model's queries, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
        """Place the model on a device; for `dtype` see `DeviceModel`, for `prompt_join` `PromptBuilder`.

        Boxes below the thresholds of candidates, and tokens in them, are not kept.
        """
        super().__init__(model, device, dtype)
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.candidate_thresholds = candidate_thresholds
        size = image_processor.size
        self._shortest_edge, self._longest_edge = size.get("shortest_edge"), size.get("longest_edge")
        if not self._shortest_edge or not self._longest_edge:
            raise ValueError(f"image processor: found size {dict(size)}, expected shortest_edge and longest_edge")
        max_tokens = model.config.max_text_len
        self.prompts = PromptBuilder(tokenizer, join=prompt_join, max_tokens=max_tokens)
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
        """Load a checkpoint in transformers' format (IDEA-Research/grounding-dino-tiny and the like)."""
        model = load_model(class_of_checkpoint(folder, _DETECTION_MODELS), folder)
        # The default processor needs torchvision, this one does not.
        image_processor = GroundingDinoImageProcessorPil.from_pretrained(folder)
        return cls(model, AutoTokenizer.from_pretrained(folder), image_processor, **options)

    def resized_shape_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Return height and width at which the model sees an image. Images of one call have to share them."""
        return get_size_with_aspect_ratio((size_wh[1], size_wh[0]), self._shortest_edge, self._longest_edge)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[list[Candidate]]:
        """Find any number of tags of each image: its candidates, highest score first, then by prompt and query.

        No step takes more pairs of image and prompt than there are images. `NonFiniteScoresError` names images without
        finite scores, in float32 either.
        """
        with_tags = [position for position, (_, own) in enumerate(zip(images, tags, strict=True)) if own]
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
            some = pairs[start : start + len(images)]
            outputs = self.finite_or_none(partial(self._computed, pixel_values, some), len(some))
            for (row, prompt), output in zip(some, outputs, strict=True):
                position = with_tags[row]
                if output is None:
                    not_finite.add(position)
                else:
                    logits, boxes = output
                    found[position] += self._candidates(logits, boxes, prompt, images[position].size)
        if not_finite:
            raise NonFiniteScoresError("Grounding DINO", sorted(not_finite))
        return [sorted(candidates, key=lambda candidate: -candidate.score) for candidates in found]

    def _computed(
        self, pixel_values: Tensor, pairs: Sequence[tuple[int, Prompt]], chosen: Sequence[int], dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Return logits `[Q, max_text_tokens]` and boxes `[Q, 4]` (centre and size, 0 to 1) of pairs, on the CPU.

        None is for numbers that are not finite; padding of the text is minus infinity on purpose.
        """
        rows, prompts = zip(*(pairs[pair] for pair in chosen), strict=True)
        texts = self.tokenizer.pad({"input_ids": [list(prompt.input_ids) for prompt in prompts]}, return_tensors="pt")
        with self.autocast(dtype):
            output = self.model(pixel_values=pixel_values[list(rows)], **texts.to(self.device))
        outcomes: list[tuple[Tensor, Tensor] | None] = []
        numbers = zip(prompts, output.logits.float().cpu(), output.pred_boxes.float().cpu(), strict=True)
        for prompt, logits, boxes in numbers:
            is_finite = logits[:, : len(prompt.input_ids)].isfinite().all() and boxes.isfinite().all()
            outcomes.append((logits, boxes) if is_finite else None)
        return outcomes

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
