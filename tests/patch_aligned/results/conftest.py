from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patch_aligned.results.run import (
    Harness,
    ModelIdentity,
    RunData,
    RunResult,
    RunSettings,
    Sample,
    Score,
    rows_sha256,
    write_run,
)

SETTINGS = RunSettings(
    prompt="USER: <image>\nPlease provide the bounding box coordinate of the region this sentence describes: a cat",
    conversation="vicuna_v1",
    box_frame="square",
    dtype="float16",
    batch_size=8,
    seed=0,
    temperature=0.0,
    max_new_tokens=32,
    num_processes=1,
    limit=None,
    judge=None,
)


def samples_of(scores: dict[str, Sequence[float]], first_id: int = 0) -> list[Sample]:
    """Samples with given scores: `samples_of({"metric": [1, 0, 1]})`."""
    count = len(next(iter(scores.values())))
    return [
        Sample(
            str(first_id + row),
            f"question {row}",
            f"answer {row}",
            [0.1, row],
            {name: values[row] for name, values in scores.items()},
        )
        for row in range(count)
    ]


def result_of(samples: Sequence[Sample], scores: dict[str, Score], **changes: Any) -> RunResult:
    """A result that fits some samples: `result_of(samples, {"metric": Score(...)}, column=...)`."""
    result = RunResult(
        benchmark="refcoco_val",
        tables=(5,),
        column="RefCOCO val",
        task="pa_refcoco_val",
        model=ModelIdentity("plain", "runs/plain", "0" * 64),
        harness=Harness("lmms-eval", "0.7.3"),
        libraries={"torch": "2.14.1"},
        settings=SETTINGS,
        data=RunData("refs(unc).p", None, "val", len(samples), rows_sha256((s.id, s.target) for s in samples)),
        headline=next(iter(scores), None),
        scores=scores,
    )
    return replace(result, **changes)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run with one score by row: `make_run("out/name", {"metric": [1, 0, 1]}, column=..., model=...)`."""

    def make(
        name: str, rows: dict[str, Sequence[float]], unit: str = "share", first_id: int = 0, **changes: Any
    ) -> Path:
        samples = samples_of(rows, first_id)
        scores = {
            metric: Score(sum(values) / len(values), 0.01, len(values), unit)  # type: ignore[arg-type]
            for metric, values in rows.items()
        }
        folder = tmp_path / name
        write_run(folder, result_of(samples, scores, **changes), samples)
        return folder

    return make
