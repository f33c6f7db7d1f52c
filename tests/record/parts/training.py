"""Losses, saved tensors and files of the training scripts, with tiny weights and PRESET=mini.

`pretrain`, `finetune` and `finetune_lora` train without a plugin: theirs are the losses with `plugin=None`.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from product import Facts, Product

PLAIN = ("pretrain", "pretrain_patchaligned", "finetune", "finetune_lora")
BATCH_OF_2 = {"PER_DEVICE_TRAIN_BATCH_SIZE": "2", "GLOBAL_BATCH_SIZE": "8"}
TILES = ("--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad",
         "--image_grid_pinpoints", "[(56, 112), (112, 56), (112, 112)]")  # fmt: skip
_PORT = count(29610)


def record(product: Product) -> Facts:
    """All runs of the quick part, or of the whole."""
    runs: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {name: (f"{name}.sh", (), {}) for name in PLAIN}
    runs["accumulation"] = ("pretrain_patchaligned.sh", (), BATCH_OF_2)
    runs["tiles"] = ("pretrain_patchaligned.sh", TILES, {"MAX_STEPS": "6"})
    if product.whole:
        runs |= _slow_runs()
    return {name: _run(product, name, *run) for name, run in runs.items()}


def _slow_runs() -> dict[str, tuple[str, tuple[str, ...], dict[str, str]]]:
    runs: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {}
    zero = {name: ("--deepspeed", f"./scripts/{name}.json") for name in ("zero2", "zero3")}
    for script in PLAIN:
        name = f"{script}.sh"
        runs[f"{script}, accumulation"] = (name, (), BATCH_OF_2)
        runs[f"{script}, two processes"] = (name, (), {"NUM_GPUS": "2"})
        runs[f"{script}, zero3"] = (name, zero["zero3"], {"NUM_GPUS": "2"})
        runs[f"{script}, tiles"] = (name, TILES, {})
        runs[f"{script}, bfloat16"] = (name, ("--bf16", "True"), {})
    runs["pretrain_patchaligned, zero2"] = ("pretrain_patchaligned.sh", zero["zero2"], {"NUM_GPUS": "2"})
    runs["pretrain_patchaligned, beta 0"] = ("pretrain_patchaligned.sh", ("--patch_beta_end", "0"), {})
    runs["pretrain_patchaligned, pad"] = ("pretrain_patchaligned.sh", ("--image_aspect_ratio", "pad"), {})
    for projector in ("linear", "cabstractor"):
        flags = ("--mm_projector_num_queries", "4") if projector == "cabstractor" else ()
        runs[f"pretrain_patchaligned, {projector}"] = ("pretrain_patchaligned.sh", flags, {"PROJECTOR": projector})
    return runs


def _run(product: Product, name: str, script: str, flags: tuple[str, ...], variables: dict[str, Any]) -> Facts:
    if variables.get("NUM_GPUS") == "2":
        variables = {**variables, "MASTER_PORT": str(next(_PORT))}
    output = product.train(script, name.replace(", ", "-").replace(" ", "_"), *flags, **variables)
    return product.folder(output)
