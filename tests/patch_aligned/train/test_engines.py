"""Attached to a trainer of two processes, the patch loss is that of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.patch_aligned.train.attached_run import NAME, logged, settings
from tests.patch_aligned.train.world import metrics_of, trainer_of
from tests.training import run_in_two_processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: Any) -> Path:
    pytest.importorskip("deepspeed", reason="deepspeed is part of the extra `train`")
    folder = tmp_path_factory.mktemp("engines")
    run_in_two_processes(str(Path(__file__).with_name("attached_run.py")), str(folder))
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: Any) -> Any:
    """Two micro-batches a step instead of two ranks."""
    trainer = trainer_of(NAME, tmp_path_factory.mktemp("one"), gradient_accumulation_steps=2, **settings())
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_ranks_train_as_two_micro_batches(engine: str, two_processes: Path, one_process: Any) -> None:
    found = json.loads((two_processes / f"{engine}.json").read_text())
    assert found.pop("split", True) and found.pop("wrapped", "DistributedDataParallel") == "DistributedDataParallel"
    for name, values in logged(one_process).items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.slow
def test_fully_sharded_gradients_are_those_of_one_process(two_processes: Path, tmp_path: Path) -> None:
    found = json.loads((two_processes / "fsdp2.json").read_text())
    assert found["split"]
    trainer = trainer_of(NAME, tmp_path, **settings())
    trainer.state.global_step, trainer.state.max_steps = 1, 2
    rows = settings()["rows"]
    for start in (0, 2, 4, 6):
        (trainer.compute_loss(trainer.model, trainer.data_collator(rows[start : start + 2])) / 2).backward()
    patch = metrics_of(trainer)["loss/patch"]
    assert found["loss/patch"] == pytest.approx(patch, rel=1e-5)
    gradients = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    for rank in range(2):
        sharded = torch.load(two_processes / f"gradients_{rank}.pt")
        assert sharded.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(sharded[name], gradient, rtol=1e-4, atol=1e-6)
