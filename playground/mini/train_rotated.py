"""Train stage 1 towards rotated words: the control that tells the words of an LLM from any other targets.

    python -m playground.mini.train_rotated --patch_rotation_seed 1 [flags of patch_aligned.train_mem]

One random rotation turns all label embeddings and leaves their mean where it is. So the targets have the same norms,
the same cosines with each other and the same cosine to the mean as the words have, and are no words of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava.plugin import AlignmentContext, AuxiliaryOutput
from llava.train.train import train
from patch_aligned.labels import LabelTokenizer, label_embeddings, pad_label_ids
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.plugin import PatchAlignedPlugin


@dataclass
class RotatedWordsArguments(PatchArguments):
    """Flags of the patch loss, and the rotation's."""

    patch_rotation_seed: int = field(default=0, metadata={"help": "Seed of the rotation of all label embeddings."})


class RotatedWordsPlugin(PatchAlignedPlugin):
    """Adds the patch loss towards label embeddings that are rotated about their mean."""

    arguments_class = RotatedWordsArguments

    rotated: RotatedWords

    def setup(self, arguments: RotatedWordsArguments, tokenizer: Any, **paths: Any) -> None:  # type: ignore[override]
        """Open the PAD file and collect its labels."""
        super().setup(arguments, tokenizer, **paths)
        self.rotated = RotatedWords(self.index.tag_counts(), LabelTokenizer(tokenizer), arguments.patch_rotation_seed)

    def auxiliary_losses(self, context: AlignmentContext, batch: Mapping[str, Tensor]) -> AuxiliaryOutput:
        """Return `patch`, as towards an LLM whose word table is rotated."""
        return super().auxiliary_losses(replace(context, embed_words=self.rotated(context.embed_words)), batch)


class RotatedWords:
    """Rotates an LLM's word table about the mean of `tags`, each once. A label's mean commutes with the rotation."""

    def __init__(self, tags: Iterable[str], labels: LabelTokenizer, seed: int):
        self.label_ids = [labels(tag) for tag in sorted(tags)]
        self.seed = seed
        self.rotation: Tensor | None = None

    def __call__(self, embed_words: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the rotated table, as a function of ids `[...]` -> `[..., D]`."""
        if self.rotation is None:
            # In the first step on every rank alike, since the table may be sharded.
            mean = label_embeddings(*pad_label_ids(self.label_ids), embed_words).mean(dim=0)  # [L, D] -> [D]
            self.rotation = rotation_about(mean, self.seed)
        rotation = self.rotation

        def embed_rotated(ids: Tensor) -> Tensor:
            words = embed_words(ids)  # [..., D]
            words = words.to(torch.promote_types(words.dtype, torch.float32))
            return words @ rotation.T.to(words)

        return embed_rotated


def rotation_about(axis: Tensor, seed: int) -> Tensor:
    """Return a random rotation `[D, D]` in float64, uniform among those that leave `axis` `[D]` where it is."""
    axis = axis.detach().double().cpu()
    size = len(axis) - 1
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turn, triangle = torch.linalg.qr(gaussian)
    turn = turn * triangle.diagonal().sign()  # without it the distribution depends on the algorithm of QR
    turn[:, 0] *= torch.linalg.det(turn).sign()  # a rotation, no reflection
    first, others = torch.linalg.qr(axis[:, None], mode="complete").Q.split([1, size], dim=1)  # [D, 1], [D, D - 1]
    return first @ first.T + others @ turn @ others.T


if __name__ == "__main__":
    train(attn_implementation="flash_attention_2", plugin=RotatedWordsPlugin())
