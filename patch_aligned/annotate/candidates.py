"""Candidates: what a detector found in an image at low thresholds, before any choice between them.

They are kept in the record, so that thresholds, NMS and the kind of label can be changed without the detector:

    {"bbox": [x1, y1, x2, y2], "score": 0.412345, "best_tag": "tennis racket", "best_tag_score": 0.31,
     "tokens": [["tennis", 0.21], ["racket", 0.412345]]}

What else is in a candidate belongs to its mask (`rle_mask` and more), if it has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from patch_aligned.annotations import is_finite_number

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
