"""Trains a tiny model by DDP, FSDP2 and ZeRO-3, one after the other. Started by torchrun.

usage: attached_run.py FOLDER

Writes `<FOLDER>/<engine>.json`: losses, and whether weights are split over the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

if __name__ == "__main__":  # other packages have a folder of this name too
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).parents[2])]

from tests.patch_aligned.train.world import metrics_of, trainer_of, uneven_rows

NAME = "qwen2_5_vl"


def settings() -> dict[str, Any]:
    return {
        "rows": uneven_rows(NAME),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "beta": (1, 5),
        "learning_rate": 1e-3,
    }


def write(folder: Path, engine: str, values: dict[str, Any]) -> None:
    if os.environ["RANK"] == "0":
        (folder / f"{engine}.json").write_text(json.dumps(values))


def logged(trainer: Any) -> dict[str, list[float]]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in entries] for name in ("loss", "loss/caption", "loss/patch")}


def run_ddp(folder: Path) -> None:
    trainer = trainer_of(NAME, folder, ddp_backend="gloo", **settings())
    trainer.train()
    write(folder, "ddp", logged(trainer) | {"wrapped": type(trainer.model_wrapped).__name__})


def run_fsdp2(folder: Path) -> None:
    """The loss inside of `fully_shard`, whose gradients are those of the mean over both ranks."""
    trainer = trainer_of(NAME, folder, ddp_backend="gloo", **settings())
    model, mesh = trainer.model, init_device_mesh("cpu", (2,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = int(os.environ["RANK"])
    for step in range(2):  # in the second, rank 1 has no region
        rows = settings()["rows"][4 * step + 2 * rank : 4 * step + 2 * rank + 2]
        trainer.state.global_step, trainer.state.max_steps = 1, 2  # beta 5
        trainer.compute_loss(model, trainer.data_collator(rows)).backward()
    patch = metrics_of(trainer)["loss/patch"]
    weights = [weight for weight in model.parameters() if weight.numel() > 2]
    is_split = all(isinstance(one, DTensor) and one.to_local().numel() < one.numel() for one in weights)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    write(folder, "fsdp2", {"loss/patch": patch, "split": is_split})
    torch.save(whole, folder / f"gradients_{rank}.pt")


def run_zero3(folder: Path) -> None:
    batch = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = folder / "zero3_config.json"
    config.write_text(json.dumps(dict.fromkeys(batch, "auto") | {"zero_optimization": zero}))
    torch.distributed.barrier()
    trainer = trainer_of(NAME, folder, deepspeed=str(config), **settings())
    trainer.train()
    weights: list[Any] = [weight for weight in trainer.model.parameters() if weight.ds_numel > 2]
    is_split = all(weight.ds_tensor.numel() < weight.ds_numel for weight in weights)
    write(folder, "zero3", logged(trainer) | {"split": is_split})


if __name__ == "__main__":
    for run in (run_ddp, run_fsdp2, run_zero3):
        run(Path(sys.argv[1]))
