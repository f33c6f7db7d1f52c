"""`--profile N`: where the time of a step goes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llava.plugin import AuxiliaryOutput, TrainingPlugin
from llava.train.profiling import table_of_parts
from tests.training import logged


class SquaresPlugin(TrainingPlugin):
    def auxiliary_losses(self, context: Any, batch: Any) -> AuxiliaryOutput:
        return AuxiliaryOutput({"squares": context.visual_tokens.square().mean()}, {})

    def loss_weights(self, progress: float) -> dict[str, float]:
        return {"squares": 1.0}


def test_a_profiled_run_trains_the_same_and_writes_table_and_trace(run_stage_1: Any) -> None:
    plain = run_stage_1("plain", plugin=SquaresPlugin())
    profiled = run_stage_1("profiled", "--profile 2", plugin=SquaresPlugin())
    assert logged(profiled) == logged(plain)
    table = Path("profiled/profile/table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    parts = {name: float(share.rstrip("%")) for name, _, share in rows[1:]}
    assert {"data", "tower", "projector", "plugin's losses", "LLM", "loss", "backward", "optimizer"} < parts.keys()
    assert sum(parts.values()) == pytest.approx(100, abs=1)
    assert min(parts.values()) >= 0 and parts["LLM"] > parts["projector"] > 0
    assert "aten::" in table  # what the operators take
    trace = json.loads(gzip.decompress(Path("profiled/profile/trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")}
    assert len(steps) == 2


def test_a_run_with_too_few_steps_is_refused(run_stage_1: Any) -> None:
    with pytest.raises(ValueError, match="--profile 4: found 5 steps to train"):
        run_stage_1("run", "--profile 4")


def test_parts_are_what_is_left_of_their_wholes() -> None:
    inner = {"tower": 10.0, "projector": 1.0, "LLM": 20.0, "loss": 4.0}
    times = inner | {"forward": 40.0, "data": 2.0, "backward": 50.0, "optimizer": 3.0, "ProfilerStep#3": 100.0}
    lines = table_of_parts(times).splitlines()
    assert "| merge, rest of forward | 5.0 | 5.0% |" in lines
    assert "| rest of the step | 5.0 | 5.0% |" in lines
    assert len(lines) == 2 + len(times)
