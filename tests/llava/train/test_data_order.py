"""The order of the data is a function of seed and epoch alone."""

from __future__ import annotations

import pytest
import torch

from llava.data.sampler import EpochSampler
from llava.train.llava_trainer import MetricWindow


def sampler(seed: int = 0) -> EpochSampler:
    return EpochSampler(lambda: torch.randperm(50).tolist(), 50, seed)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = sampler().order(3)
    torch.manual_seed(2)
    assert sampler().order(3) == first
    assert sampler().order(4) != first
    assert sampler(seed=9).order(3) != first
    assert sorted(first) == list(range(50))


def test_drawing_leaves_all_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator is seeded"))
    sampler().order(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_fingerprints_mean_equal_orders() -> None:
    assert sampler().fingerprint(1) == sampler().fingerprint(1)
    assert sampler().fingerprint(1) != sampler().fingerprint(2)


def test_iteration_follows_the_epoch() -> None:
    samples = sampler()
    samples.set_epoch(6)
    assert list(samples) == samples.order(6)


def test_means_go_over_ranks_and_leave_nan_out() -> None:
    here, there = MetricWindow(), MetricWindow()
    here.add({"a": 1.0, "b": float("nan")})
    here.add({"a": 2.0, "b": float("nan")})
    there.add({"a": torch.tensor(6.0), "c": 4.0})
    means = here.drain(lambda sums: [sums, there.sums()])
    assert means == {"a": 3.0, "c": 4.0}
    assert here.drain(lambda sums: [sums]) == {}


def test_a_restored_window_goes_on_where_it_was() -> None:
    window, resumed = MetricWindow(), MetricWindow()
    window.add({"a": 0.1})
    resumed.restore(window.sums())
    for each in (window, resumed):
        each.add({"a": torch.tensor(0.2)})
    assert window.sums() == resumed.sums()
