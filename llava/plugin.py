"""The one hook of `llava`: all that code outside the package sees of a training run.

A plugin adds tensors to each sample, and losses that read the visual tokens of the same forward pass. It is handed to
`llava.train.train.train(plugin=...)` by whoever starts the run; there is no registry. Without a plugin, training is
plain LLaVA, bit for bit.

Not goals: several plugins at once, plugins with parameters of their own, hooks at generation.

Letters: N images of the micro-batch, S visual tokens of an image, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class ImageView:
    """What `process_images` did to one image on its way into the vision tower; all lengths are pixels.

    Attributes:
        original_wh: width and height of the image file.
        treatment: `crop` (the shortest edge resized, the centre cut out), `pad` (centred on a square canvas, then
            resized) or `squeeze` (the whole image resized to the square: the base tile of anyres, or what SigLIP's
            processor does).
        shortest_edge: length to which edges are resized.
        processed_side: side of the image processor's output, the centre of the resized image.
        seen_side: side of the upper left part of that output which patches cover. 27 patches of 14 pixels leave 6 of
            SigLIP's 384 pixels unseen.
        grid: rows and columns of visual tokens over what is seen.
    """

    original_wh: tuple[int, int]
    treatment: Literal["crop", "pad", "squeeze"]
    shortest_edge: int
    processed_side: int
    seen_side: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class AlignmentContext:
    """What a plugin's losses may read inside `forward`.

    Attributes:
        visual_tokens: `[N, S, D]`, projector output, one row an image (the base tile for anyres), before merging.
        sample_of_image: `[N]`, row of the batch that each image belongs to. Dummy images are left out.
        grid: rows and columns of the token grid; `S = rows * cols`, row-major.
        embed_words: ids `[...]` -> `[..., D]` through the LLM's own embedding module. Under ZeRO-3 a call gathers the
            table on all ranks, so every rank must call it equally often in each micro-step.
    """

    visual_tokens: Tensor
    sample_of_image: Tensor
    grid: tuple[int, int]
    embed_words: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AuxiliaryOutput:
    """What a plugin returns from a forward pass.

    Attributes:
        losses: named scalars, unweighted and mean-reduced, connected to the graph; logged as `loss/<name>`.
        metrics: named scalars that are only logged, under the name given. They are averaged over the micro-batches and
            ranks of a logging window; NaN means "nothing to report here" and is left out of the mean.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class TrainingPlugin:
    """Base class of a plugin; every method has a neutral default, so a subclass states only what it adds."""

    arguments_class: type | None = None
    """Dataclass parsed from the command line beside LLaVA's own; its fields should share a prefix."""

    def setup(
        self,
        arguments: Any,
        tokenizer: Any,
        *,
        data_path: str | None = None,
        image_folder: str | None = None,
        output_dir: Path | None = None,
    ) -> None:
        """Called once, after arguments are parsed and the tokenizer is loaded, before any data is read."""

    def transform_sample(self, record: Mapping[str, Any], view: ImageView) -> dict[str, Tensor]:
        """Tensors to add to one sample with an image. Runs in data workers.

        Args:
            record: the sample as it stands in the training JSON.
            view: what happened to the sample's image, with the token grid.
        """
        return {}

    def collate(self, extras: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Joins the extras of a batch, one entry a row (`{}` for rows without image). Runs in data workers."""
        return {}

    def auxiliary_losses(self, context: AlignmentContext, batch: Mapping[str, Tensor]) -> AuxiliaryOutput:
        """Losses of one micro-batch; `batch` is what `collate` returned. Runs inside the model's `forward`."""
        return AuxiliaryOutput({})

    def loss_weights(self, progress: float) -> dict[str, float]:
        """Weight of each named loss; `progress` runs from 0 at the first optimizer step to 1 at the last.

        Logged as `<name>/beta`.
        """
        return {}

    def describe_first_batch(self, images: Tensor, grid: tuple[int, int], batch: Mapping[str, Any], path: Path) -> None:
        """Saves a picture of what the plugin made of the first batch, so that misplaced regions are seen at once.

        Args:
            images: `[N, 3, side, side]` in 0..1: what patches cover of the tower's input, without normalisation.
            grid: rows and columns of visual tokens over it.
            batch: what `collate` returned.
            path: where the picture goes, without suffix.
        """
