"""The models that annotate: a tagger gives the phrases of an image, a segmenter finds them and makes masks.

A tagger has `tag`, `settings`, their `key` in settings.json, and `tags`: phrases that are known before the first image.
A segmenter has `bucket`, `detect` and `segment` of `Stages`, its `models` by their flags, and `candidate_thresholds`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from patch_aligned.annotate import taggers
from patch_aligned.annotate.fetch import DeviceModel, checkpoint_folder, identity_of
from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.options import ModelOptions, Selection
from patch_aligned.annotate.pipeline import ImageInWork
from patch_aligned.annotate.ram.tagger import RamTagger
from patch_aligned.annotate.regions import Candidate, Mask
from patch_aligned.annotate.sam import SamSegmenter
from patch_aligned.annotate.sam3 import Sam3Segmenter


class BoxesThenMasks:
    """The paper's segmenter: Grounding DINO finds boxes, SAM makes a mask for each."""

    def __init__(self, detector: GroundingDetector, sam: SamSegmenter) -> None:
        self.detector = detector
        self.sam = sam
        self.models: dict[str, DeviceModel] = {"detector": detector, "sam": sam}
        self.candidate_thresholds = detector.candidate_thresholds

    def bucket(self, item: ImageInWork) -> Hashable:
        """The size to which the detector resizes the image."""
        return self.detector.resized_shape_hw(item.image.size)

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """Grounding DINO's boxes for the tags."""
        return self.detector.detect([item.image for item in items], [[tag.name for tag in item.tags] for item in items])

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """SAM's masks."""
        boxes = [[item.candidates[position].bbox_xyxy_px for position in item.to_segment] for item in items]
        return self.sam.segment([item.image for item in items], boxes)


Tagger = RamTagger | taggers.PhraseTagger
ModelSegmenter = BoxesThenMasks | Sam3Segmenter


class ModelStages:
    """A tagger and a segmenter: the `Stages` of `patch-aligned annotate`."""

    def __init__(
        self, tagger: Tagger, segmenter: ModelSegmenter, selection: Selection, *, segment_candidates: bool = False
    ) -> None:
        """Combine them; `ValueError` for a threshold below that of the candidates, or a tag that makes no prompt."""
        selection.require_within(segmenter.candidate_thresholds)
        if isinstance(segmenter, BoxesThenMasks):
            segmenter.detector.prompts.build(tagger.tags)  # or the first image that has such a tag would end the run
        self.tag, self.bucket = tagger.tag, segmenter.bucket
        self.detect, self.segment = segmenter.detect, segmenter.segment
        self.selection = selection
        self.segment_candidates = segment_candidates
        self.settings: dict[str, Any] = {
            "stages": "models",
            tagger.key: tagger.settings,
            **{flag: model.settings for flag, model in segmenter.models.items()},
            "selection": asdict(selection),
            "segment_candidates": segment_candidates,
        }


def build_stages(
    models: ModelOptions, selection: Selection, device: str, entries: Sequence[ManifestEntry] = ()
) -> ModelStages:
    """Load the models for images; `ValueError` names the file that is missing or broken, and its flag."""
    selection.require_within(models.candidate_thresholds)  # first: cheaper to fail on
    flags = ["sam3"] if models.segmenter == "sam3" else ["detector", "sam"]
    flags += ["vlm"] if models.tagger == "vlm" and not models.vlm_url else []
    folders = {
        flag: checkpoint_folder(getattr(models, flag), getattr(models, f"{flag}_revision"), f"--{flag}")
        for flag in flags
    }
    dtype: torch.dtype | None = None if models.dtype == "auto" else getattr(torch, models.dtype)
    on: dict[str, Any] = {"device": device, "dtype": dtype}
    kept = models.candidate_thresholds
    tagger = _tagger(models, on, entries, folders)
    segmenter: ModelSegmenter
    if models.segmenter == "sam3":
        of_masks = {"mask_threshold": models.mask_threshold, "presence_threshold": models.presence_threshold}
        segmenter = Sam3Segmenter.from_pretrained(folders["sam3"], **on, candidate_thresholds=kept, **of_masks)
    else:
        detector = GroundingDetector.from_pretrained(
            folders["detector"], **on, prompt_join=models.prompt_join, candidate_thresholds=kept
        )
        segmenter = BoxesThenMasks(detector, SamSegmenter.from_pretrained(folders["sam"], **on))
    for flag, model in segmenter.models.items():  # the place of the files determines nothing; their content does
        model.settings |= identity_of(getattr(models, flag), folders[flag])
    keep_all = models.segment_candidates or models.segmenter == "sam3"  # which makes all masks anyway
    return ModelStages(tagger, segmenter, selection, segment_candidates=keep_all)


def _tagger(
    models: ModelOptions, on: dict[str, Any], entries: Sequence[ManifestEntry], folders: Mapping[str, Path]
) -> Tagger:
    if models.tagger == "file" and models.phrases:
        return taggers.of_file(models.phrases, [entry.image_id for entry in entries])
    if models.tagger == "captions":
        return taggers.of_captions(models.spacy, [entry.caption for entry in entries])
    if models.tagger == "vlm" and models.vlm and models.vlm_url:
        return taggers.of_answers(taggers.ask_server(models.vlm_url, models.vlm), {"server_model": models.vlm})
    if models.tagger == "vlm" and models.vlm:
        settings = identity_of(models.vlm, folders["vlm"]) | {"dtype": f"{models.dtype}, {on['device'].split(':')[0]}"}
        return taggers.of_answers(taggers.ask_model(folders["vlm"], **on), settings)
    files: Any = (models.ram, models.ram_tag_list, models.ram_thresholds)
    return RamTagger.from_checkpoint(*files, **on, resample=models.resample)
