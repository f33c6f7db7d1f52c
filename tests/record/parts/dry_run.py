"""The commands that the scripts of scripts/v1_5 print."""

from __future__ import annotations

import shlex

from product import Facts, Product

PRESETS = ("full", "mini")
FURTHER = (
    {"GPU": "24g"},
    {"LLM": "vicuna13b"},
    {"LLM": "llama31", "GPU": "24g"},
    {"PROJECTOR": "linear"},
    {"PROJECTOR": "cabstractor"},
    {"STAGE1": "captions"},
    {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head"},
    {"NUM_GPUS": "6"},  # refused: 256 and 128 cannot be shared out
    {"CUDA_VISIBLE_DEVICES": "0,3"},
)
"""Variables beside each preset and number of GPUs, of the training scripts."""


def record(product: Product) -> Facts:
    """Words of each printed command by script and variables; a refusal is its exit code."""
    folder = product.tree / "scripts/v1_5"
    facts: Facts = {}
    for path in sorted([*folder.glob("*.sh"), *folder.glob("eval/*.sh")]):
        if path.name in ("common.sh", "preflight.sh"):  # neither prints a command
            continue
        script = str(path.relative_to(folder))
        variables = [{"PRESET": preset, "NUM_GPUS": gpus} for preset in PRESETS for gpus in ("1", "8")]
        if path.parent == folder:
            variables += FURTHER
        words = ["checkpoints/model"] if path.parent != folder else []
        facts[script] = {
            " ".join(f"{key}={value}" for key, value in chosen.items()): _printed(product, script, words, chosen)
            for chosen in variables
        }
        facts[script]["--learning_rate 3e-4"] = _printed(product, script, [*words, "--learning_rate", "3e-4"], {})
    return facts


def _printed(product: Product, script: str, words: list[str], variables: dict[str, str]) -> list[str] | int:
    environment = {"CUDA_VISIBLE_DEVICES": "", "DRY_RUN": "1", **variables}
    done = product.run("bash", f"scripts/v1_5/{script}", *words, check=False, **environment)
    if done.returncode != 0:
        return done.returncode
    return [shlex.join(shlex.split(line)) for line in done.stdout.replace("\\\n", " ").splitlines()]
