"""Train LLaVA with flash attention if it can be used, else with torch's own attention."""

import runpy
from pathlib import Path

own_packages = runpy.run_path(str(Path(__file__).parents[1] / "own_packages.py"))
own_packages["require_own_packages"]("llava")  # started by its path, this file alone is sure to be ours

from llava.train.train import train  # noqa: E402

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2")
