"""Writes the difference of a checkpoint and the LLM that it was trained from.

python -m llava.model.make_delta --base-model-path models/llama-7b --target-model-path checkpoints/llava-7b \\
    --delta-path checkpoints/llava-7b-delta
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava.command import command_parser, run_command
from llava.model.checkpoint import CheckpointTensors, require_new_folder, save_checkpoint
from llava.model.delta import combined
from llava.model.utils import auto_upgrade


def make_delta(
    base_model_path: str,
    target_model_path: str,
    delta_path: str,
    hub_repo_id: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes target - base to the folder `delta_path`, and to the hub where `hub_repo_id` names a repository.

    Raises:
        FileExistsError: `delta_path` holds files.
        FileNotFoundError: one of the checkpoints has no weights.
        ValueError: a tensor of the target has no counterpart in the base; names it.
    """
    require_new_folder(Path(delta_path))
    auto_upgrade(target_model_path)
    delta = combined(CheckpointTensors(base_model_path), CheckpointTensors(target_model_path), -1, dtype)
    save_checkpoint(delta, Path(delta_path), target_model_path, dtype)
    if hub_repo_id:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(hub_repo_id, exist_ok=True)
        api.upload_folder(repo_id=hub_repo_id, folder_path=delta_path)


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = command_parser("llava.model.make_delta", __doc__)
    parser.add_argument("--base-model-path", required=True, help="the LLM: folder or hub name")
    parser.add_argument("--target-model-path", required=True, help="the LLaVA trained from it: folder or hub name")
    parser.add_argument("--delta-path", required=True, help="folder to write")
    parser.add_argument("--hub-repo-id", help="repository on the hub to upload the delta to; default: none")
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes what `args` name."""
    make_delta(args.base_model_path, args.target_model_path, args.delta_path, args.hub_repo_id)
    print(f"Wrote {args.delta_path}")


if __name__ == "__main__":
    run_command(main, argument_parser())
