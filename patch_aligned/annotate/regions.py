"""Candidates: what a detector found in an image at low thresholds, before any choice between them.

They are kept in the record, so that thresholds, NMS and the kind of label can be changed without the detector:

    {"bbox": [x1, y1, x2, y2], "score": 0.412345, "best_tag": "tennis racket", "best_tag_score": 0.31,
     "tokens": [["tennis", 0.21], ["racket", 0.412345]]}

What else is in a candidate belongs to its mask (`rle_mask` and more), if it has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from patch_aligned.pad import is_finite_number

_KEYS = ("bbox", "score", "best_tag", "best_tag_score", "tokens")
_SCORE_DECIMALS = 6
_PIXEL_DECIMALS = 3
_NO_BLANK_BEFORE = (".", ",", "?", "!")  # as BERT's tokenizer decodes them


class CandidateError(ValueError):
    """A candidate of a record that isn't as a detector writes it."""


class CandidateThresholds(NamedTuple):
    """What a candidate's score, and what a token's score in it, has to be above to be kept."""

    box: float = 0.15
    text: float = 0.15


class Candidate(NamedTuple):
    """A box that a detector found.

    Attributes:
        bbox_xyxy_px: corners in pixels of the image; may leave it slightly.
        score: the highest of all tokens of its prompt.
        best_tag: of the prompt's tags the one whose tokens have the highest mean score; the first of equal ones.
        best_tag_score: that mean.
        tokens: (word piece, score) of the tags' tokens above the candidates' text threshold, in the prompt's order.
    """

    bbox_xyxy_px: tuple[float, float, float, float]
    score: float
    best_tag: str
    best_tag_score: float
    tokens: tuple[tuple[str, float], ...]

    @classmethod
    def rounded(
        cls,
        bbox_xyxy_px: Iterable[float],
        score: float,
        best_tag: str,
        best_tag_score: float,
        tokens: Iterable[tuple[str, float]],
    ) -> Candidate:
        """A candidate with the digits that a record holds, so that choosing from it and from the record is the same."""
        x1, y1, x2, y2 = (round(float(number), _PIXEL_DECIMALS) for number in bbox_xyxy_px)
        return cls(
            (x1, y1, x2, y2),
            round(float(score), _SCORE_DECIMALS),
            best_tag,
            round(float(best_tag_score), _SCORE_DECIMALS),
            tuple((piece, round(float(token_score), _SCORE_DECIMALS)) for piece, token_score in tokens),
        )

    @classmethod
    def from_record(cls, record: Any, place: str) -> Candidate:
        """The candidate of a record's entry; further keys are left alone.

        Args:
            record: the entry.
            place: what error messages name, such as "candidates[3]".

        Raises:
            CandidateError: names the field, what was found and what was expected.
        """
        missing = [key for key in _KEYS if key not in record] if isinstance(record, Mapping) else list(_KEYS)
        if missing:
            found = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
            raise CandidateError(f"{place}: found {found or 'no key'}, expected the keys {', '.join(missing)} too")
        bbox, tokens = record["bbox"], record["tokens"]
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_finite_number, bbox)):
            raise CandidateError(f"{place}.bbox: found {bbox!r}, expected [x1, y1, x2, y2], four finite numbers")
        for key in ("score", "best_tag_score"):
            if not is_finite_number(record[key]):
                raise CandidateError(f"{place}.{key}: found {record[key]!r}, expected a finite number")
        if not isinstance(record["best_tag"], str) or not record["best_tag"].strip():
            raise CandidateError(f"{place}.best_tag: found {record['best_tag']!r}, expected a tag")
        if not isinstance(tokens, list) or not all(map(_is_token, tokens)):
            raise CandidateError(f"{place}.tokens: found {tokens!r}, expected a list of [word piece, score]")
        return cls(
            (bbox[0], bbox[1], bbox[2], bbox[3]),
            record["score"],
            record["best_tag"],
            record["best_tag_score"],
            tuple((piece, score) for piece, score in tokens),
        )

    def to_record(self) -> dict[str, Any]:
        """The entry of a record's `candidates`."""
        return {
            "bbox": list(self.bbox_xyxy_px),
            "score": self.score,
            "best_tag": self.best_tag,
            "best_tag_score": self.best_tag_score,
            "tokens": [list(token) for token in self.tokens],
        }

    def phrase(self, text_threshold: float) -> str:
        """The tags' tokens above the threshold, as one text; empty if there are none.

        This is how Grounding DINO labels a box. The tokens may be of several tags ("person man") or parts of one
        ("racket"). Word pieces are glued as BERT's tokenizer decodes them; what begins with a continuation ("##shirt")
        loses its mark. [CLS], [SEP] and what joins the tags are never in it.
        """
        text = ""
        for piece, score in self.tokens:
            if score > text_threshold:
                continues = piece.startswith("##")
                word = piece[2:] if continues and piece != "##" else piece
                text += word if not text or continues or piece in _NO_BLANK_BEFORE else f" {word}"
        return text if any(map(str.isalnum, text)) else ""  # a lone "-" of "t-shirt" names nothing


def mask_fields(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """What a record's candidate says of its mask, empty if it has none."""
    return {key: value for key, value in candidate.items() if key not in _KEYS} if "rle_mask" in candidate else {}


def _is_token(token: Any) -> bool:
    return isinstance(token, list) and len(token) == 2 and isinstance(token[0], str) and is_finite_number(token[1])


# Text prompts of Grounding DINO: tags in, prompts that fit its text encoder out, each token with the tag it is of.
#
# A prompt is "person, tennis racket." The model takes 256 tokens at most, so many tags make several prompts; they are
# cut between tags. A prompt always ends with a period: without one the last tag would belong to no block of the
# model's text attention, and the result would depend on what the prompt is batched with.
#
# With ", " a prompt is one block in which each tag sees the others, with ". " each tag is a block of its own.

PromptJoin = Literal[", ", ". "]

NO_TAG = -1
"""`Prompt.tag_of_token` of the tokens that join tags, and of those that frame the prompt."""

_END = "."
_FRAME_TOKENS = 3  # [CLS], the period at the end, [SEP]

# The model's code knows its delimiters by these ids of BERT's uncased vocabulary, whatever the tokenizer says.
_IDS_IN_THE_MODEL = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}


class Prompt(NamedTuple):
    """One text for one image.

    Attributes:
        text: lower-cased, ends with a period.
        tags: those in it, as they were given.
        input_ids: with [CLS] and [SEP].
        pieces: what each token reads as; continuations of a word begin with "##".
        tag_of_token: for each token the position of its tag in `tags`, or `NO_TAG`.
    """

    text: str
    tags: tuple[str, ...]
    input_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    tag_of_token: tuple[int, ...]


class PromptBuilder:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Any, *, join: PromptJoin = ", ", max_tokens: int = 256) -> None:
        """Checks the tokenizer.

        Args:
            tokenizer: BERT's uncased one, a fast one of transformers.
            join: between tags; the reference recipe joins with commas.
            max_tokens: of a prompt, with [CLS] and [SEP]; the model's `max_text_len`.

        Raises:
            ValueError: for a tokenizer with other delimiters than the model has, or another `join`.
        """
        if join not in get_args(PromptJoin):
            raise ValueError(
                f"prompt_join: found {join!r}, expected one of {', '.join(map(repr, get_args(PromptJoin)))}"
            )
        found = {token: tokenizer.convert_tokens_to_ids(token) for token in _IDS_IN_THE_MODEL}
        if found != _IDS_IN_THE_MODEL:
            raise ValueError(
                f"tokenizer: found the ids {found}, expected {_IDS_IN_THE_MODEL} of bert-base-uncased, which the "
                "model's code has built in. Is its vocab.txt that of the checkpoint?"
            )
        self._tokenizer = tokenizer
        self._join = join
        self._max_tokens = max_tokens

    def build(self, tags: Sequence[str]) -> list[Prompt]:
        """Prompts that have each tag once, in order. Tags that differ only in case or in blanks around count as one.

        Raises:
            ValueError: for a tag without words, or with more tokens than a prompt can have.
        """
        tag_of_name: dict[str, str] = {}
        for tag in tags:
            tag_of_name.setdefault(tag.strip().lower(), tag)
        return [self._prompt(names, [tag_of_name[name] for name in names]) for names in self._chunks(list(tag_of_name))]

    def _chunks(self, names: list[str]) -> Iterator[list[str]]:
        """Names in order, as many at a time as fit into a prompt."""
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
        tag_of_character = [NO_TAG] * len(text)
        start = 0
        for position, name in enumerate(names):
            tag_of_character[start : start + len(name)] = [position] * len(name)
            start += len(name) + len(self._join)
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        return Prompt(
            text=text,
            tags=tuple(tags),
            input_ids=tuple(ids),
            pieces=tuple(
                # What the vocabulary lacks still has its letters in the text.
                text[start:end] if token == self._tokenizer.unk_token_id else piece
                for token, piece, (start, end) in zip(
                    ids, self._tokenizer.convert_ids_to_tokens(ids), spans, strict=True
                )
            ),
            tag_of_token=tuple(tag_of_character[start] if end > start else NO_TAG for start, end in spans),
        )


# Which candidates become labels: thresholds, non-maximum suppression, and what a label is called.
#
# The recipe of the reference: boxes whose score is above 0.25, of those that overlap by more than 0.5 only the one with
# the highest score, whatever they show, and for a label the tokens above 0.2. No model is needed for it.

LabelMode = Literal["phrase", "best_tag"]

_LABEL_KEYS = ("tag", "bbox", "score", "phrase", "best_tag", "best_tag_score", "candidate")


@dataclass(frozen=True)
class Selection:
    """How candidates are chosen and named.

    Attributes:
        box_threshold: a candidate's score has to be above it.
        text_threshold: a token's score has to be above it to be in the phrase.
        nms_iou: of two boxes with a higher intersection over union the one with the lower score goes.
        label_mode: `phrase` names a region by the tokens above `text_threshold`, as Grounding DINO does (by the best
            tag where there are none); `best_tag` always by the tag that fits best.
        min_box_area_px: boxes with a smaller area within the image go.
    """

    box_threshold: float = 0.25
    text_threshold: float = 0.2
    nms_iou: float = 0.5
    label_mode: LabelMode = "phrase"
    min_box_area_px: float = 1.0

    def __post_init__(self) -> None:
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: found {value}, expected 0 to 1")
        if not self.min_box_area_px >= 0:
            raise ValueError(f"min_box_area_px: found {self.min_box_area_px}, expected 0 or more")
        if self.label_mode not in get_args(LabelMode):
            raise ValueError(f"label_mode: found {self.label_mode!r}, expected one of {', '.join(get_args(LabelMode))}")

    def require_within(self, kept: CandidateThresholds) -> None:
        """Checks that nothing is asked for that was never kept.

        Raises:
            ValueError: a threshold below that of the candidates.
        """
        for name, value, floor in (
            ("box_threshold", self.box_threshold, kept.box),
            ("text_threshold", self.text_threshold, kept.text),
        ):
            if value < floor:
                raise ValueError(
                    f"{name}: found {value}, expected {floor} or more, the threshold at which candidates were kept. "
                    f"Annotate with a lower --candidate_{name}"
                )


class Selected(NamedTuple):
    """A candidate that becomes a label.

    Attributes:
        position: in the image's candidates.
        candidate: that one.
        tag: what the region is called.
        phrase: the tokens above the text threshold, perhaps none.
    """

    position: int
    candidate: Candidate
    tag: str
    phrase: str

    def to_label(self, mask: Mapping[str, Any]) -> dict[str, Any]:
        """The label of a PAD record.

        Args:
            mask: `rle_mask`, and whatever else is known of the mask.
        """
        return {
            "tag": self.tag,
            "bbox": list(self.candidate.bbox_xyxy_px),
            "rle_mask": mask["rle_mask"],
            "score": self.candidate.score,
            "phrase": self.phrase,
            "best_tag": self.candidate.best_tag,
            "best_tag_score": self.candidate.best_tag_score,
            "candidate": self.position,
            **mask,
        }


def mask_of_label(label: Mapping[str, Any]) -> dict[str, Any]:
    """The `mask` that `to_label` was given."""
    return {key: value for key, value in label.items() if key not in _LABEL_KEYS}


def select(candidates: Sequence[Candidate], selection: Selection, size_wh: tuple[int, int]) -> list[Selected]:
    """The candidates that become labels, highest score first.

    Args:
        candidates: of one image.
        selection: how to choose.
        size_wh: of the image in pixels.
    """
    likely = [
        position
        for position, candidate in enumerate(candidates)
        if candidate.score > selection.box_threshold
        and _area_within(candidate.bbox_xyxy_px, size_wh) >= selection.min_box_area_px
    ]
    boxes = np.array([candidates[position].bbox_xyxy_px for position in likely], dtype=np.float64).reshape(-1, 4)
    scores = np.array([candidates[position].score for position in likely], dtype=np.float64)
    selected = []
    for kept in non_maximum_suppression(boxes, scores, selection.nms_iou):
        candidate = candidates[likely[kept]]
        phrase = candidate.phrase(selection.text_threshold)
        tag = candidate.best_tag if selection.label_mode == "best_tag" or not phrase else phrase
        selected.append(Selected(likely[kept], candidate, tag, phrase))
    return selected


def non_maximum_suppression(boxes_xyxy: np.ndarray, scores: np.ndarray, iou_threshold: float) -> list[int]:
    """Boxes that don't overlap with a better one that is kept.

    Args:
        boxes_xyxy: `[n, 4]`.
        scores: `[n]`; of equal ones the first counts as better.
        iou_threshold: a box goes where its intersection over union with a better one is above it.

    Returns:
        Positions of the boxes kept, best first. Equals `torchvision.ops.nms`.
    """
    order = np.argsort(-scores, kind="stable")
    boxes = boxes_xyxy[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # [n]
    is_kept = np.ones(len(order), dtype=bool)
    for rank in range(len(order)):
        if not is_kept[rank]:
            continue
        worse = slice(rank + 1, None)
        sides = np.minimum(boxes[rank, 2:], boxes[worse, 2:]) - np.maximum(boxes[rank, :2], boxes[worse, :2])
        intersection = sides.clip(min=0).prod(axis=1)  # [n - rank - 1]
        union = areas[rank] + areas[worse] - intersection
        iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
        is_kept[worse] &= iou <= iou_threshold
    return order[is_kept].tolist()


def _area_within(bbox_xyxy_px: Sequence[float], size_wh: tuple[int, int]) -> float:
    x1, y1, x2, y2 = bbox_xyxy_px
    return max(0.0, min(x2, size_wh[0]) - max(x1, 0.0)) * max(0.0, min(y2, size_wh[1]) - max(y1, 0.0))


# Images for which a model computed no finite numbers.


class NonFiniteScoresError(ArithmeticError):
    """Images whose scores or boxes are not finite, even in float32.

    Attributes:
        positions: of these images in the batch.
    """

    def __init__(self, model: str, positions: list[int]) -> None:
        super().__init__(
            f"{model}: found scores that are not finite for images {positions} of the batch, also in float32"
        )
        self.positions = positions
