"""Writes the projector of a checkpoint to a file of its own, as stage 1 does, for stage 2 or another LLM to start from.

python scripts/extract_mm_projector.py --model-path checkpoints/llava-7b --output mm_projector.bin
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava.checkpoint_files import NON_LORA_FILE, PROJECTOR_FILE, find_file
from llava.command import run_command
from llava.model.checkpoint import CheckpointTensors
from llava.model.weights import MARK, read_projector_file

PROJECTOR_FILES = (PROJECTOR_FILE, NON_LORA_FILE)
"""Files of a stage-1 or LoRA folder that hold the projector apart from the LLM."""


def projector_tensors(model_path: str) -> dict[str, Tensor]:
    """The projector's tensors of a checkpoint (folder or hub name), under their full names.

    Raises:
        FileNotFoundError: the checkpoint has no weights.
        ValueError: none of the tensors belongs to a projector.
    """
    tensors: Mapping[str, Tensor]
    if apart := next((path for name in PROJECTOR_FILES if (path := find_file(model_path, name))), None):
        tensors = read_projector_file(apart)
    else:
        tensors = CheckpointTensors(model_path)
    found = {name: tensors[name].clone() for name in tensors if MARK in name}
    if not found:
        raise ValueError(f"{model_path} holds no projector: expected names with `{MARK}`, found {list(tensors)[:5]}.")
    return found


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, help="checkpoint: folder or hub name")
    parser.add_argument("--output", required=True, help="file to write")
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes what `args` name."""
    if Path(args.output).resolve() in [path.resolve() for path in Path(args.model_path).glob("*")]:
        raise FileExistsError(f"--output {args.output}: is a file of --model-path {args.model_path}. Name another.")
    tensors = projector_tensors(args.model_path)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, args.output)
    print(f"Wrote {len(tensors)} tensors to {args.output}: {', '.join(tensors)}")


if __name__ == "__main__":
    run_command(main, argument_parser())
