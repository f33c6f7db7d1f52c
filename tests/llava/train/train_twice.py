"""Trains, throws the later checkpoints away, and trains again as after a kill, in several processes.

usage: train_twice.py FLAG... ; the flags of several runs are separated by `--next`. With `--plugin` first, runs are
patch-aligned. Started by torchrun. Writes `<output_dir>/losses.json`: the losses of the first and of the resumed run.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import train
from patch_aligned.train.plugin import PatchAlignedPlugin

HAS_PLUGIN = sys.argv[1] == "--plugin"


def losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(arguments: list[str]) -> None:
    sys.argv = ["train.py", *arguments]
    first = train(plugin=PatchAlignedPlugin() if HAS_PLUGIN else None)
    output_dir = Path(first.args.output_dir)
    torch.distributed.barrier()
    if first.args.should_save:
        for folder in output_dir.glob("checkpoint-*"):
            if folder.name != "checkpoint-2":
                shutil.rmtree(folder)
        shutil.copytree(output_dir, output_dir.with_name(output_dir.name + "_first"))
        for file in output_dir.iterdir():
            if file.is_file():
                file.unlink()
    torch.distributed.barrier()
    resumed = train(plugin=PatchAlignedPlugin() if HAS_PLUGIN else None)
    if first.args.should_save:
        (output_dir / "losses.json").write_text(json.dumps([losses(first), losses(resumed)]))


arguments = sys.argv[1 + HAS_PLUGIN :]
while arguments:
    end = arguments.index("--next") if "--next" in arguments else len(arguments)
    run(arguments[:end])
    arguments = arguments[end + 1 :]
