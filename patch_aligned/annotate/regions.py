"""From tags to prompts for the detector, and from its candidates to regions: thresholds, NMS and labels.

Candidates are what a detector found in an image at low thresholds. Records keep all of them, so that thresholds, NMS
and the kind of label can be changed without the detector:

    {"bbox": [x1, y1, x2, y2], "score": 0.412345, "best_tag": "tennis racket", "best_tag_score": 0.31,
     "tokens": [["tennis", 0.21], ["racket", 0.412345]]}

All other keys of a candidate belong to its mask (`rle_mask` and more), if it has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import AllowInfNan, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from patch_aligned.annotate.options import PromptJoin, Selection
from patch_aligned.files import describe_invalid

_KEYS = ("bbox", "score", "best_tag", "best_tag_score", "tokens")
_LABEL_KEYS = ("tag", "bbox", "score", "phrase", "best_tag", "best_tag_score", "candidate")
_SCORE_DECIMALS = 6
_PIXEL_DECIMALS = 3
_NO_BLANK_BEFORE = (".", ",", "?", "!")  # as BERT's tokenizer decodes them

Number = Annotated[float, Strict(), AllowInfNan(False)]


class Tag(NamedTuple):
    """A tag or phrase of an image, and its probability if its source gives one."""

    name: str
    score: float | None = None


class Mask(TypedDict, total=False):
    """The mask of a box or of an instance, as records have it."""

    rle_mask: str  # COCO compressed RLE of the image's size
    area_px: int  # 0 where the model found nothing
    predicted_iou: float  # SAM's own estimate of the mask's quality
    presence: float  # SAM 3's probability that the phrase is in the image; a factor of the score


@dataclass(frozen=True, config=ConfigDict(validate_by_name=True, serialize_by_alias=True))
class Candidate:
    """A box that a detector found.

    Attributes:
        bbox_xyxy_px: corners in pixels of the image; may extend slightly beyond it.
        score: highest score of all tokens of its prompt.
        best_tag: tag of the prompt whose tokens have the highest mean score; the first of equal ones.
        best_tag_score: that mean.
        tokens: (word piece, score) of the tags' tokens above the candidates' text threshold, in the prompt's order.
        mask: what its record holds of the mask, if that was found together with the box. Never part of `to_record`.
    """

    bbox_xyxy_px: Annotated[tuple[Number, Number, Number, Number], Field(alias="bbox")]
    score: Number
    best_tag: Annotated[str, Field(pattern=r"\S")]
    best_tag_score: Number
    tokens: tuple[tuple[str, Number], ...]
    mask: Annotated[Mapping[str, Any] | None, Field(exclude=True)] = None

    @classmethod
    def rounded(
        cls,
        bbox_xyxy_px: Iterable[float],
        score: float,
        best_tag: str,
        best_tag_score: float,
        tokens: Iterable[tuple[str, float]],
    ) -> Candidate:
        """Round to the digits of a record, so that choosing from the candidate and from the record is the same."""
        x1, y1, x2, y2 = (round(float(number), _PIXEL_DECIMALS) for number in bbox_xyxy_px)
        return cls(
            (x1, y1, x2, y2),
            round(float(score), _SCORE_DECIMALS),
            best_tag,
            round(float(best_tag_score), _SCORE_DECIMALS),
            tuple((piece, round(float(token_score), _SCORE_DECIMALS)) for piece, token_score in tokens),
        )

    @classmethod
    def from_record(cls, entry: Any, place: str) -> Candidate:
        """Validate an entry of a record's `candidates`, which is at `place`; additional keys are ignored."""
        try:
            return _CANDIDATE.validate_python(entry)
        except ValidationError as error:
            raise ValueError(f"{place}: {describe_invalid(error)}. Annotate the image again") from error

    def to_record(self) -> dict[str, Any]:
        """Return the entry of a record's `candidates`."""
        entry: dict[str, Any] = _CANDIDATE.dump_python(self, mode="json")
        return entry

    def phrase(self, text_threshold: float) -> str:
        """Join the tags' tokens above the threshold; empty if there are none.

        This is how Grounding DINO labels a box. The tokens may be of several tags ("person man") or parts of one
        ("racket"). Word pieces are joined as BERT's tokenizer decodes them; a phrase that starts with a continuation
        ("##shirt") loses its mark. It never has [CLS], [SEP] or what joins the tags.
        """
        text = ""
        for piece, score in self.tokens:
            if score > text_threshold:
                continues = piece.startswith("##")
                word = piece[2:] if continues and piece != "##" else piece
                text += word if not text or continues or piece in _NO_BLANK_BEFORE else f" {word}"
        return text if any(map(str.isalnum, text)) else ""  # a lone "-" of "t-shirt" names nothing

    def tag(self, selection: Selection) -> str:
        """Return what the region is called."""
        phrase = self.phrase(selection.text_threshold) if selection.label_mode == "phrase" else ""
        return phrase or self.best_tag

    def to_label(self, position: int, selection: Selection, mask: Mapping[str, Any]) -> dict[str, Any]:
        """Return the label of a PAD record; `position` is its own in the image's candidates."""
        return {
            "tag": self.tag(selection),
            "bbox": list(self.bbox_xyxy_px),
            "rle_mask": mask["rle_mask"],
            "score": self.score,
            "phrase": self.phrase(selection.text_threshold),
            "best_tag": self.best_tag,
            "best_tag_score": self.best_tag_score,
            "candidate": position,
            **mask,
        }


_CANDIDATE = TypeAdapter(Candidate)


def mask_of_candidate(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record's candidate holds of its mask; empty if it has none."""
    return {key: value for key, value in entry.items() if key not in _KEYS} if "rle_mask" in entry else {}


def mask_of_label(label: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `mask` that `to_label` was given."""
    return {key: value for key, value in label.items() if key not in _LABEL_KEYS}


class NonFiniteScoresError(ArithmeticError):
    """Raised for images whose scores or boxes are not finite, even in float32; `positions` are theirs in the batch."""

    def __init__(self, model: str, positions: list[int]) -> None:
        super().__init__(
            f"{model}: found scores that are not finite for images {positions} of the batch, also in float32"
        )
        self.positions = positions


# Text prompts of Grounding DINO.
#
# A prompt is "person, tennis racket." The model takes 256 tokens at most, so many tags make several prompts, which are
# split between tags. A prompt always ends with a period: without one the last tag would be in no block of the model's
# text attention, and the result would depend on what the prompt is batched with.
#
# With ", " a prompt is one block in which each tag attends to the others, with ". " each tag is a block of its own.

NO_TAG = -1
"""`Prompt.tag_of_token` of the tokens that join tags, and of those that frame the prompt."""

_END = "."
_FRAME_TOKENS = 3  # [CLS], the period at the end, [SEP]

# The model's code has these ids of BERT's uncased vocabulary built in, whatever the tokenizer says.
_IDS_IN_THE_MODEL = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}


class Prompt(NamedTuple):
    """One text for one image."""

    text: str  # lower-cased, ends with a period
    tags: tuple[str, ...]  # as they were given
    input_ids: tuple[int, ...]  # with [CLS] and [SEP]
    pieces: tuple[str, ...]  # text of each token; continuations of a word start with "##"
    tag_of_token: tuple[int, ...]  # position in `tags` of each token's tag, or NO_TAG


class PromptBuilder:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Any, *, join: PromptJoin = ", ", max_tokens: int = 256) -> None:
        """Check that the tokenizer is BERT's uncased one; `max_tokens` of a prompt count [CLS] and [SEP] too."""
        found = {token: tokenizer.convert_tokens_to_ids(token) for token in _IDS_IN_THE_MODEL}
        if found != _IDS_IN_THE_MODEL:
            raise ValueError(
                f"tokenizer: found the ids {found}, expected {_IDS_IN_THE_MODEL} of bert-base-uncased, which the "
                "model's code has built in. Is its vocab.txt that of the checkpoint?"
            )
        self._tokenizer, self._join, self._max_tokens = tokenizer, join, max_tokens

    def build(self, tags: Sequence[str]) -> list[Prompt]:
        """Return prompts that have each tag once, in order. Tags that differ only in case or outer blanks are one."""
        tag_of_name: dict[str, str] = {}
        for tag in tags:
            tag_of_name.setdefault(tag.strip().lower(), tag)
        return [self._prompt(names, [tag_of_name[name] for name in names]) for names in self._chunks(list(tag_of_name))]

    def _chunks(self, names: list[str]) -> Iterator[list[str]]:
        """Yield names in order, as many at a time as fit into a prompt."""
        if not names:
            return
        room = self._max_tokens - _FRAME_TOKENS
        counts = [len(ids) for ids in self._tokenizer(names, add_special_tokens=False)["input_ids"]]
        chunk: list[str] = []
        used = 0
        for name, count in zip(names, counts, strict=True):
            if not 0 < count <= room:
                raise ValueError(f"tag {name!r}: found {count} tokens, expected 1 to {room}. Correct the list of tags")
            if chunk and used + 1 + count > room:  # 1: what joins it is one token
                yield chunk
                chunk, used = [], 0
            used += count + (1 if chunk else 0)
            chunk.append(name)
        yield chunk

    def _prompt(self, names: list[str], tags: list[str]) -> Prompt:
        text = self._join.join(names) + _END
        tag_of_character: list[int] = []
        for position, name in enumerate(names):
            tag_of_character += [position] * len(name) + [NO_TAG] * len(self._join)
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        pieces = zip(ids, self._tokenizer.convert_ids_to_tokens(ids), spans, strict=True)
        return Prompt(
            text=text,
            tags=tuple(tags),
            input_ids=tuple(ids),
            # A token that the vocabulary lacks still has its letters in the text.
            pieces=tuple(
                text[start:end] if token == self._tokenizer.unk_token_id else piece
                for token, piece, (start, end) in pieces
            ),
            tag_of_token=tuple(tag_of_character[start] if end > start else NO_TAG for start, end in spans),
        )


# The choice of candidates: above a score, and of those that overlap only the best one, whatever they show.


def select(candidates: Sequence[Candidate], selection: Selection, size_wh: tuple[int, int]) -> list[int]:
    """Return which candidates become regions, best first. They overlap by masks, if they have all come with one."""
    likely = [
        position
        for position, candidate in enumerate(candidates)
        if candidate.score > selection.box_threshold
        and _area_within(candidate.bbox_xyxy_px, size_wh) >= selection.min_box_area_px
    ]
    scores = np.array([candidates[position].score for position in likely], dtype=np.float64)
    masks = [mask["rle_mask"].encode() for position in likely if (mask := candidates[position].mask)]
    if masks and len(masks) == len(likely):
        rles = [{"size": size_wh[::-1], "counts": mask} for mask in masks]
        ious = coco_mask.iou(rles, rles, [0] * len(rles))  # [likely, likely]
    else:
        boxes = np.array([candidates[position].bbox_xyxy_px for position in likely], dtype=np.float64).reshape(-1, 4)
        ious = box_ious(boxes)
    return [likely[position] for position in non_maximum_suppression(ious, scores, selection.nms_iou)]


def box_ious(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return the IoU `[n, n]` of each pair of boxes `[n, 4]`, 0 where both are empty."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    areas = (high - low).prod(axis=1)  # [n]
    sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # [n, n, 2]
    intersection = sides.clip(min=0).prod(axis=2)  # [n, n]
    union = areas[:, None] + areas - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def non_maximum_suppression(ious: np.ndarray, scores: np.ndarray, iou_threshold: float) -> list[int]:
    """Return what has no higher IoU `[n, n]` with something better that is kept, best first; of equal scores the first.

    Equals `torchvision.ops.nms`.
    """
    order = np.argsort(-scores, kind="stable")
    is_kept = np.ones(len(order), dtype=bool)
    for rank in range(len(order) - 1):
        if is_kept[rank]:
            is_kept[rank + 1 :] &= ious[order[rank], order[rank + 1 :]] <= iou_threshold
    return order[is_kept].tolist()


def _area_within(bbox_xyxy_px: Sequence[float], size_wh: tuple[int, int]) -> float:
    x1, y1, x2, y2 = bbox_xyxy_px
    return max(0.0, min(x2, size_wh[0]) - max(x1, 0.0)) * max(0.0, min(y2, size_wh[1]) - max(y1, 0.0))
