"""Collate samples into a batch, and check that sequences have room for their images.

Letters: B rows, T positions of the longest row, N images of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.tokenization import pad_rows

if TYPE_CHECKING:
    from llava.plugin import TrainingPlugin

SMALLEST_TEXT_BUDGET = 16
"""Minimum number of text tokens in a sequence beside its images: with fewer, not even the template fits."""


@dataclass
class DataCollatorForSupervisedDataset:
    """Collates samples of `LazySupervisedDataset`, truncated to `tokenizer.model_max_length` and padded on the right.

    The batch has `input_ids`, `labels` and `attention_mask`, `[B, T]`, and `sample_ids`. With images it also has
    `images`, `[N, 3, H, W]` (anyres: `[N, tiles, 3, H, W]`) or a list if shapes differ, in the order of their
    `<image>`, and `image_sizes`; with independent turns `turns`, `[B, T]`, all 0 in rows without them; with a plugin
    `plugin_batch`. A batch of samples without text, which the plugin's losses train, has `auxiliary_only`.

    Unlike upstream's, the mask follows from the rows' lengths: real tokens equal to the padding token are not masked.

    Samples that could not be read (see `on_error`) are skipped; `skipped` is their number. If none is left, the batch
    is one padding token without label, so that all ranks stay in step.
    """

    tokenizer: Any
    plugin: TrainingPlugin | None = None

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate samples. Raises `ValueError` if truncation removes an `<image>`, or there is no padding token."""
        readable = [sample for sample in instances if "skipped" not in sample]
        samples = readable or [self._placeholder(instances[0])]
        names = [str(sample.get("sample_id", f"row {row}")) for row, sample in enumerate(samples)]
        cut = self.tokenizer.model_max_length
        ids = [sample["input_ids"][:cut].tolist() for sample in samples]
        lengths = torch.tensor([len(row) for row in ids])
        input_ids = pad_rows(ids, self._padding_id())  # [B, T]
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": pad_rows([sample["labels"][:cut].tolist() for sample in samples], IGNORE_INDEX),  # [B, T]
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],  # [B, T]
            "sample_ids": names,
        }
        if any("turns" in sample for sample in samples):
            of_rows = [sample.get("turns", torch.zeros(len(row))) for sample, row in zip(samples, ids, strict=True)]
            batch["turns"] = pad_rows([turns[:cut].long().tolist() for turns in of_rows], 0)  # [B, T]
        kinds = {"auxiliary_only" in sample for sample in instances}
        if len(kinds) > 1:
            raise ValueError(f"samples {', '.join(names)}: some have text and some none, expected batches of one kind")
        if kinds == {True}:
            batch["auxiliary_only"] = True
        if len(readable) < len(instances):
            batch["skipped"] = len(instances) - len(readable)
        images = [_as_list(sample.get("image")) for sample in samples]
        for name, row, own in zip(names, ids, images, strict=True):
            found = row.count(IMAGE_TOKEN_INDEX)
            if found != len(own):
                raise ValueError(
                    f"sample {name}: found {found} {DEFAULT_IMAGE_TOKEN} among its first {cut} tokens, "
                    f"expected {len(own)}, one per image; raise --model_max_length, or shorten the text before "
                    f"{DEFAULT_IMAGE_TOKEN}"
                )
        if any(images):
            batch["images"] = _stacked([image for own in images for image in own])
            batch["image_sizes"] = [size for sample in samples for size in _as_list(sample.get("image_size"))]
        if self.plugin is not None:
            batch["plugin_batch"] = self.plugin.collate([sample.get("plugin_extras", {}) for sample in samples])
        return batch

    def _padding_id(self) -> int:
        if self.tokenizer.pad_token_id is None:
            raise ValueError("tokenizer.pad_token_id is None, expected an id; set tokenizer.pad_token first")
        return self.tokenizer.pad_token_id

    def _placeholder(self, skipped: dict[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor([self._padding_id()]),
            "labels": torch.tensor([IGNORE_INDEX]),
            "sample_id": skipped["sample_id"],
        }


def check_sequence_budget(model_max_length: int, visual_tokens: int) -> None:
    """Check before training that sequences have room for an image of `visual_tokens` tokens and some text."""
    needed = visual_tokens + SMALLEST_TEXT_BUDGET
    if model_max_length < needed:
        raise ValueError(
            f"--model_max_length: found {model_max_length}, expected at least {needed}, since an image takes "
            f"{visual_tokens} tokens and text needs some; LLaVA trains with 2048"
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    if all(image.shape == images[0].shape for image in images):
        return torch.stack(images)  # [N, 3, H, W] or [N, tiles, 3, H, W]
    return images
