"""What a measure needs of a model: features before the projector, visual tokens after it, and word embeddings.

A projector is measured without the LLM's layers: of the LLM only the table of word embeddings is read, so a 7B model
costs its table and no more. Several projectors share one vision tower, whose features are computed once an image.

Letters: B images, S patches of the tower, d width of the tower, T visual tokens after a projector (T = S unless it
resamples), D width of the LLM, M vocabulary, R labels, K tokens of a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llava.image_geometry import ImageGeometry
from llava.mm_utils import image_geometry_of, process_images
from llava.model.checkpoint import CheckpointTensors
from llava.model.multimodal_encoder.builder import build_vision_tower
from patch_aligned.labels import LabelTokenizer

WORD_TABLE_ENDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


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

    @classmethod
    def load(cls, base: str, placeholder: int | None = None) -> WordEmbeddings:
        """Reads tokenizer and table, and nothing else, of an LLM's folder or hub name (a LLaVA checkpoint will do).

        Args:
            base: the folder or name.
            placeholder: see the class.

        Raises:
            FileNotFoundError: there is no such folder and no such model on the hub.
            ValueError: the weights hold no table of word embeddings.
        """
        from transformers import AutoTokenizer

        weights = CheckpointTensors(base)
        tables = [name for name in weights if name.endswith(WORD_TABLE_ENDINGS)]
        if len(tables) != 1:
            raise ValueError(
                f"{base}: expected one tensor named *{' or *'.join(WORD_TABLE_ENDINGS)}, "
                f"found {sorted(tables) or 'none'}. "
                "Pass --base the folder of the language model that the projector was trained for."
            )
        return cls(AutoTokenizer.from_pretrained(base), weights[tables[0]], base, placeholder)

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


class Tower(Protocol):
    """What a measure needs of a model up to its projector: images -> features, and where their pixels land.

    `SharedTower` is LLaVA's, `model_families` has those of transformers.
    """

    name: str
    device: str

    @property
    def image_aspect_ratio(self) -> str:
        """How images are made square, for the report: `square`, `pad` or `squeeze`."""

    @property
    def width(self) -> int:
        """d, the width of the features."""

    def pixels(self, image: Image.Image) -> Tensor:
        """One image as the tower sees it, `[3, side, side]`."""

    def displayed(self, pixels: Tensor) -> Tensor:
        """The same for a picture, values 0..1, without what no patch covers."""

    def features(self, pixels: Tensor) -> Tensor:
        """Features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""

    def geometry(self, original_wh: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """What `pixels` does to an image of this size, with the token grid of a projector."""


class SharedTower:
    """The vision tower that all measured projectors read, with the image preprocessing that belongs to it.

    Args:
        name: folder or hub name of the encoder.
        image_aspect_ratio: LLaVA's value, `square` or `pad`.
        select_layer: hidden layer whose features are used.
        select_feature: only `patch`, where every visual token stands for a cell of the image.
        device: where the tower runs, in float32.

    Raises:
        ValueError: the tower cannot be found or is of an unknown kind, or a setting is not one of those above.
    """

    def __init__(
        self,
        name: str,
        image_aspect_ratio: str = "square",
        select_layer: int = -2,
        select_feature: str = "patch",
        device: str = "cpu",
    ):
        if select_feature != "patch":
            raise ValueError(
                f"mm_vision_select_feature is {select_feature!r}; places can be measured only with 'patch', where "
                "every visual token stands for a cell of the image."
            )
        if image_aspect_ratio not in ("square", "pad"):
            raise ValueError(
                f"image_aspect_ratio is {image_aspect_ratio!r}; projectors are measured on 'square' or 'pad' images. "
                "Choose one with --image-aspect-ratio."
            )
        config = SimpleNamespace(
            mm_vision_tower=name, mm_vision_select_layer=select_layer, mm_vision_select_feature=select_feature
        )
        self.name, self.image_aspect_ratio, self.select_layer, self.device = (
            name,
            image_aspect_ratio,
            select_layer,
            device,
        )
        self.tower = build_vision_tower(config, delay_load=False).to(device=device, dtype=torch.float32).eval()

    @property
    def width(self) -> int:
        """d, the width of the features."""
        return self.tower.hidden_size

    def pixels(self, image: Image.Image) -> Tensor:
        """One image as the tower sees it, `[3, side, side]`."""
        config = SimpleNamespace(image_aspect_ratio=self.image_aspect_ratio)
        return process_images([image], self.tower.image_processor, config)[0]

    def displayed(self, pixels: Tensor) -> Tensor:
        """Undoes the normalisation: `[3, side, side]` -> values 0..1 for a picture, without what no patch covers."""
        return without_normalisation(pixels, self.tower.image_processor, self.tower.seen_side)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""
        return self.tower(pixels.to(self.device, torch.float32))

    def geometry(self, original_wh: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """What `pixels` does to an image of this size, with the token grid of a projector."""
        processor, seen = self.tower.image_processor, self.tower.seen_side
        return image_geometry_of(original_wh, processor, self.image_aspect_ratio, grid, seen)


@dataclass(frozen=True)
class MeasuredProjector:
    """A projector under a name, with the word embeddings that its visual tokens are compared with.

    Attributes:
        name: as it appears in tables.
        source: where its weights come from, in words.
        projector: maps features `[B, S, d]` to visual tokens `[B, T, D]`.
        words: the base LLM's, or for a full checkpoint its own, since fine-tuning moves the table.
        build: makes an untrained projector of the same shape, from torch's global random stream.
        pictured: whether its maps belong into a picture.
    """

    name: str
    source: str
    projector: nn.Module
    words: WordEmbeddings
    build: Callable[[], nn.Module]
    pictured: bool = True

    def untrained(self, seed: int) -> MeasuredProjector:
        """A random projector of the same shape; the global random stream is left alone."""
        place = next(self.projector.parameters(), self.words.table).device
        projector = seeded(self.build, seed).to(place, torch.float32).eval()
        name, source = f"{self.name}, untrained, seed {seed}", f"random weights, seed {seed}"
        return replace(self, name=name, source=source, projector=projector, pictured=False)

    @torch.no_grad()
    def visual_tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Visual tokens `[B, T, D]` and their grid (rows, cols).

        Raises:
            ValueError: the number of tokens is no square.
        """
        tokens = self.projector(features)  # [B, S, d] -> [B, T, D]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"Projector {self.name!r} gives {tokens.shape[1]} tokens, which fill no square grid.")
        return tokens, (side, side)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `build` makes when torch's random stream starts at `seed`; the stream itself is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def without_normalisation(pixels: Tensor, image_processor: Any, side: int) -> Tensor:
    """The upper left `side x side` of a normalised image `[3, ...]`, as colours 0..1."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return (pixels[:, :side, :side] * std + mean).clamp(0, 1)
