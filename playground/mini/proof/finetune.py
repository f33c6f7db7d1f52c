"""Trains stage 2 on a projector of stage 1: all questions of a scene behind one image, by `finetune.sh`."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from patch_aligned.files import written_whole
from playground.mini.proof.experiment import STAGE_2_RATE

WARMUP_STEPS = 10
QUESTIONS = "choices_by_scene.json"


def main(
    stage_1: Annotated[Path, typer.Argument(help="Folder of the run of stage 1.")],
    seed: Annotated[int, typer.Option(help="Of the order of the scenes.")],
    steps: Annotated[int, typer.Option(help="Steps of 8 scenes; a run with fewer is continued.")],
    scenes: Annotated[Path, typer.Option(help="Folder of the training scenes.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    features: Annotated[Path | None, typer.Option(help="Folder where features are cached.")] = None,
) -> None:
    """Train stage 2; a run that was stopped continues, a finished one is left as it is."""
    data = scenes / QUESTIONS
    if not data.exists():
        single = json.loads((scenes / "choices_instruct.json").read_text(encoding="utf-8"))
        with written_whole(data) as path:
            path.write_text(json.dumps(by_scene(single)), encoding="utf-8")
    # The rate is constant, so that a run of 100 steps has the weights that one of 300 has after 100.
    command = ["bash", "scripts/v1_5/finetune.sh", "--independent_turns", "True"]
    command += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", str(WARMUP_STEPS)]
    if features is not None:
        command += ["--cache_features", str(features)]
    variables = {
        "PRESET": "mini",
        "GLOBAL_BATCH_SIZE": "8",
        "MAX_STEPS": str(steps),
        "SEED": str(seed),
        "LEARNING_RATE": str(STAGE_2_RATE),
        "PRETRAIN_MM_MLP_ADAPTER": str(stage_1 / "mm_projector.bin"),
        "DATA_PATH": str(data),
        "IMAGE_FOLDER": str(scenes),
        "OUTPUT_DIR": str(output),
    }
    raise SystemExit(subprocess.run(command, env=os.environ | variables, check=False).returncode)


def by_scene(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join conversations of one round about an image, which follow each other, to one dialogue."""
    dialogues = []
    for image, group in groupby(records, key=lambda record: record["image"]):
        rounds = [record["conversations"] for record in group]
        turns = [turn for one in rounds for turn in one]
        later = [{**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in turns[1:]]
        dialogues.append({"id": image, "image": image, "conversations": [turns[0], *later]})
    return dialogues


if __name__ == "__main__":
    typer.run(main)
