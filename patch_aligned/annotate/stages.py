"""The three stages of annotation behind one interface, and their implementation by models.

Tag the image, find boxes for its tags, make a mask for each box. Each stage takes a batch of images that are decoded
already and gives one result an image; it knows nothing of files, shards or failures.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from PIL import Image

from patch_aligned.annotate.candidates import Candidate
from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.ram.tagger import RamTagger, Tag
from patch_aligned.annotate.sam import Mask, SamSegmenter
from patch_aligned.annotate.selection import Selected, Selection, select


@dataclass
class ImageInWork:
    """An image on its way through the stages.

    Attributes:
        image_id: its path below the image folder.
        image: decoded once.
        tags: from the first stage.
        candidates: from the second, at low thresholds and before boxes on the same object are suppressed.
        selected: those of them that become regions.
        to_segment: positions of the candidates that get a mask: the selected ones, or all.
    """

    image_id: str
    image: Image.Image
    tags: list[Tag] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    selected: list[Selected] = field(default_factory=list)
    to_segment: list[int] = field(default_factory=list)


class Stages(Protocol):
    """What annotates a batch of images.

    Attributes:
        settings: all that decides the results, as plain values for settings.json.
        segment_candidates: all candidates get a mask, so that others can be selected later.
    """

    settings: dict[str, Any]
    segment_candidates: bool

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        """Tags of each image."""

    def bucket(self, item: ImageInWork) -> Hashable:
        """Images of one bucket are detected together: the model sees them in one size, so that none is padded."""

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """Candidates of each image, for its tags."""

    def select(self, item: ImageInWork) -> list[Selected]:
        """Those of an image's candidates that become regions."""

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """A mask for each candidate of each image that is `to_segment`."""


class ModelStages:
    """RAM, Grounding DINO and SAM."""

    def __init__(
        self,
        tagger: RamTagger,
        detector: GroundingDetector,
        segmenter: SamSegmenter,
        selection: Selection,
        *,
        segment_candidates: bool = False,
    ) -> None:
        """Puts the models in a row.

        Raises:
            SelectionError: for thresholds below those at which the detector keeps candidates.
            PromptError: for a tag that makes no prompt.
        """
        selection.require_within(detector.candidate_thresholds)
        detector.prompts.build(tagger.tags)  # or the first image that has such a tag would end the run
        self.tagger = tagger
        self.detector = detector
        self.segmenter = segmenter
        self.selection = selection
        self.segment_candidates = segment_candidates
        self.settings: dict[str, Any] = {
            "stages": "models",
            "ram": tagger.settings,
            "detector": detector.settings,
            "selection": asdict(selection),
            "segment_candidates": segment_candidates,
            "sam": segmenter.settings,
        }

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        """RAM's tags above their thresholds."""
        return self.tagger.tag([item.image for item in items])

    def bucket(self, item: ImageInWork) -> Hashable:
        """The size to which the detector resizes the image."""
        return self.detector.resized_shape_hw(item.image.size)

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """Grounding DINO's boxes for the tags."""
        return self.detector.detect([item.image for item in items], [[tag.name for tag in item.tags] for item in items])

    def select(self, item: ImageInWork) -> list[Selected]:
        """Thresholds, NMS and the choice of the label."""
        return select(item.candidates, self.selection, item.image.size)

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """SAM's masks."""
        boxes = [[item.candidates[position].bbox_xyxy_px for position in item.to_segment] for item in items]
        return self.segmenter.segment([item.image for item in items], boxes)
