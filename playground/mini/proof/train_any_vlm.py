"""Trains stage 1 of a model that `patch-aligned stitch` wrote, as an arm of the experiment and a seed say.

It is `patch-aligned train`. Features of the frozen tower are kept in a folder, which all runs share; the arm R turns
the words.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from patch_aligned.files import written_whole
from patch_aligned.train.objective import PatchObjective
from patch_aligned.train.train import train
from playground.mini.proof.experiment import ARMS, JOINT_STEPS, RATE, WARMUP_STEPS
from playground.mini.train_rotated import RotatedWords

# As LLaVA's arms are trained, see scripts/v1_5/pretrain.sh with PRESET=mini.
FLAGS = {
    "per_device_train_batch_size": 8, "lr_scheduler_type": "constant_with_warmup",
    "logging_steps": 1, "save_steps": 24, "save_total_limit": 1, "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "report_to": "none",
}  # fmt: skip


def rotate_words(seed: int) -> None:
    """Turn the words that the patch loss aligns with."""
    towards_words: Any = PatchObjective.loss

    @cache
    def words(objective: PatchObjective) -> RotatedWords:
        assert objective.index is not None
        return RotatedWords(objective.index.tag_counts(), objective.labels, seed)

    def loss(objective: PatchObjective, *given: Any) -> Any:
        *before, embed_words = given
        return towards_words(objective, *before, words(objective)(embed_words))

    PatchObjective.loss = loss  # type: ignore[method-assign, assignment]


def keep_features(folder: Path) -> None:
    """Let InternVL's tower run on the images `[B, 3, H, W]` alone whose features are not in a folder yet."""
    run = InternVLVisionModel.forward
    folder.mkdir(parents=True, exist_ok=True)

    def forward(tower: InternVLVisionModel, pixel_values: Tensor, **settings: Any) -> BaseModelOutputWithPooling:
        paths = [folder / f"{sha256(image.numpy().tobytes()).hexdigest()}.safetensors" for image in pixel_values]
        for path, image in zip(paths, pixel_values, strict=True):
            if not path.exists():
                features = run(tower, image[None], **settings).last_hidden_state[0]  # [tokens, d]
                with written_whole(path) as temporary:
                    save_file({"features": features.contiguous()}, temporary)
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.stack([load_file(path)["features"] for path in paths])
        )

    InternVLVisionModel.forward = forward  # type: ignore[method-assign]


def main(
    model: Annotated[Path, typer.Option(help="What `patch-aligned stitch` wrote.")],
    arm: Annotated[str, typer.Option(help="C, P, P>C, P ramp, R or R>C.")],
    seed: Annotated[int, typer.Option(help="Of the order of scenes and of the rotation.")],
    scenes: Annotated[Path, typer.Option(help="Folder of the training scenes.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    features: Annotated[Path, typer.Option(help="Folder where features are cached.")],
    steps: Annotated[int, typer.Option(help="Joint steps of 8 scenes.")] = JOINT_STEPS,
    warmup_steps: Annotated[int, typer.Option(help="Patch steps before, if the arm has a warm-up.")] = WARMUP_STEPS,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = RATE,
) -> None:
    """Train stage 1; a run that was stopped continues, a finished one is left as it is."""
    chosen = ARMS[arm]
    places = {"model": model, "data": scenes / "pad.json", "images": scenes, "output_dir": output}
    flags: dict[str, Any] = {**FLAGS, **places, "max_steps": steps, "seed": seed, "learning_rate": rate}
    if chosen.beta is None:
        flags["captions_only"] = True
    else:
        flags |= dict(zip(("patch_beta_start", "patch_beta_end"), chosen.beta, strict=True))
        flags["patch_warmup_steps"] = warmup_steps if chosen.has_warmup else 0
    if chosen.rotated:
        rotate_words(seed)
    keep_features(features)
    train([word for name, value in flags.items() for word in (f"--{name}", str(value))])


if __name__ == "__main__":
    typer.run(main)
