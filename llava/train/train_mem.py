"""Trains LLaVA with flash attention where it can be had, and with torch's own elsewhere."""

import runpy
from pathlib import Path

own_packages = runpy.run_path(str(Path(__file__).parents[1] / "own_packages.py"))
own_packages["require_own_packages"]("llava")  # started by its path, this file alone is sure to be ours

from llava.train.train import train  # noqa: E402

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2")
