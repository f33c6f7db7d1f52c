"""`auto_upgrade`, for checkpoints of LLaVA's first release."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.model.weights import find_file


def auto_upgrade(config: str) -> None:
    """Rewrites the `config.json` of a checkpoint of LLaVA v0, which calls itself a plain Llama; asks before it does.

    This package loads such a checkpoint either way; other programs may not. A checkpoint of another kind is left alone.

    Args:
        config: folder (or hub name, which is only read) of the checkpoint.

    Raises:
        ValueError: the checkpoint needs the upgrade and there is nobody to ask, or it is not a folder of one's own.
    """
    path = find_file(config, "config.json")
    if path is None:
        return
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    if values.get("model_type") != "llama" or not values.get("mm_vision_tower"):
        return
    change = "`model_type` to `llava_llama` and `architectures` to `LlavaLlamaForCausalLM`"
    if not Path(config).is_dir():
        raise ValueError(f"{config} is a checkpoint of LLaVA v0: download it into a folder, and set {change} there.")
    if not sys.stdin.isatty():
        raise ValueError(f"{path} is that of a checkpoint of LLaVA v0: set {change}, or run this in a terminal.")
    if input(f"{path} is that of a checkpoint of LLaVA v0. Set {change}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SystemExit(1)
    values |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
