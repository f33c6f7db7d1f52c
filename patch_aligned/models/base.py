"""What an analysis needs of a model: features before the projector, visual tokens after it, and word embeddings.

The layers of the LLM are not needed: of the LLM only the table of word embeddings is read, so a 7B model costs its
tower and its table. Models that share an encoder share its features, which are computed once an image.

Letters: B images, S patches of the tower, d width of the tower, T visual tokens of an image (T = S unless the projector
resamples), D width of the LLM, M vocabulary, R labels, K tokens of a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from patch_aligned.cells import Layout
from patch_aligned.labels import LabelTokenizer


class WordEmbeddings:
    """The LLM's input-embedding table with its tokenizer.

    Args:
        tokenizer: the LLM's tokenizer.
        table: `[M, D]`, kept in the dtype it is stored in.
        source: folder or hub name, for messages.
        placeholder: id of the token that visual tokens replace before the LLM reads it; None where there is none.

    Raises:
        ValueError: the tokenizer knows tokens that have no row.
    """

    def __init__(self, tokenizer: Any, table: Tensor, source: str, placeholder: int | None = None):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= len(table):
            raise ValueError(
                f"{source}: its tokenizer knows ids up to {largest}, but its table of word embeddings has "
                f"{len(table)} rows: they do not belong together. Take both from one folder: copy the tokenizer that "
                "these weights were trained with beside them."
            )
        self.tokenizer, self.table, self.source, self.placeholder = tokenizer, table, source, placeholder
        self.token_ids = LabelTokenizer(tokenizer)

    @property
    def width(self) -> int:
        """D, the width of the LLM."""
        return self.table.shape[1]

    def of_labels(self, labels: Sequence[str]) -> Tensor:
        """Label embeddings `[R, D]`, float32: the mean over each label's tokens of their rows (equation 2).

        Raises:
            ValueError: a label has no token.
        """
        if not labels:
            return torch.zeros(0, self.width)
        ids = [torch.tensor(self.token_ids(label)) for label in labels]  # [K] each
        return torch.stack([self.table[of_label].float().mean(dim=0) for of_label in ids])  # [K, D] -> [R, D]

    def directions_of_labels(self, labels: Sequence[str]) -> Tensor:
        """`of_labels`, scaled to length 1: all that a cosine needs of them."""
        return F.normalize(self.of_labels(labels), dim=-1)


class Encoder(Protocol):
    """A model up to its projector: images -> features, and where their patches lie."""

    name: str
    device: str

    @property
    def image_aspect_ratio(self) -> str:
        """How images are made square, for the report: `square` (crop), `pad` or `squeeze`."""

    @property
    def width(self) -> int:
        """d, the width of the features."""

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images as the tower takes them: `[B, 3, side, side]`."""

    def features(self, inputs: Tensor) -> Tensor:
        """Features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""

    def layout(self, image_wh: tuple[int, int], shape: tuple[int, int]) -> Layout:
        """The layout of an image of this size under `shape` (rows, cols) of visual tokens."""


@dataclass(frozen=True, eq=False)
class VisionLanguageModel:
    """A projector under a name, between the encoder that feeds it and the words that its tokens are compared with.

    Attributes:
        name: as it appears in tables.
        source: where the projector's weights come from, in words.
        encoder: images -> features.
        projector: features `[B, S, d]` -> visual tokens `[B, T, D]`.
        words: the base LLM's, or for a full checkpoint its own, since fine-tuning moves the table.
        build: makes an untrained projector of the same shape, from torch's global random stream.
        projector_modules: names of the projector's modules in the whole model.
        pictured: whether its maps belong into a picture.
    """

    name: str
    source: str
    encoder: Encoder
    projector: nn.Module
    words: WordEmbeddings
    build: Callable[[], nn.Module]
    projector_modules: tuple[str, ...]
    pictured: bool = True

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images as the tower takes them."""
        return self.encoder.inputs(images)

    def features(self, inputs: Tensor) -> Tensor:
        """Features before the projector, `[B, S, d]`."""
        return self.encoder.features(inputs)

    @torch.no_grad()
    def visual_tokens(self, features: Tensor) -> Tensor:
        """Features `[B, S, d]` -> visual tokens `[B, T, D]`, in the order of the layout."""
        return self.projector(features)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image.

        Raises:
            ValueError: their number is no square.
        """
        # Asked of the projector itself: a resampling one, such as the C-Abstractor, sets the number of tokens.
        blank = self.encoder.inputs([Image.new("RGB", (64, 64))])
        tokens = self.visual_tokens(self.encoder.features(blank)).shape[1]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"Projector {self.name!r} gives {tokens} tokens, which fill no square grid.")
        return side, side

    def layouts(self, sizes_wh: Sequence[tuple[int, int]]) -> list[Layout]:
        """Where the visual tokens of images of these sizes (width, height in pixels) lie."""
        return [self.encoder.layout(size_wh, self.shape) for size_wh in sizes_wh]

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Rows of the LLM's table of word embeddings: `[...]` -> `[..., D]`, float32."""
        return self.words.table[ids].float()

    def untrained(self, seed: int) -> VisionLanguageModel:
        """A model with a random projector of the same shape; the global random stream is left alone."""
        device = next(self.projector.parameters(), self.words.table).device
        projector = seeded(self.build, seed).to(device, torch.float32).eval()
        name, source = f"{self.name}, untrained, seed {seed}", f"random weights, seed {seed}"
        return replace(self, name=name, source=source, projector=projector, pictured=False)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `build` makes when torch's random stream starts at `seed`; the stream itself is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
