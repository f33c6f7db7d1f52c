"""Boxes for tags, by Grounding DINO or MM Grounding DINO: pictures and their tags in, candidates out.

The images of one call have the same size once they are resized (`resized_shape_hw`): the model would see the padding
of smaller ones, and find other boxes than it finds in the image alone. Images without tags never reach the model; one
whose tags fill several prompts has the candidates of all of them.

Letters: B images that have tags, P pairs of an image and a prompt in one step, Q the model's queries, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from patch_aligned.annotate.fetch import kind_of_checkpoint, load_whole_model
from patch_aligned.annotate.regions import (
    NO_TAG,
    Candidate,
    CandidateThresholds,
    NonFiniteScoresError,
    Prompt,
    PromptBuilder,
    PromptJoin,
)

_DETECTION_MODELS: dict[str, Any] = {
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}


class GroundingDetector:
    """Grounding DINO or MM Grounding DINO on one device.

    Attributes:
        candidate_thresholds: below them nothing is kept.
        settings: what decides the candidates, as plain values for a manifest.
    """

    def __init__(
        self,
        model: GroundingDinoForObjectDetection | MMGroundingDinoForObjectDetection,
        tokenizer: Any,
        image_processor: Any,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        prompt_join: PromptJoin = ", ",
        candidate_thresholds: CandidateThresholds = CandidateThresholds(),  # noqa: B008 - it can't change
    ) -> None:
        """Places the model.

        Args:
            model: Grounding DINO or MM Grounding DINO.
            tokenizer: the one that belongs to it.
            image_processor: the one that belongs to it.
            device: where it runs.
            dtype: what autocast computes in, float32 for none; by default bfloat16 on a GPU, float32 on a CPU.
            prompt_join: between the tags of a prompt, see `PromptBuilder`.
            candidate_thresholds: of boxes and of tokens in them.

        Raises:
            ValueError: for an image processor that doesn't resize by the shortest edge; or a tokenizer that isn't the
                model's.
        """
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model = model.requires_grad_(False).eval()
        self.model.to(device=self.device)
        self.image_processor = image_processor
        size = image_processor.size
        self._shortest_edge, self._longest_edge = size.get("shortest_edge"), size.get("longest_edge")
        if not self._shortest_edge or not self._longest_edge:
            raise ValueError(f"image processor: found size {dict(size)}, expected shortest_edge and longest_edge")
        max_tokens = model.config.max_text_len
        self.prompts = PromptBuilder(tokenizer, join=prompt_join, max_tokens=max_tokens)
        self.tokenizer = tokenizer
        self.candidate_thresholds = candidate_thresholds
        self.settings: dict[str, Any] = {
            "kind": model.config.model_type,
            "shortest_edge": self._shortest_edge,
            "longest_edge": self._longest_edge,
            "max_text_tokens": max_tokens,
            "prompt_join": prompt_join,
            "candidate_thresholds": candidate_thresholds._asdict(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_pretrained(cls, name_or_folder: str, *, revision: str = "main", **options: Any) -> GroundingDetector:
        """A detector of the hub (IDEA-Research/grounding-dino-tiny and its like) or of a folder.

        Args:
            name_or_folder: of a checkpoint in transformers' format.
            revision: of the hub's repository.
            options: the constructor's.

        Raises:
            ValueError: for another kind of model, or where weights are missing; or a tokenizer that isn't the model's.
        """
        kind = kind_of_checkpoint(name_or_folder, revision, _DETECTION_MODELS)
        model = load_whole_model(_DETECTION_MODELS[kind], name_or_folder, revision)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, revision=revision)
        # The default processor needs torchvision, this one doesn't.
        image_processor = GroundingDinoImageProcessorPil.from_pretrained(name_or_folder, revision=revision)
        detector = cls(model, tokenizer, image_processor, **options)
        detector.settings |= {"model": name_or_folder, "revision": revision}
        return detector

    def resized_shape_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the model sees of an image of this size. Images of one call have to share them."""
        return get_size_with_aspect_ratio((size_wh[1], size_wh[0]), self._shortest_edge, self._longest_edge)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], tags: Sequence[Sequence[str]]) -> list[list[Candidate]]:
        """What the model finds of each image's tags.

        Args:
            images: pictures of one resized size, of any mode. All that have tags go through the model at once, and no
                step takes more pairs of image and prompt than there are images: the caller decides how many.
            tags: of each image, any number of them.

        Returns:
            Candidates of each image, highest score first; equal ones in the order of prompts and queries.

        Raises:
            ValueError: for other counts, or images of several resized sizes; or a tag that makes no prompt.
            NonFiniteScoresError: where an image has no finite scores. Before that it is tried again in float32.
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
            for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
                position = with_tags[row]
                if not _is_finite(logits[place], boxes[place], prompt):
                    not_finite.add(position)
                    continue
                found[position] += self._candidates(logits[place], boxes[place], prompt, images[position].size)
        if not_finite:
            raise NonFiniteScoresError("Grounding DINO", sorted(not_finite))
        return [sorted(candidates, key=lambda candidate: -candidate.score) for candidates in found]

    def _forward(self, pixel_values: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Logits `[P, Q, max_text_tokens]` and boxes `[P, Q, 4]` (centre and size, 0 to 1), on the CPU."""
        logits, boxes = self._computed(pixel_values, prompts, self.dtype)
        again = [place for place, prompt in enumerate(prompts) if not _is_finite(logits[place], boxes[place], prompt)]
        if again and self.dtype != torch.float32:
            logits[again], boxes[again] = self._computed(
                pixel_values[again], [prompts[place] for place in again], torch.float32
            )
        return logits, boxes

    def _computed(self, pixel_values: Tensor, prompts: Sequence[Prompt], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        texts = self.tokenizer.pad({"input_ids": [list(prompt.input_ids) for prompt in prompts]}, return_tensors="pt")
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = self.model(pixel_values=pixel_values, **texts.to(self.device))
        return output.logits.float().cpu(), output.pred_boxes.float().cpu()

    def _candidates(self, logits: Tensor, boxes: Tensor, prompt: Prompt, size_wh: tuple[int, int]) -> list[Candidate]:
        """What one prompt finds in one image, from logits `[Q, max_text_tokens]` and boxes `[Q, 4]`."""
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
        for place, query in enumerate(likely.tolist()):
            best_tag = tag_scores[place].numpy().argmax()  # numpy's takes the first of equal ones
            tokens = torch.nonzero(is_in_phrase[place])[:, 0].tolist()
            candidates.append(
                Candidate.rounded(
                    corners[place].tolist(),
                    best[query].item(),
                    prompt.tags[best_tag],
                    tag_scores[place, best_tag].item(),
                    [(prompt.pieces[token], scores[query, token].item()) for token in tokens],
                )
            )
        return candidates


def _is_finite(logits: Tensor, boxes: Tensor, prompt: Prompt) -> bool:
    """Whether all numbers of one pair are; what pads the text is minus infinity on purpose."""
    return bool(logits[:, : len(prompt.input_ids)].isfinite().all() and boxes.isfinite().all())
