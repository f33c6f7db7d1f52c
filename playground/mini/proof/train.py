"""Trains stage 1 once, as an arm and a seed say, by the scripts of `scripts/v1_5`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from playground.mini.arms import write_arm
from playground.mini.proof.experiment import ARMS, RATE, WARMUP_STEPS

PATCH_ALIGNED, CAPTIONS = "scripts/v1_5/pretrain_patchaligned.sh", "scripts/v1_5/pretrain.sh"
ROTATED = "playground/mini/proof/pretrain_rotated.sh"


def main(
    arm: Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")],
    seed: Annotated[int, typer.Option(help="Of initialisation and order, of names deranged and of the rotation.")],
    steps: Annotated[int, typer.Option(help="Joint steps of 8 scenes.")],
    scenes: Annotated[Path, typer.Option(help="Folder of the training scenes.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    warmup_steps: Annotated[int, typer.Option(help="Patch steps before, if the arm has a warm-up.")] = WARMUP_STEPS,
    rate: Annotated[str, typer.Option(help="Learning rate, or a file with it.")] = str(RATE),
    features: Annotated[Path | None, typer.Option(help="Folder where features are cached.")] = None,
) -> None:
    """Train stage 1; a run that was stopped continues, a finished one is left as it is."""
    chosen = ARMS[arm]
    data = scenes
    if chosen.variant is not None:
        data = output.parent / f"{output.name}_data"
        write_arm(scenes, chosen.variant, data, seed)
    script = CAPTIONS if chosen.beta is None else ROTATED if chosen.rotated else PATCH_ALIGNED
    command = ["bash", script, "--lr_scheduler_type", "constant_with_warmup"]
    if features is not None:
        command += ["--cache_features", str(features)]
    if chosen.beta is not None:
        command += ["--patch_beta_start", str(chosen.beta[0]), "--patch_beta_end", str(chosen.beta[1])]
        command += ["--patch_warmup_steps", str(warmup_steps if chosen.has_warmup else 0)]
    variables = {
        "PRESET": "mini",
        "MAX_STEPS": str(steps),
        "SAVE_STEPS": "100",
        "SEED": str(seed),
        "LEARNING_RATE": Path(rate).read_text() if Path(rate).is_file() else rate,
        "DATA_PATH": str(data / "train.json"),
        "PAD_PATH": str(data / "pad.json"),
        "IMAGE_FOLDER": str(scenes),
        "OUTPUT_DIR": str(output),
    }
    raise SystemExit(subprocess.run(command, env=os.environ | variables, check=False).returncode)


if __name__ == "__main__":
    typer.run(main)
