"""Run lengths of COCO's compressed RLE strings, without decoding any mask.

A compressed string spells the run lengths of a mask in column-major order, five bits a character, and from the fourth
run on as the difference to the run before the last. A whole batch of strings is taken apart with a few array
operations, which makes checking millions of masks a matter of a minute or two. Format: `maskApi.c` of pycocotools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_CHARACTERS = re.compile("[0-o]+")  # 64 codes from "0" on
_FIRST_CHARACTER = ord("0")
_CONTINUES = 0x20
_NEGATIVE = 0x10
_VALUE = 0x1F
_BITS = 5
_MAX_CHARACTERS_PER_RUN = 8  # 40 bits: far more than any image has pixels


def rle_problems(rle_masks: Sequence[str], pixels: Sequence[int]) -> list[str | None]:
    """What is wrong with each mask, or None: strange characters, a broken end, negative runs, a wrong total.

    Args:
        rle_masks: COCO compressed RLE strings.
        pixels: width x height that the runs of each mask have to sum to.

    Returns:
        One entry a mask, in words that fit behind "found".
    """
    return checked_run_lengths(rle_masks, pixels)[0]


def checked_run_lengths(
    rle_masks: Sequence[str], pixels: Sequence[int]
) -> tuple[list[str | None], np.ndarray, np.ndarray]:
    """`rle_problems`, and the `run_lengths` of the well-spelled masks, from taking the strings apart once."""
    problems = [_problem_of_spelling(text) for text in rle_masks]
    well_spelled = [position for position, problem in enumerate(problems) if problem is None]
    if not well_spelled:
        return problems, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    runs, mask_starts = run_lengths([rle_masks[position] for position in well_spelled])
    totals = np.add.reduceat(runs, mask_starts)
    shortest, longest = np.minimum.reduceat(runs, mask_starts), np.maximum.reduceat(runs, mask_starts)
    per_mask = zip(well_spelled, totals.tolist(), shortest.tolist(), longest.tolist(), strict=True)
    for position, total, least, most in per_mask:
        if least < 0:
            problems[position] = f"a run of {least} pixels"
        elif most > pixels[position]:  # asked before the total, which many long runs could overflow
            problems[position] = f"a run of {most} pixels"
        elif total != pixels[position]:
            problems[position] = f"runs that sum to {total} pixels"
    return problems, runs, mask_starts


def _problem_of_spelling(text: str) -> str | None:
    if not text:
        return "an empty string"
    if not _CHARACTERS.fullmatch(text):
        return "a character that no RLE string has"
    if (ord(text[-1]) - _FIRST_CHARACTER) & _CONTINUES:
        return "a string that is cut off within a number"
    return None


def run_lengths(rle_masks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Run lengths of well-spelled masks (see `rle_problems`), at least one, in one array.

    Returns:
        runs: int64, all masks one behind the other; the first run of a mask is empty pixels, the second filled ones,
            and so on, in column-major order.
        mask_starts: int64 `[masks]`, where each mask's runs begin.
    """
    codes = np.frombuffer("".join(rle_masks).encode("ascii"), dtype=np.uint8) - np.uint8(_FIRST_CHARACTER)
    last_character = np.flatnonzero(codes < _CONTINUES)
    first_character = np.concatenate(([0], last_character[:-1] + 1))
    lengths = last_character - first_character + 1

    numbers = (codes[first_character] & _VALUE).astype(np.int64)
    for place in range(1, min(int(lengths.max()), _MAX_CHARACTERS_PER_RUN)):
        longer = np.flatnonzero(lengths > place)
        digits = (codes[first_character[longer] + place] & _VALUE).astype(np.int64)
        numbers[longer] += digits << (_BITS * place)
    negative = np.flatnonzero(codes[last_character] & _NEGATIVE)
    numbers[negative] -= np.int64(1) << (_BITS * np.minimum(lengths[negative], _MAX_CHARACTERS_PER_RUN))
    numbers[lengths > _MAX_CHARACTERS_PER_RUN] = -1  # no such run: reported as a negative one

    text_starts = np.cumsum([0, *(len(text) for text in rle_masks[:-1])])
    mask_starts = np.searchsorted(first_character, text_starts)
    runs_of_mask = np.diff(mask_starts, append=numbers.size)

    # Runs 0, 1 and 2 stand as they are, run i > 2 adds to run i - 2: within a mask the runs of odd place are running
    # sums, and so are those of even place from 2 on.
    is_odd = ((np.arange(numbers.size) - np.repeat(mask_starts, runs_of_mask)) & 1).astype(bool)
    first_runs = numbers[mask_starts]
    numbers[mask_starts] = 0  # so that a running sum at a mask's start is the sum before it
    runs = np.empty_like(numbers)
    for chain in (is_odd, ~is_odd):
        running = np.cumsum(np.where(chain, numbers, 0))
        runs[chain] = (running - np.repeat(running[mask_starts], runs_of_mask))[chain]
    runs[mask_starts] = first_runs
    return runs, mask_starts
