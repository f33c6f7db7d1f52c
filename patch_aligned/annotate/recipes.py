"""What builds the stages, as plain values that can be sent to another process, and what settings.json says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from patch_aligned.annotate.candidates import CandidateThresholds
from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.models import checkpoint_folder, commit_of, file_hashes
from patch_aligned.annotate.oracle import OracleStages
from patch_aligned.annotate.prompts import PromptJoin
from patch_aligned.annotate.ram.tagger import RamTagger, Resample
from patch_aligned.annotate.sam import SamSegmenter
from patch_aligned.annotate.selection import Selection
from patch_aligned.annotate.stages import ModelStages, Stages

_DECIDING_PACKAGES = ("patch-aligned-llava", "torch", "transformers", "pillow", "numpy", "pycocotools")


class Recipe(Protocol):
    """What builds stages."""

    def build(self, device: str) -> Stages:
        """Stages on a device."""


@dataclass(frozen=True)
class ModelRecipe:
    """RAM, Grounding DINO and SAM, by their files.

    Attributes:
        ram: RAM's or RAM++'s weights.
        ram_tag_list: RAM's list of tags.
        ram_thresholds: their thresholds.
        detector: folder or hub name of Grounding DINO.
        sam: folder or hub name of SAM or SAM 2.
        detector_revision: on the hub.
        sam_revision: on the hub.
        resample: how pictures are resized for RAM.
        prompt_join: what joins the tags of a prompt.
        candidate_thresholds: below them a candidate isn't kept.
        selection: which candidates become regions.
        segment_candidates: whether all candidates get a mask.
        dtype: what models compute in, by name; `auto` is bfloat16 on a GPU and float32 on a CPU.
    """

    ram: Path
    ram_tag_list: Path
    ram_thresholds: Path
    detector: str
    sam: str
    detector_revision: str = "main"
    sam_revision: str = "main"
    resample: Resample = "bilinear"
    prompt_join: PromptJoin = ", "
    candidate_thresholds: CandidateThresholds = CandidateThresholds()  # noqa: RUF009 - it can't change
    selection: Selection = field(default_factory=Selection)
    segment_candidates: bool = False
    dtype: str = "auto"

    def build(self, device: str) -> Stages:
        """Loads the models.

        Raises:
            ValueError: names the file that is missing or broken, and the flag that names it.
        """
        self.selection.require_within(self.candidate_thresholds)  # first: cheaper to fail on
        dtype: torch.dtype | None = None if self.dtype == "auto" else getattr(torch, self.dtype)
        detector_folder = checkpoint_folder(self.detector, self.detector_revision, "--detector")
        sam_folder = checkpoint_folder(self.sam, self.sam_revision, "--sam")
        tagger = RamTagger.from_checkpoint(
            self.ram, self.ram_tag_list, self.ram_thresholds, device=device, dtype=dtype, resample=self.resample
        )
        detector = GroundingDetector.from_pretrained(
            str(detector_folder),
            device=device,
            dtype=dtype,
            prompt_join=self.prompt_join,
            candidate_thresholds=self.candidate_thresholds,
        )
        segmenter = SamSegmenter.from_pretrained(str(sam_folder), device=device, dtype=dtype)
        # Where the files are doesn't decide anything; what is in them does.
        detector.settings |= _identity(self.detector, detector_folder)
        segmenter.settings |= _identity(self.sam, sam_folder)
        return ModelStages(tagger, detector, segmenter, self.selection, segment_candidates=self.segment_candidates)


@dataclass(frozen=True)
class OracleRecipe:
    """A PAD file that knows the answer."""

    pad: Path

    def build(self, device: str) -> Stages:
        """Reads the file; there is nothing to place on a device."""
        return OracleStages(self.pad)


def settings_of(stages: Stages, min_side: int, max_aspect: float) -> dict[str, Any]:
    """What decides the records, for settings.json: the models, which images are skipped, and versions of packages."""
    return {
        **stages.settings,
        "min_side": min_side,
        "max_aspect": max_aspect,
        "versions": {package: version(package) for package in _DECIDING_PACKAGES},
    }


def _identity(name_or_folder: str, folder: Path) -> dict[str, Any]:
    is_local = Path(name_or_folder) == folder
    return {
        "model": folder.resolve().name if is_local else name_or_folder,
        "revision": commit_of(folder, is_from_hub=not is_local),
        "files_sha256": file_hashes(folder),
    }
