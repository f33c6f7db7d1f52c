"""Prefix sharing: compute the common prefix of a batch's prompts once.

Questions about one image share the template's system text and hundreds of visual tokens, and differ in a line of text.
So each distinct prefix, up to its last image, runs once, and the rest of each row continues from a copy of its cache.

Letters: B rows, U distinct prefixes, P length of the longest prefix, R length of the longest rest, D width.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.multimodal_merge import MergedBatch, merge


def generate_sharing(
    model: Any,
    prompts: list[list[int]],
    images: list[Tensor],
    image_sizes: list[tuple[int, int]],
    images_of_row: list[list[int]],
    **options: Any,
) -> Tensor:
    """Generate as `model.generate` does, with each common prefix computed once. Returns the new tokens, `[B, new]`.

    Args:
        model: a LLaVA of this package.
        prompts: ids of each row, IMAGE_TOKEN_INDEX where an image belongs.
        images: pixels of the distinct images, `[3, H, W]` or `[t, 3, H, W]`.
        image_sizes: width and height of each of them before processing.
        images_of_row: indices of each row's images, in order; rows may share images.
        **options: of `generate`.
    """
    lengths = beginnings(prompts, images_of_row)
    keys = [
        (tuple(prompt[:length]), tuple(shown))
        for prompt, length, shown in zip(prompts, lengths, images_of_row, strict=True)
    ]
    distinct = list(dict.fromkeys(keys))
    tokens = encode(model, images, image_sizes)
    if len(distinct) == len(prompts) or 0 in lengths or not can_share(model, options):
        whole = merged(model, prompts, [tokens[i] for shown in images_of_row for i in shown])
        return generate(
            model,
            inputs_embeds=whole.inputs_embeds,  # [B, L, D]
            attention_mask=whole.attention_mask.long(),
            position_ids=whole.position_ids,
            **options,
        )

    begun = merged(model, [list(ids) for ids, _ in distinct], [tokens[i] for _, shown in distinct for i in shown])
    cache = model(
        inputs_embeds=begun.inputs_embeds,  # [U, P, D]
        attention_mask=begun.attention_mask.long(),
        position_ids=begun.position_ids,
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    device = begun.attention_mask.device
    of_row = torch.tensor([distinct.index(key) for key in keys], device=device)  # [B]
    cache.batch_select_indices(of_row)  # [B, heads, P, width of a head] in each layer

    rest = merged(model, [prompt[length:] for prompt, length in zip(prompts, lengths, strict=True)], [])
    attention_mask = torch.cat([begun.attention_mask[of_row], rest.attention_mask], dim=1).long()  # [B, P + R]
    # `generate` wants embeddings of whole prompts, and leaves out as many as the cache holds.
    left_out = begun.inputs_embeds[:1].expand(len(prompts), -1, -1)
    return generate(
        model,
        inputs_embeds=torch.cat([left_out, rest.inputs_embeds], dim=1),  # [B, P + R, D]
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        **options,
    )


def generate(model: Any, **options: Any) -> Any:
    """transformers' `generate`: the model's own takes ids and images, which are embeddings here already."""
    return GenerationMixin.generate(model, **options)


def beginnings(prompts: list[list[int]], images_of_row: list[list[int]]) -> list[int]:
    """Return the length of each prompt's shared prefix: up to its last image, or what all prompts without images share.

    0 for a prompt that ends there: a token must remain whose logits choose the first new one.
    """
    texts = [prompt for prompt, shown in zip(prompts, images_of_row, strict=True) if not shown]
    alike = (len(set(column)) == 1 for column in zip(*texts, strict=False))
    common = sum(itertools.takewhile(bool, alike))
    lengths = []
    for prompt, shown in zip(prompts, images_of_row, strict=True):
        length = len(prompt) - prompt[::-1].index(IMAGE_TOKEN_INDEX) if shown else min(common, len(prompt) - 1)
        lengths.append(length if length < len(prompt) else 0)
    return lengths


def can_share(model: Any, options: dict[str, Any]) -> bool:
    """Whether a cache may be copied to rows, with padding between the prefix and the rest.

    Not in beam search, where `generate` copies all but the cache; not with sliding windows, which count the padding;
    and not with flash attention, which is not tested with it.
    """
    attention = getattr(model.config, "_attn_implementation", "sdpa")
    has_window = getattr(model.config, "sliding_window", None) is not None
    return options.get("num_beams", 1) == 1 and not has_window and attention in ("sdpa", "eager")


def encode(model: Any, images: list[Tensor], image_sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Visual tokens of each image, `[*, D]`; images whose number of tiles differs come as a list."""
    if not images:
        return []
    alike = all(image.shape == images[0].shape for image in images)
    return model.encode_image_batch(torch.stack(images) if alike else images, image_sizes).tokens


def merged(model: Any, prompts: list[list[int]], image_tokens: list[Tensor]) -> MergedBatch:
    """Return prompts with their images' visual tokens, in order, as a batch of embeddings padded on the left."""
    words = model.get_input_embeddings()
    rows = [torch.tensor(prompt, device=words.weight.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True)  # [B, T]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return merge(ids, image_tokens, words, attention_mask=mask, padding_side="left")
