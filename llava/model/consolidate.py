"""Rewrites a checkpoint as safetensors in half precision.

python -m llava.model.consolidate --src checkpoints/llava-7b --dst checkpoints/llava-7b-consolidated
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava.command import command_parser, run_command
from llava.model.checkpoint import CheckpointTensors, require_new_folder, save_checkpoint


def consolidate_ckpt(src_path: str, dst_path: str, dtype: torch.dtype = torch.float16) -> None:
    """Write all tensors of `src_path`, in `dtype`, with config and tokenizer, to the new folder `dst_path`."""
    require_new_folder(Path(dst_path))
    tensors = CheckpointTensors(src_path)
    save_checkpoint({name: tensors[name].to(dtype) for name in tensors}, Path(dst_path), src_path, dtype)


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = command_parser("llava.model.consolidate", __doc__)
    parser.add_argument("--src", required=True, help="checkpoint: folder or hub name; safetensors or .bin, also shards")
    parser.add_argument("--dst", required=True, help="folder to write")
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes what `args` name."""
    consolidate_ckpt(args.src, args.dst)
    print(f"Wrote {args.dst}")


if __name__ == "__main__":
    run_command(main, argument_parser())
