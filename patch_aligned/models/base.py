"""Interface between models and the analysis: encoder features, visual tokens and word embeddings.

Only the word-embedding table of the LLM is read, so a 7B model needs memory for its tower and table only; name scores
alone load its layers. Models that share an encoder share its features, which are computed once per image.

Letters: d width of the tower, T visual tokens of an image, D width of the LLM, M vocabulary, R labels, K tokens of a
label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from patch_aligned.cells import Layout, TokenGrid
from patch_aligned.labels import LabelTokenizer


class WordEmbeddings:
    """Input-embedding table `[M, D]` of an LLM, in the dtype it is stored in, with its tokenizer.

    Args:
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
        """Return label embeddings `[R, D]`, float32: the mean of the rows of each label's tokens (equation 2)."""
        if not labels:
            return torch.zeros(0, self.width)
        ids = [torch.tensor(self.token_ids(label)) for label in labels]  # [K] each
        return torch.stack([self.table[of_label].float().mean(dim=0) for of_label in ids])  # [K, D] -> [R, D]

    def directions_of_labels(self, labels: Sequence[str]) -> Tensor:
        """Return `of_labels`, normalised to length 1."""
        return F.normalize(self.of_labels(labels), dim=-1)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images after the vision tower, which projectors of one tower share."""

    features: Tensor  # `[..., d]` of all images together, float32: what the projector reads
    project: Callable[[nn.Module], Sequence[Tensor]]  # visual tokens by a projector of the tower, `[T, D]` an image


class Encoder(Protocol):
    """A model up to its projector: encodes images, and locates their visual tokens."""

    name: str
    device: str
    image_aspect_ratio: str  # how images are treated, for reports: LLaVA's `square` or `pad`, else the image processor
    takes_batches: bool  # whether several images may be encoded at once

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Run the vision tower on RGB images."""

    def layout(self, image_wh: tuple[int, int], tokens: int) -> Layout:
        """Return the layout of an image of this size (pixels); raise `ValueError` if it cannot have so many tokens."""


class LanguageSource(Protocol):
    """Where an LLM is loaded from; equal sources load the same LLM."""

    def load(self) -> ReadingModel:
        """Load the LLM with its prompts."""


class ReadingModel(Protocol):
    """An LLM that answers about images: `language.LanguageModel`, or `whole.WholeModel`."""

    def answer_ids(self, text: str) -> list[int]:
        """Return the token ids of an answer as it stands behind the prompt."""

    def see(self, model: VisionLanguageModel | None, images: Sequence[Image.Image]) -> Any:
        """Read images by the encoder and projector of `model`, or one image by those of its own."""

    def log_probabilities(self, seen: Any, stem: str, continuations: Sequence[Sequence[int]], /) -> Tensor:
        """Return the log-probability of each continuation after each image and a beginning of the answer, `[B, N]`."""

    def captions(self, seen: Any, max_new_tokens: int, /) -> list[str]:
        """Return greedy answers, one an image."""


@dataclass(frozen=True, eq=False)
class VisionLanguageModel:
    """A named projector, with its encoder and the word embeddings that its tokens are compared with."""

    name: str  # in tables
    source: str  # origin of the projector's weights, in words
    encoder: Encoder
    projector: nn.Module  # what `Encoded.project` takes
    words: WordEmbeddings  # of the base LLM; of a full checkpoint its own, since fine-tuning changes the table
    build: Callable[[], nn.Module]  # an untrained projector of the same shape, from torch's global random state
    language: LanguageSource | None = None  # the whole LLM, which only name scores need; None if put together by hand
    pictured: bool = True  # whether pictures show its maps

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Run the vision tower on RGB images."""
        return self.encoder.encode(images)

    @torch.no_grad()
    def visual_tokens(self, encoded: Encoded) -> Sequence[Tensor]:
        """Compute the visual tokens of each image, `[T, D]`, in the order in which the LLM reads them."""
        return encoded.project(self.projector)

    def layout(self, image_wh: tuple[int, int], visual_tokens: Tensor) -> Layout:
        """Return where the visual tokens `[T, D]` of an image of this size (width, height in pixels) look."""
        return self.encoder.layout(image_wh, len(visual_tokens))

    def untrained(self, seed: int) -> VisionLanguageModel:
        """Return a copy with a random projector of the same shape. The global random state is unchanged."""
        device = next(self.projector.parameters(), self.words.table).device
        projector = seeded(self.build, seed).to(device).eval()
        name, source = f"{self.name}, untrained, seed {seed}", f"random weights, seed {seed}"
        return replace(self, name=name, source=source, projector=projector, pictured=False)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `build` with torch's random state seeded, and restore the state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def tokens_of_image(
    models: Sequence[VisionLanguageModel], image: Image.Image
) -> Iterator[tuple[VisionLanguageModel, Tensor, TokenGrid]]:
    """Yield each model with its visual tokens `[T, D]` and its grid over the whole image. Each encoder runs once."""
    encoded: dict[int, Encoded] = {}
    for model in models:
        if id(model.encoder) not in encoded:
            encoded[id(model.encoder)] = model.encode([image])
        [tokens] = model.visual_tokens(encoded[id(model.encoder)])  # [T, D]
        yield model, tokens, model.layout(image.size, tokens).whole
