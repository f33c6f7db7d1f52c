"""Adds a published delta to the LLM that it was made from.

python -m llava.model.apply_delta --base-model-path models/llama-7b --target-model-path checkpoints/llava-7b \\
    --delta-path liuhaotian/LLaVA-7b-delta-v1-1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava.command import command_parser, run_command
from llava.model.checkpoint import CheckpointTensors, require_new_folder, save_checkpoint
from llava.model.delta import combined


def apply_delta(
    base_model_path: str, target_model_path: str, delta_path: str, dtype: torch.dtype = torch.float16
) -> None:
    """Writes base + delta to the folder `target_model_path`, with the delta's config and tokenizer.

    Raises:
        FileExistsError: `target_model_path` holds files.
        FileNotFoundError: one of the checkpoints has no weights.
        ValueError: a tensor of the delta has no counterpart in the base; names it.
    """
    require_new_folder(Path(target_model_path))
    target = combined(CheckpointTensors(base_model_path), CheckpointTensors(delta_path), 1, dtype)
    save_checkpoint(target, Path(target_model_path), delta_path, dtype)


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = command_parser("llava.model.apply_delta", __doc__)
    parser.add_argument("--base-model-path", required=True, help="the LLM: folder or hub name")
    parser.add_argument("--target-model-path", required=True, help="folder to write")
    parser.add_argument("--delta-path", required=True, help="the delta: folder or hub name")
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes what `args` name."""
    apply_delta(args.base_model_path, args.target_model_path, args.delta_path)
    print(f"Wrote {args.target_model_path}")


if __name__ == "__main__":
    run_command(main, argument_parser())
