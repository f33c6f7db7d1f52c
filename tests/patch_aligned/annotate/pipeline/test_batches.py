"""Running a stage in batches: what is too large is halved, and what breaks leaves the others alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from patch_aligned.annotate.pipeline import Failure, is_out_of_memory, run_in_batches
from patch_aligned.annotate.regions import NonFiniteScoresError


def test_batches_are_full_and_in_order() -> None:
    sizes: list[int] = []

    def stage(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        return [item * 10 for item in batch]

    assert list(run_in_batches(stage, list(range(7)), 3)) == [0, 10, 20, 30, 40, 50, 60]
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=["cuda", "python", "cpu", "cublas"],
)
def test_a_batch_that_does_not_fit_is_halved_and_an_item_that_does_not_fit_alone_fails(error: Exception) -> None:
    sizes: list[int] = []

    def stage(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2 or 5 in batch:
            raise error
        return list(batch)

    outcomes = list(run_in_batches(stage, list(range(8)), 8))
    assert outcomes[:5] + outcomes[6:] == [0, 1, 2, 3, 4, 6, 7]
    assert outcomes[5] == Failure("out_of_memory", "does not fit in memory, even alone")
    assert sizes == [8, 4, 2, 2, 4, 2, 1, 1, 2]


def test_items_whose_scores_are_not_finite_fail_alone() -> None:
    calls: list[list[int]] = []

    def stage(batch: Sequence[int]) -> list[int]:
        calls.append(list(batch))
        if broken := [position for position, item in enumerate(batch) if item < 0]:
            raise NonFiniteScoresError("RAM", broken)
        return list(batch)

    outcomes = list(run_in_batches(stage, [1, -1, 2, -2], 4))
    assert [outcome.status if isinstance(outcome, Failure) else outcome for outcome in outcomes] == [
        1, "non_finite", 2, "non_finite",
    ]  # fmt: skip
    assert calls == [[1, -1, 2, -2], [1, 2]]
    assert [failure.status for failure in list(run_in_batches(stage, [-1], 4)) if isinstance(failure, Failure)] == [
        "non_finite"
    ]


def test_other_errors_are_not_hidden() -> None:
    def stage(batch: Sequence[int]) -> list[int]:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(run_in_batches(stage, [1], 1))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
