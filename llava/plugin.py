"""Training plugin interface: the only hook that code outside `llava` has into a training run.

A plugin adds tensors to each sample, and losses that read the visual tokens of the same forward pass. Pass it to
`llava.train.train.train(plugin=...)`; there is no registry. Without a plugin, training is plain LLaVA, bit for bit.

Non-goals: several plugins at once, plugins with trainable parameters, hooks in generation.

Letters: N images of the micro-batch, S visual tokens of an image, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import TrainerCallback


@dataclass(frozen=True)
class ImageView:
    """Geometry of the preprocessing that `process_images` applied to one image. All lengths are in pixels.

    Attributes:
        original_wh: width and height of the image file.
        treatment: `crop` (resize the shortest edge, then crop the centre), `pad` (centre on a square canvas, then
            resize) or `squeeze` (resize the full image to the square: the base tile of anyres, and SigLIP's processor).
        shortest_edge: length to which edges are resized.
        processed_side: side of the image processor's output, the centre of the resized image.
        seen_side: side of the upper left part of that output which patches cover. 27 patches of 14 pixels leave 6 of
            SigLIP's 384 pixels unseen.
        grid: rows and columns of visual tokens over the seen part.
    """

    original_wh: tuple[int, int]
    treatment: Literal["crop", "pad", "squeeze"]
    shortest_edge: int
    processed_side: int
    seen_side: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class AlignmentContext:
    """Inputs of a plugin's losses inside `forward`.

    Attributes:
        visual_tokens: `[N, S, D]`, projector output before merging, one row per image (anyres: the base tile).
        sample_of_image: `[N]`, row of the batch that each image belongs to. Dummy images are excluded.
        grid: rows and columns of the token grid; `S = rows * cols`, row-major.
        embed_words: ids `[...]` -> `[..., D]` through the LLM's embedding module. Under ZeRO-3 each call gathers the
            table on all ranks, so every rank must make the same number of calls per micro-step.
    """

    visual_tokens: Tensor
    sample_of_image: Tensor
    grid: tuple[int, int]
    embed_words: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AuxiliaryOutput:
    """Losses and metrics that a plugin returns from a forward pass.

    Attributes:
        losses: named scalars, unweighted and mean-reduced, connected to the graph; logged as `loss/<name>`.
        metrics: named scalars that are only logged, under the given name. They are averaged over the micro-batches and
            ranks of a logging window. NaN means "nothing to report" and is excluded from the mean.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class TrainingPlugin:
    """Base class of plugins. Every method has a neutral default; subclasses override what they need."""

    arguments_class: type | None = None
    """Dataclass parsed from the command line together with LLaVA's. Its fields should share a prefix."""

    auxiliary_only_ratio: float | None = None
    """Micro-steps of samples without text for each micro-step with text. None: as many as the data have."""

    warmup_steps: int = 0
    """Optimizer steps before the run, of the plugin's losses alone (weight 1), on all images that it supervises."""

    warmup_folder: str = "warmup"
    """Name of the warm-up's folder inside the run's."""

    held_out: frozenset[str] = frozenset()
    """Images (normal paths inside the image folder) whose records are left out of training. Known after `setup`."""

    def setup(
        self,
        arguments: Any,
        tokenizer: Any,
        *,
        data_path: str | None = None,
        image_folder: str | None = None,
        output_dir: Path | None = None,
    ) -> None:
        """Set up the plugin. Called once, after parsing arguments and loading the tokenizer, before reading data."""

    def supervises(self, records: Iterable[Mapping[str, Any]]) -> Sequence[bool]:
        """Return which records have an image that the plugin's losses train, so that they need no text."""
        return [False for _ in records]

    def transform_sample(self, record: Mapping[str, Any], view: ImageView) -> dict[str, Tensor]:
        """Return tensors to add to a sample with an image. Runs in data workers.

        Args:
            record: the sample's record in the training JSON.
            view: geometry of the image's preprocessing, with the token grid.
        """
        return {}

    def collate(self, extras: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate the extras of a batch, one entry per row (`{}` for rows without image). Runs in data workers."""
        return {}

    def auxiliary_losses(self, context: AlignmentContext, batch: Mapping[str, Tensor]) -> AuxiliaryOutput:
        """Compute the losses of one micro-batch from the output of `collate`. Runs inside the model's `forward`."""
        return AuxiliaryOutput({})

    def initial_metrics(self, embed_words: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return metrics to log once, with the first step. `embed_words` is `AlignmentContext`'s, with CPU tensors."""
        return {}

    def loss_weights(self, progress: float) -> dict[str, float]:
        """Return the weight of each named loss. `progress` is 0 at the first optimizer step and 1 at the last.

        Logged as `<name>/beta`.
        """
        return {}

    def callbacks(self, trainer: Any) -> Sequence[TrainerCallback]:
        """Return callbacks of a run, not of its warm-up. `trainer` is made but for them."""
        return ()

    def describe_first_batch(self, images: Tensor, grid: tuple[int, int], batch: Mapping[str, Any], path: Path) -> None:
        """Save a picture of the first batch, so that misplaced regions are noticed early.

        Args:
            images: `[N, 3, side, side]` in 0..1: the part of the tower's input that patches cover, unnormalised.
            grid: rows and columns of visual tokens over it.
            batch: output of `collate`.
            path: output path of the picture, without suffix.
        """
