"""Interface between models and the analysis: encoder features, visual tokens and word embeddings.

Only the word-embedding table of the LLM is read, so a 7B model needs memory for its tower and table only; name scores
alone load its layers. Models that share an encoder share its features, which are computed once per image.

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
from patch_aligned.models.language import LanguageModel


class WordEmbeddings:
    """Input-embedding table of an LLM, with its tokenizer.

    Args:
        tokenizer: the LLM's tokenizer.
        table: `[M, D]`, in the dtype it is stored in.
        source: folder or hub name, for messages.
        placeholder: id of the token that visual tokens replace before the LLM reads it, if there is one.

    Raises:
        ValueError: the tokenizer has tokens without a row in the table.
    """

    def __init__(self, tokenizer: Any, table: Tensor, source: str, placeholder: int | None = None):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= len(table):
            raise ValueError(
                f"{source}: its tokenizer has ids up to {largest}, but its table of word embeddings has {len(table)} "
                "rows: they do not belong together. Copy the tokenizer that these weights were trained with into "
                "their folder."
            )
        self.tokenizer, self.table, self.source, self.placeholder = tokenizer, table, source, placeholder
        self.token_ids = LabelTokenizer(tokenizer)

    @property
    def width(self) -> int:
        """D, the width of the LLM."""
        return self.table.shape[1]

    def of_labels(self, labels: Sequence[str]) -> Tensor:
        """Return label embeddings `[R, D]`, float32: the mean of the rows of each label's tokens (equation 2).

        Raises:
            ValueError: a label has no token.
        """
        if not labels:
            return torch.zeros(0, self.width)
        ids = [torch.tensor(self.token_ids(label)) for label in labels]  # [K] each
        return torch.stack([self.table[of_label].float().mean(dim=0) for of_label in ids])  # [K, D] -> [R, D]

    def directions_of_labels(self, labels: Sequence[str]) -> Tensor:
        """Return `of_labels`, normalised to length 1."""
        return F.normalize(self.of_labels(labels), dim=-1)


class Encoder(Protocol):
    """A model up to its projector: turns images into features, and locates their patches."""

    name: str
    device: str

    @property
    def image_aspect_ratio(self) -> str:
        """How images are made square, as shown in the report: `square` (crop), `pad` or `squeeze`."""

    @property
    def width(self) -> int:
        """d, the width of the features."""

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess RGB images for the tower: `[B, 3, side, side]`."""

    def features(self, inputs: Tensor) -> Tensor:
        """Compute features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""

    def layout(self, image_wh: tuple[int, int], shape: tuple[int, int]) -> Layout:
        """Return the layout of `shape` (rows, cols) visual tokens over an image of this size."""


class LanguageSource(Protocol):
    """Where an LLM is loaded from; equal sources load the same LLM."""

    def load(self) -> LanguageModel:
        """Load the LLM with its prompts."""


@dataclass(frozen=True, eq=False)
class VisionLanguageModel:
    """A named projector, with its encoder and the word embeddings that its tokens are compared with.

    Attributes:
        name: name in tables.
        source: origin of the projector's weights, in words.
        encoder: images -> features.
        projector: features `[B, S, d]` -> visual tokens `[B, T, D]`.
        words: word embeddings of the base LLM; of a full checkpoint its own, since fine-tuning changes the table.
        build: builds an untrained projector of the same shape, using torch's global random state.
        projector_modules: names of the projector's modules in the full model.
        pictured: whether pictures show its maps.
        language: the whole LLM, which only name scores need; None where its family's is not supported.
    """

    name: str
    source: str
    encoder: Encoder
    projector: nn.Module
    words: WordEmbeddings
    build: Callable[[], nn.Module]
    projector_modules: tuple[str, ...]
    pictured: bool = True
    language: LanguageSource | None = None

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess RGB images for the tower."""
        return self.encoder.inputs(images)

    def features(self, inputs: Tensor) -> Tensor:
        """Compute features before the projector, `[B, S, d]`."""
        return self.encoder.features(inputs)

    @torch.no_grad()
    def visual_tokens(self, features: Tensor) -> Tensor:
        """Project features `[B, S, d]` to visual tokens `[B, T, D]`, in the order of the layout."""
        return self.projector(features)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image.

        Raises:
            ValueError: their number is not a square.
        """
        # Run the projector: a resampling one, such as the C-Abstractor, sets the number of tokens.
        blank = self.encoder.inputs([Image.new("RGB", (64, 64))])
        tokens = self.visual_tokens(self.encoder.features(blank)).shape[1]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"Projector {self.name!r} gives {tokens} tokens, which do not fill a square grid.")
        return side, side

    def layouts(self, sizes_wh: Sequence[tuple[int, int]]) -> list[Layout]:
        """Return the layouts of images of these sizes (width, height in pixels)."""
        return [self.encoder.layout(size_wh, self.shape) for size_wh in sizes_wh]

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Look up word embeddings of the LLM: ids `[...]` -> `[..., D]`, float32."""
        return self.words.table[ids].float()

    def untrained(self, seed: int) -> VisionLanguageModel:
        """Return a copy with a random projector of the same shape. The global random state is unchanged."""
        device = next(self.projector.parameters(), self.words.table).device
        projector = seeded(self.build, seed).to(device, torch.float32).eval()
        name, source = f"{self.name}, untrained, seed {seed}", f"random weights, seed {seed}"
        return replace(self, name=name, source=source, projector=projector, pictured=False)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `build` with torch's random state seeded, and restore the state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
