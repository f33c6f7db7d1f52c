"""Command-line flags of patch-aligned training, parsed together with those of LLaVA or TRL."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

Grids = Literal["all", "whole", "tiles"]


def flag(default: Any, help: str) -> Any:
    """Declare a flag; `MISSING` makes it required."""
    return field(default=default, metadata={"help": help})


@dataclass
class PatchArguments:
    """Flags of the patch loss, which start with `patch_`, and of what is measured on held-out images beside it."""

    patch_data_path: str | None = flag(
        None,
        "PAD file (.json, .jsonl, either gzipped, or .parquet) with the regions of the training images, joined with "
        "--data_path by the image's path. Not needed if --data_path is a PAD file itself.",
    )
    patch_min_coverage: float = flag(
        0.5, "A region covers a visual token if its mask covers at least this fraction of the token's cell."
    )
    patch_beta_start: float = flag(0.0, "Weight of the patch loss at the first step.")
    patch_beta_end: float = flag(5.0, "Weight of the patch loss at the last step; it changes linearly in between.")
    patch_loss: Literal["cosine", "cosine+nce"] = flag(
        "cosine",
        "'cosine' is the paper's; 'cosine+nce' adds InfoNCE, which also pushes a region away from the micro-batch's "
        "other labels.",
    )
    patch_nce_weight: float = flag(0.2, "Weight of InfoNCE within the patch loss.")
    patch_nce_temperature: float = flag(0.07, "Temperature of InfoNCE's cosines.")
    patch_regions_only_ratio: float | None = flag(
        None,
        "Micro-steps of images with regions and without caption, for each micro-step with captions (default: as many "
        "as the data have).",
    )
    patch_warmup_steps: int = flag(
        0,
        "Optimizer steps of the patch loss alone before the run, on all images with regions, without the LLM. They are "
        "not counted in --max_steps.",
    )
    patch_on_error: Literal["fail", "skip"] = flag(
        "fail",
        "What to do with PAD records that break the format, or whose size is not the image's: 'fail' stops the run; "
        "'skip' trains these images on their captions only, and lists and counts the records.",
    )
    patch_cache_dir: str | None = flag(
        None, "Cache folder of converted PAD files (default: $PATCH_ALIGNED_CACHE, else ~/.cache/patch_aligned)."
    )
    patch_picture_steps: int = flag(
        0,
        "Draw where labels are found in held-out images, before the first step, every so many, and after the last "
        "(default: never): patch_pictures.html, TensorBoard, W&B.",
    )
    eval_align_steps: int = flag(0, "Log Align, contrast and retrieval of held-out images so often (default: never).")
    eval_align_images: int = flag(32, "Images that both hold out, the same for all seeds.")

    def beta(self, progress: float) -> float:
        """Return the weight of the patch loss: linear in progress, exact at 0 and 1."""
        return self.patch_beta_start * (1 - progress) + self.patch_beta_end * progress

    def __post_init__(self) -> None:
        if not 0 < self.patch_min_coverage <= 1:
            raise ValueError(
                f"--patch_min_coverage: found {self.patch_min_coverage}; expected a fraction above 0 and up to 1"
            )
        amounts = ("beta_start", "beta_end", "nce_weight", "regions_only_ratio", "warmup_steps")
        for name in (f"patch_{amount}" for amount in amounts):
            found = getattr(self, name)
            if found is not None and not (math.isfinite(found) and found >= 0):
                raise ValueError(f"--{name}: found {found}; expected a finite number, 0 or more")
        if not (math.isfinite(self.patch_nce_temperature) and self.patch_nce_temperature > 0):
            raise ValueError(f"--patch_nce_temperature: found {self.patch_nce_temperature}; expected a number above 0")
        for name, choices in (("patch_on_error", ("fail", "skip")), ("patch_loss", ("cosine", "cosine+nce"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name}: found {getattr(self, name)!r}; expected {' or '.join(map(repr, choices))}")


@dataclass
class TrainArguments:
    """What is trained, on what."""

    model: str = flag(MISSING, "Folder or hub name, such as what `patch-aligned stitch` wrote. May stand first, alone.")
    data: str = flag(MISSING, "PAD file: an image's caption, and its regions for the patch loss.")
    images: str = flag(MISSING, "Folder that the file's image_id are relative to.")
    captions_only: bool = flag(False, "The baseline arm: the same without the patch loss.")
    train_what: Literal["projector", "all"] = flag("projector", "'projector' freezes vision encoder and LLM.")
    grids: Literal["all", "whole", "tiles"] = flag("all", "Grids of tokens that the patch loss trains.")
    eval_reads_steps: int = flag(
        0,
        "Log what `patch-aligned reads` measures: before the first step, every so many optimizer steps, and after the "
        "last (default: never).",
    )
    eval_reads_captions: int = flag(
        90, "Captions that it is measured on: their images are chosen once, and not trained on."
    )
