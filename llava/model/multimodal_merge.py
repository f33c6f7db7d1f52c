"""Text and visual tokens become one padded batch of embeddings. Pure functions; nothing here knows a model.

Letters: B rows, T length of the ids as they come in, L length of the merged batch, D width of the LLM, N images,
S visual tokens of one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class TruncatedImageError(ValueError):
    """`max_length` cuts visual tokens off; `rows` are the rows of the batch where that happens."""

    def __init__(self, rows: list[int], max_length: int, sample_ids: list[str] | None = None):
        self.rows = rows
        named = [sample_ids[row] if sample_ids else f"row {row} of the batch" for row in rows]
        super().__init__(
            f"model_max_length {max_length} cuts visual tokens off in {', '.join(named)}. "
            "Raise --model_max_length, or shorten the text before the image."
        )


@dataclass(frozen=True)
class MergedBatch:
    """What the LLM reads.

    Attributes:
        inputs_embeds: `[B, L, D]`.
        attention_mask: `[B, L]` bool, true where there is a token.
        position_ids: `[B, L]`, counted from 0 in each row; 0 at padding.
        labels: `[B, L]`; IGNORE_INDEX at visual tokens and padding.
        image_of_row: for each row, the indices of its images. Dummy images appear in no row.
        truncated_rows: rows in which `max_length` cut visual tokens off.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    image_of_row: list[list[int]]
    truncated_rows: list[int]


def assign_images(images_per_row: list[int], image_count: int) -> list[list[int]]:
    """Which images belong to which row, in order.

    Args:
        images_per_row: number of `<image>` ids in each row.
        image_count: number of images that came with the batch.

    Two ways of counting are understood: one image for each `<image>` id, and upstream's, where each row without one
    comes with a dummy image, which is left out here.

    Raises:
        ValueError: neither way fits.
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
    padding_side: str = "right",
    max_length: int | None = None,
) -> MergedBatch:
    """Puts each image's visual tokens in the place of its `<image>` id.

    Args:
        input_ids: `[B, T]` with IMAGE_TOKEN_INDEX for each image.
        image_tokens: for each image its visual tokens `[*, D]`.
        embed_words: ids `[n]` -> `[n, D]`; called once.
        attention_mask: `[B, T]`, true (or 1) at tokens; the side of the padding is free.
        labels: `[B, T]`, or None where nothing is supervised.
        padding_side: where the merged batch is padded.
        max_length: rows are cut to this length, keeping their beginning.

    Raises:
        ValueError: the numbers of `<image>` ids and of images differ.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if labels is None:
        labels = torch.full_like(input_ids, IGNORE_INDEX)
    rows = [(ids[keep], row_labels[keep]) for ids, row_labels, keep in zip(input_ids, labels, mask, strict=True)]
    is_image = [ids == IMAGE_TOKEN_INDEX for ids, _ in rows]
    image_of_row = assign_images([int(marks.sum()) for marks in is_image], len(image_tokens))

    texts = [ids[~marks] for (ids, _), marks in zip(rows, is_image, strict=True)]
    # One call for the whole batch: under ZeRO-3 each call gathers the table on all ranks.
    text_embeds = embed_words(torch.cat(texts)).split([len(text) for text in texts])

    merged_embeds, merged_labels, truncated_rows = [], [], []
    for row, ((_, row_labels), marks) in enumerate(zip(rows, is_image, strict=True)):
        # Spread over several GPUs, the projector may sit on another than the word embeddings.
        images = [image_tokens[i].to(text_embeds[row]) for i in image_of_row[row]]
        embeds, row_labels, images_end = merge_row(text_embeds[row], row_labels, marks, images)
        if max_length is not None:
            if images_end > max_length:
                truncated_rows.append(row)
            embeds, row_labels = embeds[:max_length], row_labels[:max_length]
        merged_embeds.append(embeds)
        merged_labels.append(row_labels)

    length = max(len(embeds) for embeds in merged_embeds)
    offsets = [length - len(embeds) if padding_side == "left" else 0 for embeds in merged_embeds]
    return MergedBatch(
        inputs_embeds=pad_rows(merged_embeds, length, offsets, 0.0),
        attention_mask=pad_rows([torch.ones_like(row, dtype=torch.bool) for row in merged_labels], length, offsets, 0),
        position_ids=pad_rows([torch.arange(len(row), device=row.device) for row in merged_labels], length, offsets, 0),
        labels=pad_rows(merged_labels, length, offsets, IGNORE_INDEX),
        image_of_row=image_of_row,
        truncated_rows=truncated_rows,
    )


def merge_row(
    text_embeds: Tensor, labels: Tensor, is_image: Tensor, images: list[Tensor]
) -> tuple[Tensor, Tensor, int]:
    """One row without padding: embeddings `[n, D]`, labels `[n]` and where its last image ends (0 without images).

    Args:
        text_embeds: `[t, D]`, embeddings of the row's text ids.
        labels: `[t + i]`, labels of all ids of the row, images included.
        is_image: `[t + i]`, true at `<image>` ids.
        images: visual tokens of the row's i images.
    """
    places = is_image.nonzero().flatten().tolist()
    embeds: list[Tensor] = []
    row_labels: list[Tensor] = []
    text_start = label_start = images_end = 0
    for image, place in zip(images, places, strict=True):
        words = place - label_start
        embeds += [text_embeds[text_start : text_start + words], image]
        row_labels += [labels[label_start:place], labels.new_full((len(image),), IGNORE_INDEX)]
        text_start, label_start, images_end = text_start + words, place + 1, images_end + words + len(image)
    embeds.append(text_embeds[text_start:])
    row_labels.append(labels[label_start:])
    return torch.cat(embeds), torch.cat(row_labels), images_end


def pad_rows(rows: list[Tensor], length: int, offsets: list[int], value: float) -> Tensor:
    """Rows `[n_i, ...]` laid at their offsets into one tensor `[B, length, ...]` filled with `value`."""
    padded = []
    for row, offset in zip(rows, offsets, strict=True):
        margins = (0, 0) * (row.dim() - 1) + (offset, length - offset - len(row))
        padded.append(F.pad(row, margins, value=value))  # [length, ...]
    return torch.stack(padded)  # [B, length, ...]


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cuts the letterbox off a feature map.

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
    """One image's visual tokens in the order in which the LLM reads them, `[*, D]`.

    Args:
        tiles: `[t, S, D]`; the base tile (the whole image) first.
        merge_type: `flat` (tile after tile), `spatial` (the tiles as one large grid, row by row) or `spatial_unpad`
            (the same without the letterbox, each row of the grid closed by `newline`).
        tile_grid: columns and rows of tiles; asked only where there is more than one tile.
        original_size: width and height of the original image, for `spatial_unpad`.
        newline: `[D]`, the learned closing vector of `spatial_unpad`.

    Raises:
        ValueError: the merge type is not known.
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
        grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)  # a column more
    return torch.cat([base, grid.flatten(1).T])
