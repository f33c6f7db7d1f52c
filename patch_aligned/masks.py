"""Compute which visual tokens a region covers, from its COCO RLE mask, by exact area.

A COCO RLE mask is a list of vertical runs. The start and end of a run determine its area within each token's cell, so
coverage is a sum over run ends. Masks are never decoded: this is faster than decoding alone.

Letters: R regions of an image, E run ends of R regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from patch_aligned.cells import Layout, TokenGrid

_REGIONS_AT_ONCE = 32
"""Masks that are read together: enough to spread numpy's overhead, few enough to stay in the processor's cache."""

# Parsing of COCO's compressed RLE. A string encodes run lengths in column-major order, five bits per character; from
# the fourth run on each is stored as the difference to the run two before it. A batch of strings is parsed with a few
# array operations, so checking millions of masks takes a minute or two. Format: `maskApi.c` of pycocotools.

_FIRST_CHARACTER = ord("0")
_CHARACTERS = bytes(range(_FIRST_CHARACTER, _FIRST_CHARACTER + 64))
_CONTINUES = 0x20
_NEGATIVE = 0x10
_VALUE = 0x1F
_BITS = 5
_MAX_CHARACTERS_PER_RUN = 8  # 40 bits, far more than the pixels of any image


def rle_problems(rle_masks: Sequence[str], pixels: Sequence[int]) -> list[str | None]:
    """Validate COCO compressed RLE strings: characters, completeness, run lengths and their total, the mask's pixels.

    Returns one entry per mask: None if it is valid, else a phrase to put after "found" in a message.
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
    if not text.isascii() or text.encode().translate(None, _CHARACTERS):
        return "a character that no RLE string has"
    if (ord(text[-1]) - _FIRST_CHARACTER) & _CONTINUES:
        return "a string that is cut off within a number"
    return None


def run_lengths(rle_masks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Parse one or more parseable masks (see `rle_problems`) into run lengths, and the index of each mask's first run.

    Runs are concatenated over masks. A mask's first run is empty pixels, the second filled ones, and so on, in
    column-major order.
    """
    codes = np.frombuffer("".join(rle_masks).encode("ascii"), dtype=np.uint8) - np.uint8(_FIRST_CHARACTER)
    last_character = np.flatnonzero(codes < _CONTINUES)
    lengths = np.diff(last_character, prepend=-1)
    # A number begins with its lowest bits. Its last character has the highest, in two's complement.
    runs = (codes[last_character] ^ _NEGATIVE).astype(np.int64) - _NEGATIVE
    longer = np.flatnonzero(lengths > 1)
    for back in range(1, min(int(lengths.max()), _MAX_CHARACTERS_PER_RUN)):
        runs[longer] = (runs[longer] << _BITS) + (codes[last_character[longer] - back] & _VALUE)
        longer = longer[lengths[longer] > back + 1]
    runs[lengths > _MAX_CHARACTERS_PER_RUN] = -1  # impossible length, reported as a negative run

    mask_ends = np.searchsorted(last_character, np.cumsum([len(text) for text in rle_masks]))
    mask_starts = np.append(0, mask_ends[:-1])
    # Runs 0, 1 and 2 are stored as they are; run i > 2 is added to run i - 2. So within a mask the odd runs are a
    # cumulative sum, and so are the even runs from 2 on.
    first_runs = runs[mask_starts]
    runs[mask_starts] = 0
    for chain in (0, 1):
        sums = np.cumsum(runs[chain::2])
        chain_ends = (mask_ends + 1 - chain) // 2
        before = np.append(0, sums)[np.append(0, chain_ends[:-1])]  # [masks]
        runs[chain::2] = sums - np.repeat(before, np.diff(chain_ends, prepend=0))
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
    """Return the tokens that each region of an image covers, of one grid.

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
    return covered_tokens_of_grids(rle_masks, size_wh, [grid], min_coverage, record)[0]


def covered_tokens_of_grids(
    rle_masks: Sequence[str], size_wh: Sequence[int], grids: Sequence[TokenGrid], min_coverage: float, record: str
) -> list[np.ndarray]:
    """Return the same for each of an image's grids. Each mask is parsed once."""
    if not 0 < min_coverage <= 1:
        raise ValueError(f"min_coverage: found {min_coverage}, expected a share of a cell's area in (0, 1]")
    covered = [np.zeros((len(rle_masks), grid.rows * grid.cols), dtype=bool) for grid in grids]
    for regions, coverages in _coverage_in_parts(rle_masks, size_wh, grids, record):
        for of_grid, coverage in zip(covered, coverages, strict=True):
            of_grid[regions] = (coverage >= min_coverage - _COVERAGE_SLACK).reshape(len(coverage), -1)
    return covered


def covered_tokens_of_layout(
    rle_masks: Sequence[str], size_wh: Sequence[int], layout: Layout, min_coverage: float = 0.5, record: str = "record"
) -> np.ndarray:
    """Return the tokens that each region of an image covers, of all grids: bool `[R, layout.length]`.

    Each mask is parsed once. For arguments and errors see `covered_tokens_of_regions`. Columns are in the order of the
    visual tokens; those of one grid are `covered[:, grid.tokens.ravel()]`.
    """
    covered = np.zeros((len(rle_masks), layout.length), dtype=bool)
    of_grids = covered_tokens_of_grids(rle_masks, size_wh, layout.grids, min_coverage, record)
    for grid, of_grid in zip(layout.grids, of_grids, strict=True):
        covered[:, grid.tokens.ravel()] = of_grid
    return covered


def rle_of_mask(mask: np.ndarray) -> str:
    """Encode a mask `[height, width]`, not zero inside, as a COCO compressed RLE string."""
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8))["counts"].decode()


def areas_px(encoded: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the areas `[R]` of pycocotools' RLEs, one by one: with numpy 2, its own call takes at most 255."""
    from pycocotools import mask as coco_mask

    return np.array([coco_mask.area(one) for one in encoded], dtype=np.int64)


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
    return covered_tokens_of_layout([rle_of_mask(mask)], np.shape(mask)[::-1], layout, min_coverage, "mask")[0]


def token_coverage_of_regions(
    rle_masks: Sequence[str], size_wh: Sequence[int], grid: TokenGrid, record: str = "record"
) -> np.ndarray:
    """Return the fraction of each cell's area that each region covers: float64 `[R, rows, cols]`, 0..1.

    The part of a cell beyond the image counts as not covered.

    Raises:
        PatchMaskError: if the stated size is not the image's (for instance swapped), or a mask is malformed or does not
            sum to the image's pixels.
    """
    covered = np.zeros((len(rle_masks), *grid.shape))
    for regions, [coverage] in _coverage_in_parts(rle_masks, size_wh, [grid], record):
        covered[regions] = coverage
    return covered


def _coverage_in_parts(
    rle_masks: Sequence[str], size_wh: Sequence[int], grids: Sequence[TokenGrid], record: str
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yield some regions at a time, and the coverage of each grid's cells by them: `[regions, rows, cols]`."""
    image_wh = grids[0].image_wh
    require_size(size_wh, image_wh, record)
    for first in range(0, len(rle_masks), _REGIONS_AT_ONCE):
        part = rle_masks[first : first + _REGIONS_AT_ONCE]
        problems, runs, mask_starts = checked_run_lengths(part, [image_wh[0] * image_wh[1]] * len(part))
        _raise_first(problems, image_wh, record, first)
        edges = _run_edges(runs, mask_starts, image_wh)
        yield slice(first, first + len(part)), [_shares_of_cells(*edges, len(part), grid) for grid in grids]


def _run_edges(
    runs: np.ndarray, mask_starts: np.ndarray, image_wh: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return where filled runs start and end, each `[E]`: region, pixel column x, pixels y above it, and -1 or 1.

    A run that continues in the next column ends at the foot of its own, and starts again where no area is above it.
    """
    width, height = image_wh
    mask_ends = np.append(mask_starts[1:], runs.size)
    ends_empty = (mask_ends - mask_starts) % 2 == 1  # the first run of a mask is empty, the second filled, and so on
    edges = np.delete(np.cumsum(runs), mask_ends[ends_empty] - 1)  # start, end, start, end ... of all masks in a row
    column = edges // height  # of all masks side by side
    start, end = column[::2], column[1::2]
    left = np.repeat(end - np.cumsum(end - start), end - start) + np.arange((end - start).sum())  # start .. end - 1
    y = np.append(edges - column * height, np.full(left.size, height))
    column, sign = np.append(column, left), np.ones(y.size)
    sign[: edges.size : 2] = -1
    region = column // width  # R at the foot of the last mask
    return region, column - region * width, y, sign


def _shares_of_cells(
    region: np.ndarray, x: np.ndarray, y: np.ndarray, sign: np.ndarray, regions: int, grid: TokenGrid
) -> np.ndarray:
    """Return the fraction of each cell's area inside each region: `[R, rows, cols]`. For the edges see `_run_edges`.

    Above an edge lie a part of its own cell and all cells before it. So an edge adds its part to its own row and the
    rest to the row before. Sums over rows from the last one on then complete all rows before.
    """
    row_of_y, part_above_y, row_shares, cols_of_x, shares_of_x = _cell_tables(grid)
    step, part = (regions + 1) * grid.cols, part_above_y[y]
    place = row_of_y[y] * step + region * grid.cols  # [E] in the table, where row 0 is above the grid
    sums = np.zeros((grid.rows + 1) * step)
    for piece, (col_of_x, share_of_x) in enumerate(zip(cols_of_x, shares_of_x, strict=True)):
        if piece:  # few pixels lie in a second column of cells
            more = np.flatnonzero(share_of_x[x])
            x, place, part, sign = x[more], place[more], part[more], sign[more]
        share, cell = share_of_x[x] * sign, place + col_of_x[x]
        np.add.at(sums, cell, share - share * part)
        np.add.at(sums, cell + step, share * part)
    table = sums.reshape(grid.rows + 1, regions + 1, grid.cols)
    for row in range(grid.rows - 1, 0, -1):
        table[row] += table[row + 1]
    # [rows + 1, R + 1, cols] -> [R, rows, cols]
    return (table[1:, :regions] * row_shares[:, None, None]).transpose(1, 0, 2)


@lru_cache(maxsize=64)  # grids are cached by image size; an entry for 448 x 336 pixels takes 15 KB
def _cell_tables(grid: TokenGrid) -> tuple[np.ndarray, ...]:
    """Return the row that each y is in and the part of it above y `[height + 1]`, of what is in the image; the share of
    each row in the image `[rows]`; the columns that pixel x is in and its share of each `[most, width]`."""
    width, height = grid.image_wh
    edges, y = np.clip(grid.y_edges, 0, height), np.arange(height + 1)
    row_of_y = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, grid.rows - 1)
    sizes = np.diff(edges)
    part_above_y = np.clip((y - edges[row_of_y]) / np.where(sizes > 0, sizes, 1)[row_of_y], 0, 1)

    edges, x = np.append(grid.x_edges, np.inf), np.arange(width)  # one column more, of which no pixel has a share
    first = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, grid.cols - 1)
    most = max(1, int((np.searchsorted(edges, x + 1) - first).max()))
    cols_of_x = np.minimum(first + np.arange(most)[:, None], grid.cols)
    left, right = edges[cols_of_x], edges[cols_of_x + 1]
    shares_of_x = np.clip(np.minimum(x + 1, right) - np.maximum(x, left), 0, None) / (right - left)
    return row_of_y, part_above_y, sizes / np.diff(grid.y_edges), cols_of_x, shares_of_x


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


def _raise_first(problems: Sequence[str | None], image_wh: tuple[int, int], record: str, first: int) -> None:
    width, height = image_wh
    for region, problem in enumerate(problems, start=first):
        if problem is not None:
            raise PatchMaskError(
                f"{record}, region {region}, rle_mask: found {problem}, expected runs that sum to {width} x {height} = "
                f"{width * height} pixels; encode the mask again with pycocotools.mask.encode, at the image's size"
            )
