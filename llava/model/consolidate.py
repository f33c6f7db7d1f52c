"""Rewrites a checkpoint as safetensors in half precision.

python -m llava.model.consolidate --src checkpoints/llava-7b --dst checkpoints/llava-7b-consolidated
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llava.model.checkpoint_files import CheckpointTensors, copy_small_files, save_weights
from llava.model.utils import auto_upgrade


def consolidate_ckpt(src_path: str, dst_path: str, dtype: torch.dtype = torch.float16) -> None:
    """Writes all tensors of `src_path`, in `dtype`, with config and tokenizer, to the folder `dst_path`.

    Raises:
        FileNotFoundError: there are no weights at `src_path`.
    """
    auto_upgrade(src_path)
    tensors = CheckpointTensors(src_path)
    save_weights({name: tensors[name].to(dtype) for name in tensors}, Path(dst_path))
    copy_small_files(src_path, Path(dst_path), dtype)


def main() -> None:
    """Upstream's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.model.consolidate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--src", required=True, help="checkpoint: folder or hub name; safetensors or .bin, also shards")
    parser.add_argument("--dst", required=True, help="folder to write")
    args = parser.parse_args()
    consolidate_ckpt(args.src, args.dst)
    print(f"Wrote {args.dst}")


if __name__ == "__main__":
    main()
