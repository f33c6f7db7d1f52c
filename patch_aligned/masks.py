"""Compute which visual tokens a region covers, from its COCO RLE mask, by exact area.

A COCO RLE mask is a list of vertical runs. The start and end of a run determine its area within each token's cell, so
coverage is a sum over run ends. Masks are never decoded: this is faster than decoding alone.

Letters: R regions of an image, E run ends of a region.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from patch_aligned.cells import Layout, TokenGrid

# Parsing of COCO's compressed RLE. A string encodes run lengths in column-major order, five bits per character; from
# the fourth run on each is stored as the difference to the run two before it. A batch of strings is parsed with a few
# array operations, so checking millions of masks takes a minute or two. Format: `maskApi.c` of pycocotools.

_CHARACTERS = re.compile("[0-o]+")  # 64 codes starting at "0"
_FIRST_CHARACTER = ord("0")
_CONTINUES = 0x20
_NEGATIVE = 0x10
_VALUE = 0x1F
_BITS = 5
_MAX_CHARACTERS_PER_RUN = 8  # 40 bits, far more than the pixels of any image


def rle_problems(rle_masks: Sequence[str], pixels: Sequence[int]) -> list[str | None]:
    """Validate masks: characters, completeness, run lengths and their total.

    Args:
        rle_masks: COCO compressed RLE strings.
        pixels: width x height of each mask, which its runs must sum to.

    Returns:
        One entry per mask: None if it is valid, else a phrase to put after "found" in a message.
    """
    return checked_run_lengths(rle_masks, pixels)[0]


def checked_run_lengths(
    rle_masks: Sequence[str], pixels: Sequence[int]
) -> tuple[list[str | None], np.ndarray, np.ndarray]:
    """Return `rle_problems`, and `run_lengths` of the parseable masks. Strings are parsed once."""
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
        elif most > pixels[position]:  # checked before the total, which many long runs could overflow
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
    """Parse one or more parseable masks (see `rle_problems`) into one array of run lengths.

    Returns:
        runs: int64, concatenated over masks. The first run of a mask is empty pixels, the second filled ones, and so
            on, in column-major order.
        mask_starts: int64 `[masks]`, index of each mask's first run.
    """
    codes = np.frombuffer("".join(rle_masks).encode("ascii"), dtype=np.uint8) - np.uint8(_FIRST_CHARACTER)
    last_character = np.flatnonzero(codes < _CONTINUES)
    first_character = np.concatenate(([0], last_character[:-1] + 1))
    lengths = last_character - first_character + 1

    numbers = (codes[first_character] & _VALUE).astype(np.int64)
    for index in range(1, min(int(lengths.max()), _MAX_CHARACTERS_PER_RUN)):
        longer = np.flatnonzero(lengths > index)
        digits = (codes[first_character[longer] + index] & _VALUE).astype(np.int64)
        numbers[longer] += digits << (_BITS * index)
    negative = np.flatnonzero(codes[last_character] & _NEGATIVE)
    numbers[negative] -= np.int64(1) << (_BITS * np.minimum(lengths[negative], _MAX_CHARACTERS_PER_RUN))
    numbers[lengths > _MAX_CHARACTERS_PER_RUN] = -1  # impossible length, reported as a negative run

    text_starts = np.cumsum([0, *(len(text) for text in rle_masks[:-1])])
    mask_starts = np.searchsorted(first_character, text_starts)
    runs_of_mask = np.diff(mask_starts, append=numbers.size)

    # Runs 0, 1 and 2 are stored as they are; run i > 2 is added to run i - 2. So within a mask the odd runs are a
    # cumulative sum, and so are the even runs from 2 on.
    is_odd = ((np.arange(numbers.size) - np.repeat(mask_starts, runs_of_mask)) & 1).astype(bool)
    first_runs = numbers[mask_starts]
    numbers[mask_starts] = 0  # so that the cumulative sum at a mask's start is the sum before it
    runs = np.empty_like(numbers)
    for chain in (is_odd, ~is_odd):
        running = np.cumsum(np.where(chain, numbers, 0))
        runs[chain] = (running - np.repeat(running[mask_starts], runs_of_mask))[chain]
    runs[mask_starts] = first_runs
    return runs, mask_starts


_COVERAGE_SLACK = 1e-9
"""Tolerance for rounding: a cell that is covered by exactly half may come out 1e-14 below it."""


class PatchMaskError(ValueError):
    """Raised for a mask that does not fit its image. The message names record, region, found and expected."""


def covered_tokens_of_regions(
    rle_masks: Sequence[str],
    size_wh: Sequence[int],
    grid: TokenGrid,
    min_coverage: float = 0.5,
    record: str = "record",
) -> np.ndarray:
    """Return the tokens that each region of an image covers.

    Args:
        rle_masks: COCO compressed RLE strings, one per region.
        size_wh: width and height stated by the annotation, pixels.
        grid: the token grid of the image.
        min_coverage: fraction of a cell's area, in (0, 1], that a region must cover. Inclusive, with a tolerance of
            1e-9 for rounding.
        record: name of the annotation in error messages.

    Returns:
        bool `[R, rows * cols]`, row-major over the cells. A row is all False if the region covers no token.

    Raises:
        PatchMaskError: see `token_coverage_of_regions`.
        ValueError: if `min_coverage` is not in (0, 1].
    """
    if not 0 < min_coverage <= 1:
        raise ValueError(f"min_coverage: found {min_coverage}, expected a share of a cell's area in (0, 1]")
    coverage = token_coverage_of_regions(rle_masks, size_wh, grid, record)
    # [R, rows, cols] -> [R, rows * cols]
    return (coverage >= min_coverage - _COVERAGE_SLACK).reshape(len(rle_masks), grid.rows * grid.cols)


def rle_of_mask(mask: np.ndarray) -> str:
    """Encode a mask `[height, width]`, not zero inside, as a COCO compressed RLE string."""
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8))["counts"].decode()


def tokens_of_mask(mask: np.ndarray, layout: Layout, min_coverage: float = 0.5) -> np.ndarray:
    """Return which visual tokens of an image a mask covers, in any of its grids.

    Args:
        mask: `[height, width]`, not zero inside; of the image's size.
        layout: the layout of the image.
        min_coverage: see `covered_tokens_of_regions`.

    Returns:
        bool `[layout.length]`, in the order of the visual tokens.

    Raises:
        PatchMaskError: the mask has another size than the image.
    """
    rle_mask = rle_of_mask(mask)
    covered = np.zeros(layout.length, dtype=bool)
    for grid in layout.grids:
        [cells] = covered_tokens_of_regions([rle_mask], np.shape(mask)[::-1], grid, min_coverage, "mask")
        covered[grid.tokens.ravel()[cells]] = True
    return covered


def token_coverage_of_regions(
    rle_masks: Sequence[str], size_wh: Sequence[int], grid: TokenGrid, record: str = "record"
) -> np.ndarray:
    """Return the fraction of each cell's area that each region covers: float64 `[R, rows, cols]`, 0..1.

    The part of a cell beyond the image counts as not covered.

    Raises:
        PatchMaskError: if the stated size is not the image's (for instance swapped), or a mask is malformed or does not
            sum to the image's pixels.
    """
    require_size(size_wh, grid.image_wh, record)
    if not rle_masks:
        return np.zeros((0, grid.rows, grid.cols))
    width, height = grid.image_wh
    pixels = width * height
    problems, runs, mask_starts = checked_run_lengths(rle_masks, [pixels] * len(rle_masks))
    _raise_first(problems, grid.image_wh, record)
    edges, first_edge = _run_edges(runs, mask_starts, pixels)
    return _shares_between(edges, first_edge, *_share_tables(grid))


def _run_edges(runs: np.ndarray, mask_starts: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return start, end, start, end ... of the filled runs `[E]`, and the offset of each mask's edges `[R + 1]`.

    An edge is the number of pixels before it in its own mask, in column-major order.
    """
    runs_of_mask = np.diff(mask_starts, append=runs.size)  # [R]
    filled_of_mask = runs_of_mask // 2  # the first run of a mask is empty, the second filled, and so on
    run_index = np.arange(runs.size) - np.repeat(mask_starts, runs_of_mask)
    filled = np.flatnonzero(run_index & 1)
    ends = np.cumsum(runs)[filled] - pixels * np.repeat(np.arange(len(mask_starts)), filled_of_mask)
    edges = np.stack((ends - runs[filled], ends), axis=1).ravel()
    return edges, 2 * np.concatenate(([0], np.cumsum(filled_of_mask)))


def _shares_between(
    edges: np.ndarray, first_edge: np.ndarray, rows_before: np.ndarray, cols_before: np.ndarray
) -> np.ndarray:
    """Return the fraction of each cell's area inside each region's runs: `[R, rows, cols]`.

    The area before pixel y of column x consists of all columns to its left and the pixels above it in its own column.
    The area of a run is the area before its end minus the area before its start.
    """
    regions, height, width = len(first_edge) - 1, len(rows_before) - 1, len(cols_before) - 1
    x, y = np.divmod(edges, height)
    sign = np.tile((-1.0, 1.0), edges.size // 2)

    region_of_edge = np.repeat(np.arange(regions), np.diff(first_edge))
    edges_in_column = np.bincount(region_of_edge * (width + 1) + x, weights=sign, minlength=regions * (width + 1))
    full_columns = edges_in_column.reshape(regions, width + 1) @ cols_before  # [R, cols]
    shares = rows_before[-1][:, None] * full_columns[:, None, :]  # [R, rows, cols]

    rows_at = rows_before.take(y, axis=0)  # [E, rows]
    rows_at *= sign[:, None]
    cols_at = cols_before.take(np.minimum(x + 1, width), axis=0)  # [E, cols]
    cols_at -= cols_before.take(x, axis=0)
    for region in range(regions):
        of_region = slice(first_edge[region], first_edge[region + 1])
        shares[region] += rows_at[of_region].T @ cols_at[of_region]  # [rows, E] @ [E, cols]
    return shares


@lru_cache(maxsize=64)  # grids are cached by image size; an entry for 448 x 336 pixels takes 0.15 MB
def _share_tables(grid: TokenGrid) -> tuple[np.ndarray, np.ndarray]:
    """Return the fraction of each row and column before each pixel: `[height + 1, rows]`, `[width + 1, cols]`."""
    width, height = grid.image_wh
    tables = []
    for edges, length in ((grid.y_edges, height), (grid.x_edges, width)):
        starts, ends = np.array(edges[:-1]), np.array(edges[1:])  # [cells]
        starts_in_image = np.maximum(starts, 0)
        pixels = np.arange(length + 1, dtype=np.float64)[:, None]  # [length + 1, 1]
        before = np.clip(pixels, starts_in_image, np.maximum(ends, 0)) - starts_in_image
        tables.append(before / (ends - starts))
    return tables[0], tables[1]


def require_size(size_wh: Sequence[int], image_wh: tuple[int, int], record: str) -> None:
    """Raise `PatchMaskError` if the annotation's width and height are not the image's."""
    stated, actual = tuple(size_wh), image_wh
    if stated != actual:
        swapped = "width and height are swapped, or are those before the image's EXIF rotation"
        hint = swapped if stated == actual[::-1] else "the mask belongs to another file or copy"
        raise PatchMaskError(
            f"{record}, size: found {list(stated)}, expected {list(actual)} as the image file has it ({hint}); "
            "annotate this image again, or point to the images that were annotated"
        )


def _raise_first(problems: Sequence[str | None], image_wh: tuple[int, int], record: str) -> None:
    width, height = image_wh
    for region, problem in enumerate(problems):
        if problem is not None:
            raise PatchMaskError(
                f"{record}, region {region}, rle_mask: found {problem}, expected runs that sum to {width} x {height} = "
                f"{width * height} pixels; encode the mask again with pycocotools.mask.encode, at the image's size"
            )
