"""Which visual tokens a region covers: from its run-length encoded mask to the token grid, by exact area.

A mask of COCO's RLE is a list of vertical runs, and the area of a run within a token's cell is known from where it
begins and ends. So coverage is summed over run ends, and no mask is ever decoded: this is faster than decoding alone.

Letters: R regions of an image, E run ends of a region.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from patch_aligned.cells import TokenGrid

# Run lengths of COCO's compressed RLE strings, without decoding any mask.
#
# A compressed string spells the run lengths of a mask in column-major order, five bits a character, and from the fourth
# run on as the difference to the run before the last. A whole batch of strings is taken apart with a few array
# operations, which makes checking millions of masks a matter of a minute or two. Format: `maskApi.c` of pycocotools.

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


_COVERAGE_SLACK = 1e-9
"""Coverage is summed in floating point: a cell that is covered by exactly half may come out 1e-14 below it."""


class PatchMaskError(ValueError):
    """A region's mask that does not fit its image; the message names record, region, found and expected."""


def covered_tokens_of_regions(
    rle_masks: Sequence[str],
    size_wh: Sequence[int],
    grid: TokenGrid,
    min_coverage: float = 0.5,
    record: str = "record",
) -> np.ndarray:
    """Tokens whose cells the regions of one image cover for at least `min_coverage` of the cell's area.

    Args:
        rle_masks: COCO compressed RLE strings, one a region.
        size_wh: width and height that the annotation states, pixels.
        grid: the cells.
        min_coverage: share of the cell's area, inclusive with a slack of 1e-9 for rounding, above 0.
        record: names the annotation in errors.

    Returns:
        bool `[R, rows * cols]`, row-major over the cells. A row may be all False: such a region covers no token.

    Raises:
        PatchMaskError: see `token_coverage_of_regions`.
        ValueError: if `min_coverage` is not in (0, 1].
    """
    if not 0 < min_coverage <= 1:
        raise ValueError(f"min_coverage: found {min_coverage}, expected a share of a cell's area in (0, 1]")
    coverage = token_coverage_of_regions(rle_masks, size_wh, grid, record)
    # [R, rows, cols] -> [R, rows * cols]
    return (coverage >= min_coverage - _COVERAGE_SLACK).reshape(len(rle_masks), grid.rows * grid.cols)


def token_coverage_of_regions(
    rle_masks: Sequence[str], size_wh: Sequence[int], grid: TokenGrid, record: str = "record"
) -> np.ndarray:
    """Share of each token's cell that each region of an image covers: float64 `[R, rows, cols]`, 0..1.

    Parts of a cell beyond the image count as not covered.

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
    """Start, end, start, end ... of the filled runs of all masks `[E]`, and where each mask's edges begin `[R + 1]`.

    An edge counts the pixels of its own mask that lie before it, in column-major order.
    """
    runs_of_mask = np.diff(mask_starts, append=runs.size)  # [R]
    filled_of_mask = runs_of_mask // 2  # the first run of a mask is empty, the second filled, and so on
    place = np.arange(runs.size) - np.repeat(mask_starts, runs_of_mask)
    filled = np.flatnonzero(place & 1)
    ends = np.cumsum(runs)[filled] - pixels * np.repeat(np.arange(len(mask_starts)), filled_of_mask)
    edges = np.stack((ends - runs[filled], ends), axis=1).ravel()
    return edges, 2 * np.concatenate(([0], np.cumsum(filled_of_mask)))


def _shares_between(
    edges: np.ndarray, first_edge: np.ndarray, rows_before: np.ndarray, cols_before: np.ndarray
) -> np.ndarray:
    """Share of each cell's area between the starts and ends of each region's runs: `[R, rows, cols]`.

    Before pixel y of column x lie the columns to its left, in full height, and the pixels above it in its own column.
    What lies before a run's start is taken from what lies before its end.
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


@lru_cache(maxsize=64)  # grids are cached by the size of their image; an entry of 448 x 336 pixels takes 0.15 MB
def _share_tables(grid: TokenGrid) -> tuple[np.ndarray, np.ndarray]:
    """Share of each row's height and of each column's width before each pixel: `[height + 1, rows]`, `[.., cols]`."""
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
    """Checks that an annotation is of the image.

    Raises:
        PatchMaskError: if the stated width and height are not the image's.
    """
    stated, actual = tuple(size_wh), image_wh
    if stated != actual:
        hint = "width and height are swapped" if stated == actual[::-1] else "the mask belongs to another file or copy"
        raise PatchMaskError(
            f"{record}, size: found {list(stated)}, expected {list(actual)} as the image file has it ({hint}); "
            "annotate this image anew, or point to the images that were annotated"
        )


def _raise_first(problems: Sequence[str | None], image_wh: tuple[int, int], record: str) -> None:
    width, height = image_wh
    for region, problem in enumerate(problems):
        if problem is not None:
            raise PatchMaskError(
                f"{record}, region {region}, rle_mask: found {problem}, expected runs that sum to {width} x {height} = "
                f"{width * height} pixels; encode the mask anew with pycocotools.mask.encode, at the image's size"
            )
