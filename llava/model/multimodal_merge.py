"""Merge text and visual tokens into one padded batch of embeddings. Pure functions, independent of any model.

Letters: B rows, T length of the input ids, L length of the merged batch, D width of the LLM, N images, S visual tokens
of one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class TruncatedImageError(ValueError):
    """Raised if `max_length` truncates visual tokens. `rows` are the affected rows of the batch."""

    def __init__(self, rows: list[int], max_length: int, sample_ids: list[str] | None = None):
        self.rows = rows
        named = [sample_ids[row] if sample_ids else f"row {row} of the batch" for row in rows]
        super().__init__(
            f"model_max_length {max_length} cuts visual tokens off in {', '.join(named)}. "
            "Raise --model_max_length, or shorten the text before the image."
        )


@dataclass(frozen=True)
class MergedBatch:
    """Input batch of the LLM.

    Attributes:
        inputs_embeds: `[B, L, D]`.
        attention_mask: `[B, L]` bool, true at tokens.
        position_ids: `[B, L]`, counted from 0 in each row; 0 at padding.
        labels: `[B, L]`; IGNORE_INDEX at visual tokens and padding.
        image_of_row: indices of each row's images. Dummy images belong to no row.
        truncated_rows: rows in which `max_length` truncated visual tokens.
        turns: `[B, L]`, the number of the question that each position belongs to; 0 before all questions and at
            padding. None if questions see each other.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    image_of_row: list[list[int]]
    truncated_rows: list[int]
    turns: Tensor | None = None


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
    """Replace each `<image>` id by the image's visual tokens.

    Args:
        input_ids: `[B, T]` with IMAGE_TOKEN_INDEX for each image.
        image_tokens: visual tokens of each image, `[*, D]`.
        embed_words: ids `[n]` -> `[n, D]`; called once.
        attention_mask: `[B, T]`, true (or 1) at tokens. Padding may be on either side.
        labels: `[B, T]`, or None if nothing is supervised.
        turns: `[B, T]`, the number of the question that each id belongs to, 0 before all questions; or None.
        padding_side: padding side of the merged batch.
        max_length: truncate rows to their first `max_length` positions.

    Raises:
        ValueError: the numbers of `<image>` ids and of images differ.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"Found ids of shape {list(input_ids.shape)}, expected [B, T]; one prompt is ids[None].")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if labels is None:
        labels = torch.full_like(input_ids, IGNORE_INDEX)
    rows = [(ids[keep], row_labels[keep]) for ids, row_labels, keep in zip(input_ids, labels, mask, strict=True)]
    is_image = [ids == IMAGE_TOKEN_INDEX for ids, _ in rows]
    image_of_row = assign_images([int(marks.sum()) for marks in is_image], len(image_tokens))

    texts = [ids[~marks] for (ids, _), marks in zip(rows, is_image, strict=True)]
    # One call for the batch: under ZeRO-3 each call gathers the table on all ranks.
    text_embeds = embed_words(torch.cat(texts)).split([len(text) for text in texts])

    merged_embeds, merged_labels, merged_turns, truncated_rows = [], [], [], []
    for row, ((_, row_labels), marks) in enumerate(zip(rows, is_image, strict=True)):
        # With a model spread over several GPUs, projector and word embeddings may be on different devices.
        images = [image_tokens[i].to(text_embeds[row]) for i in image_of_row[row]]
        embeds, row_labels, images_end = merge_row(text_embeds[row], row_labels, marks, images)
        if max_length is not None:
            if images_end > max_length:
                truncated_rows.append(row)
            embeds, row_labels = embeds[:max_length], row_labels[:max_length]
        merged_embeds.append(embeds)
        merged_labels.append(row_labels)
        if turns is not None:
            repeats = torch.ones_like(marks, dtype=torch.long)  # [t + i]
            repeats[marks] = repeats.new_tensor([len(image) for image in images])
            merged_turns.append(turns[row][mask[row]].repeat_interleave(repeats)[: len(embeds)])  # [n]

    length = max(len(embeds) for embeds in merged_embeds)
    offsets = [length - len(embeds) if padding_side == "left" else 0 for embeds in merged_embeds]
    return MergedBatch(
        inputs_embeds=pad_rows(merged_embeds, length, offsets, 0.0),
        attention_mask=pad_rows([torch.ones_like(row, dtype=torch.bool) for row in merged_labels], length, offsets, 0),
        position_ids=pad_rows([torch.arange(len(row), device=row.device) for row in merged_labels], length, offsets, 0),
        labels=pad_rows(merged_labels, length, offsets, IGNORE_INDEX),
        image_of_row=image_of_row,
        truncated_rows=truncated_rows,
        turns=None if turns is None else pad_rows(merged_turns, length, offsets, 0),
    )


def pack(merged: MergedBatch, capacity: int) -> MergedBatch:
    """Put the samples of a batch one after another into rows of at most `capacity` positions, in place of padding.

    Positions restart with each sample, and tell the model to keep them apart. `image_of_row` stays that of the samples.
    """
    lengths = merged.attention_mask.sum(dim=1).tolist()
    samples_of_row: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # first fit, longest first
        free = (row for row in samples_of_row if sum(lengths[i] for i in row) + lengths[sample] <= capacity)
        if (row := next(free, None)) is None:
            samples_of_row.append(row := [])
        row.append(sample)
    length = max(sum(lengths[sample] for sample in row) for row in samples_of_row)

    def packed(padded: Tensor, value: float) -> Tensor:
        rows = [torch.cat([padded[i][merged.attention_mask[i]] for i in row]) for row in samples_of_row]
        return pad_rows(rows, length, [0] * len(rows), value)

    position_ids = packed(merged.position_ids, 0)
    labels = packed(merged.labels, IGNORE_INDEX)
    return replace(
        merged,
        inputs_embeds=packed(merged.inputs_embeds, 0.0),
        attention_mask=packed(merged.attention_mask, 0),
        position_ids=position_ids,
        labels=labels.masked_fill(position_ids == 0, IGNORE_INDEX),  # the sample before does not predict it
        turns=None if merged.turns is None else packed(merged.turns, 0),
    )


def attention_of_turns(merged: MergedBatch) -> tuple[Tensor, Tensor]:
    """Return mask and positions with which each question about an image sees the image and itself alone.

    Returns:
        The mask, `[B, 1, L, L]` in the embeddings' dtype, to be added to attention scores, and `[B, L]` positions:
        those that the question would have if it was the only one.
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


def merge_row(
    text_embeds: Tensor, labels: Tensor, is_image: Tensor, images: list[Tensor]
) -> tuple[Tensor, Tensor, int]:
    """Merge one row without padding. Returns embeddings `[n, D]`, labels `[n]` and the end of its last image, or 0.

    Args:
        text_embeds: `[t, D]`, embeddings of the row's text ids.
        labels: `[t + i]`, labels of all ids of the row, images included.
        is_image: `[t + i]`, true at `<image>` ids.
        images: visual tokens of the row's i images.
    """
    positions = is_image.nonzero().flatten().tolist()
    embeds: list[Tensor] = []
    row_labels: list[Tensor] = []
    text_start = label_start = images_end = 0
    for image, position in zip(images, positions, strict=True):
        words = position - label_start
        embeds += [text_embeds[text_start : text_start + words], image]
        row_labels += [labels[label_start:position], labels.new_full((len(image),), IGNORE_INDEX)]
        text_start, label_start, images_end = text_start + words, position + 1, images_end + words + len(image)
    embeds.append(text_embeds[text_start:])
    row_labels.append(labels[label_start:])
    return torch.cat(embeds), torch.cat(row_labels), images_end


def pad_rows(rows: list[Tensor], length: int, offsets: list[int], value: float) -> Tensor:
    """Pad rows `[n_i, ...]` to `[B, length, ...]` with `value`, each row starting at its offset."""
    padded = []
    for row, offset in zip(rows, offsets, strict=True):
        margins = (0, 0) * (row.dim() - 1) + (offset, length - offset - len(row))
        padded.append(F.pad(row, margins, value=value))  # [length, ...]
    return torch.stack(padded)  # [B, length, ...]


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Crop the letterbox from a feature map.

    Args:
        tensor: `[D, rows, cols]`, features of the letterboxed image.
        original_size: width and height of the original image.
    """
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
    """Arrange one image's visual tokens in the order in which the LLM reads them, `[*, D]`.

    Args:
        tiles: `[t, S, D]`; the base tile (the full image) first.
        merge_type: `flat` (tile after tile), `spatial` (the tiles as one large grid, row by row) or `spatial_unpad`
            (the same without the letterbox, and with `newline` after each row of the grid).
        tile_grid: returns columns and rows of tiles; called only if there is more than one tile.
        original_size: width and height of the original image, for `spatial_unpad`.
        newline: `[D]`, the learned row separator of `spatial_unpad`.
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
