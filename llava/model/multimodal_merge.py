"""Merge text and visual tokens into one padded batch of embeddings. Pure functions, independent of any model.

Letters: B rows, T length of the input ids, L length of the merged batch, D width of the LLM, N images, S visual tokens
of one tile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class MergedBatch:
    """Input batch of the LLM."""

    inputs_embeds: Tensor  # [B, L, D]
    attention_mask: Tensor  # [B, L] bool, true at tokens
    position_ids: Tensor  # [B, L], counted from 0 in each row; 0 at padding
    labels: Tensor  # [B, L]; IGNORE_INDEX at visual tokens and padding
    image_of_row: list[list[int]]  # indices of each row's images; dummy images belong to no row
    truncated_rows: list[int]  # rows in which `max_length` truncated visual tokens
    turns: Tensor | None = None
    """`[B, L]`, the number of the question that each position belongs to; 0 before all questions and at padding. None
    if questions see each other."""


def assign_images(images_per_row: list[int], image_count: int) -> list[list[int]]:
    """Assign images to rows, in order.

    The images must match the `<image>` ids one to one, or include a dummy image for each row without one, as in
    upstream's batches. Dummy images are not assigned.
    """
    wanted = sum(images_per_row)
    rows_without = images_per_row.count(0)
    if image_count not in (wanted, wanted + rows_without):
        raise ValueError(
            f"The batch has {wanted} <image> tokens but {image_count} images came with it (images per row by the text: "
            f"{images_per_row}). Pass one image for each <image>."
        )
    with_dummies = image_count != wanted
    image_of_row, next_image = [], 0
    for count in images_per_row:
        image_of_row.append(list(range(next_image, next_image + count)))
        next_image += max(count, 1) if with_dummies else count
    return image_of_row


def merge(
    input_ids: Tensor,
    image_tokens: list[Tensor],
    embed_words: Callable[[Tensor], Tensor],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    turns: Tensor | None = None,
    padding_side: str = "right",
    max_length: int | None = None,
) -> MergedBatch:
    """Replace each `<image>` id by the image's visual tokens, and truncate rows to their first `max_length` positions.

    Args:
        input_ids: `[B, T]` with IMAGE_TOKEN_INDEX for each image.
        image_tokens: visual tokens of each image, `[*, D]`.
        embed_words: ids `[n]` -> `[n, D]`; called once.
        attention_mask: `[B, T]`, true (or 1) at tokens. Padding may be on either side.
        labels: `[B, T]`, or None if nothing is supervised.
        turns: `[B, T]`, the number of the question that each id belongs to, 0 before all questions; or None.
        padding_side: of the merged batch.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"Found ids of shape {list(input_ids.shape)}, expected [B, T]; one prompt is ids[None].")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    is_image = mask & (input_ids == IMAGE_TOKEN_INDEX)  # [B, T]
    image_of_row = assign_images(is_image.sum(dim=1).tolist(), len(image_tokens))
    # One call for the batch: under ZeRO-3 each call gathers the table on all ranks.
    words = embed_words(input_ids[mask & ~is_image])
    # With a model spread over several GPUs, projector and word embeddings may be on different devices.
    images = [image_tokens[i].to(words) for row in image_of_row for i in row]

    widths = mask.long()  # [B, T], positions that each id takes
    widths[is_image] = widths.new_tensor([len(image) for image in images])
    lengths = widths.sum(dim=1)  # [B]
    # All rows' positions, one after another: P of them, each with its id, its row and its place there.
    source = torch.arange(input_ids.numel(), device=widths.device).repeat_interleave(widths.flatten())  # [P]
    row = source // input_ids.shape[1]
    position = torch.arange(len(source), device=row.device) - (lengths.cumsum(dim=0) - lengths)[row]
    is_visual = is_image.flatten()[source]
    limit = sys.maxsize if max_length is None else max_length

    lengths = lengths.clamp(max=limit)
    length = int(lengths.max())
    column = position + (length - lengths)[row] if padding_side == "left" else position
    place = partial(placed, row=row, column=column, shape=(len(input_ids), length))
    words_first = is_visual.long().argsort(stable=True)  # [P]
    return MergedBatch(
        inputs_embeds=place(torch.cat([words, *images]), row=row[words_first], column=column[words_first]),
        attention_mask=place(torch.ones_like(is_visual)),
        position_ids=place(position),
        labels=place(labels.flatten()[source].masked_fill(is_visual, IGNORE_INDEX), padding=IGNORE_INDEX),
        image_of_row=image_of_row,
        truncated_rows=row[is_visual & (position >= limit)].unique().tolist(),
        turns=None if turns is None else place(turns.flatten()[source]),
    )


def placed(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int], padding: int = 0) -> Tensor:
    """Put each of `values` `[P, ...]` into its place in a tensor `[*shape, ...]` of padding; drop what lies beyond."""
    width = max(shape[1], int(column.max()) + 1)
    padded = values.new_full((shape[0], width, *values.shape[1:]), padding)
    return padded.index_put((row.to(values.device), column.to(values.device)), values)[:, : shape[1]]


def pack(merged: MergedBatch, capacity: int) -> MergedBatch:
    """Put the samples of a batch one after another into rows of at most `capacity` positions, in place of padding.

    Positions restart with each sample, and tell the model to keep them apart. `image_of_row` stays that of the samples.
    """
    lengths = merged.attention_mask.sum(dim=1).tolist()
    filled: list[int] = []  # positions of each row
    row_of, start_of = [0] * len(lengths), [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # first fit, longest first
        row = next((row for row, taken in enumerate(filled) if taken + lengths[sample] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        row_of[sample], start_of[sample] = row, filled[row]
        filled[row] += lengths[sample]

    sample_of, _ = merged.attention_mask.nonzero(as_tuple=True)  # [P]
    position_ids = merged.position_ids[merged.attention_mask]
    rows = sample_of.new_tensor(row_of)[sample_of]
    columns = sample_of.new_tensor(start_of)[sample_of] + position_ids

    def packed(padded: Tensor, padding: int = 0) -> Tensor:
        return placed(padded[merged.attention_mask], rows, columns, (len(filled), max(filled)), padding)

    positions = packed(merged.position_ids)
    return replace(
        merged,
        inputs_embeds=packed(merged.inputs_embeds),
        attention_mask=packed(merged.attention_mask),
        position_ids=positions,
        labels=packed(merged.labels, IGNORE_INDEX).masked_fill(positions == 0, IGNORE_INDEX),  # nothing predicts them
        turns=None if merged.turns is None else packed(merged.turns),
    )


def attention_of_turns(merged: MergedBatch) -> tuple[Tensor, Tensor]:
    """Return mask and positions with which each question about an image sees the image and itself alone.

    The mask, `[B, 1, L, L]` in the embeddings' dtype, is added to attention scores. Positions, `[B, L]`, are those that
    the question would have if it was the only one.
    """
    assert merged.turns is not None
    samples = (merged.position_ids == 0).cumsum(dim=1)  # [B, L]; padding sees itself alone
    of_query, of_key = merged.turns[:, :, None], merged.turns[:, None, :]
    is_own = samples[:, :, None] == samples[:, None, :]  # [B, L, L]
    is_seen = (is_own & ((of_key == 0) | (of_key == of_query))).tril()
    mask = torch.zeros_like(is_seen, dtype=merged.inputs_embeds.dtype)
    mask.masked_fill_(~is_seen, torch.finfo(mask.dtype).min)
    return mask[:, None], is_seen.sum(dim=-1) - 1


def mask_of_padding(input_ids: Tensor, padding: int) -> Tensor:
    """`[B, T]`, true but at a run of the padding id at either end of a row."""
    is_text = (input_ids != padding).long()
    return (is_text.cumsum(1) > 0) & (is_text.flip(1).cumsum(1).flip(1) > 0)


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Crop the letterbox from a feature map `[D, rows, cols]` of an image of `original_size` (width, height)."""
    width, height = original_size
    rows, cols = tensor.shape[1:]
    if width / height > cols / rows:
        cut = (rows - int(height * (cols / width))) // 2
        return tensor[:, cut : rows - cut, :]
    cut = (cols - int(width * (rows / height))) // 2
    return tensor[:, :, cut : cols - cut]


def arrange_tiles(
    tiles: Tensor,
    merge_type: str,
    *,
    tile_grid: Callable[[], tuple[int, int]],
    original_size: tuple[int, int] | None,
    newline: Tensor | None,
) -> Tensor:
    """Arrange one image's tiles `[t, S, D]`, the full image first, in the order in which the LLM reads them, `[*, D]`.

    `merge_type` is `flat` (tile after tile), `spatial` (the tiles as one large grid, row by row) or `spatial_unpad`
    (the same without the letterbox of the image of `original_size`, width and height, and with the learned `newline`
    `[D]` after each row of the grid). `tile_grid` returns columns and rows of tiles, if there is more than one.
    """
    if merge_type == "flat":
        return tiles.flatten(0, 1)
    if merge_type not in ("spatial", "spatial_unpad"):
        raise ValueError(f"Unexpected mm_patch_merge_type: {merge_type}. Known: flat, spatial, spatial_unpad.")
    base, rest = tiles[0], tiles[1:]  # [S, D], [t - 1, S, D]
    if not len(rest):
        return torch.cat([base, newline[None]]) if merge_type == "spatial_unpad" and newline is not None else base
    side = int(base.shape[0] ** 0.5)
    columns, rows = tile_grid()
    grid = rest.view(rows, columns, side, side, -1)  # [rows, columns, side, side, D]
    grid = grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # [D, rows * side, columns * side]
    if merge_type == "spatial_unpad" and original_size is not None and newline is not None:
        grid = unpad_image(grid, original_size)
        grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)  # one more column
    return torch.cat([base, grid.flatten(1).T])
