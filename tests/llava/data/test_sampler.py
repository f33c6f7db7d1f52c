"""Orders of samples against upstream's, index for index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.data.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    micro_steps_of_kinds,
    mix_kinds,
    split_to_even_chunks,
)

FUNCTIONS = {"modality": get_modality_length_grouped_indices, "length": get_length_grouped_indices}
SIGNED_LENGTHS = st.lists(st.integers(-90, 90).filter(bool), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "g_sampler.json").read_text())


@pytest.mark.golden
@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_orders_are_upstreams(recorded: dict[str, Any], kind: Any) -> None:
    mixed = recorded["mixed_lengths"]
    positive = [abs(length) for length in mixed]
    lengths = {"mixed": mixed, "allmm": positive, "alltext": [-length for length in positive]}
    for case in recorded["cases"]:
        torch.manual_seed(case["seed"] + 100)
        generator = torch.Generator().manual_seed(case["seed"])
        order = FUNCTIONS[case["fn"]](kind(lengths[case["lengths"]]), case["batch"], case["world"], generator=generator)
        assert order == case["order"], case


@pytest.mark.golden
def test_sampler_follows_the_global_seed(recorded: dict[str, Any]) -> None:
    sampler = LengthGroupedSampler(4, 2, lengths=recorded["mixed_lengths"], group_by_modality=True)
    torch.manual_seed(5)
    assert list(sampler) == recorded["sampler_global_seed5"]
    assert list(sampler) != recorded["sampler_global_seed5"]  # the next epoch has an order of its own
    assert len(sampler) == len(recorded["mixed_lengths"])


@pytest.mark.golden
def test_even_chunks_are_upstreams(recorded: dict[str, Any]) -> None:
    even, uneven = recorded["split_to_even_chunks"]
    assert split_to_even_chunks(list(range(8)), [9, 1, 5, 5, 3, 7, 2, 8], 2) == even
    assert split_to_even_chunks(list(range(7)), [9, 1, 5, 5, 3, 7, 2], 2) == uneven


@given(lengths=SIGNED_LENGTHS, batch_size=st.integers(1, 4), world_size=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_sample_comes_once_and_only_the_last_batch_may_mix(
    lengths: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    order = get_modality_length_grouped_indices(lengths, batch_size, world_size)
    assert sorted(order) == list(range(len(lengths)))
    size = batch_size * world_size
    images = sum(length > 0 for length in lengths)
    # Of each kind the last batch, whole or not, is left over; alone, a kind has nothing to be mixed with.
    kinds = (images, len(lengths) - images)
    whole = sum(max((count - 1) // size, 0) for count in kinds) if all(kinds) else len(lengths) // size
    for number in range(whole):
        batch = order[number * size : (number + 1) * size]
        assert len({lengths[index] > 0 for index in batch}) == 1


def test_a_length_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\]: found 0"):
        get_modality_length_grouped_indices([3, 0, -2], 1, 1)


def test_a_sampler_without_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths: found None"):
        LengthGroupedSampler(1, 1)


@given(text=st.integers(0, 20), auxiliary=st.integers(1, 20), size=st.integers(1, 6), ratio=st.none() | st.floats(0, 3))
def test_each_micro_step_is_of_one_kind_and_loses_no_sample(
    text: int, auxiliary: int, size: int, ratio: float | None
) -> None:
    order = mix_kinds(range(text), range(100, 100 + auxiliary), size, ratio)
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    kinds = [{index >= 100 for index in step} for step in steps]
    assert all(len(step) == size and len(kind) == 1 for step, kind in zip(steps, kinds, strict=True))
    counts = kinds.count({False}), kinds.count({True})
    assert counts == micro_steps_of_kinds(text, auxiliary, size, ratio)
    assert set(range(text)) <= set(order)
    if ratio is None or not text:
        assert {*range(text), *range(100, 100 + auxiliary)} == set(order)
    else:
        assert counts[1] == round(ratio * counts[0])


def test_both_kinds_are_spread_evenly() -> None:
    assert mix_kinds([0, 1, 2], [7, 8, 9], 1, None) == [0, 7, 1, 8, 2, 9]
    assert mix_kinds([0, 1], [7, 8, 9], 1, 2.0) == [7, 0, 8, 9, 1, 7]
    assert mix_kinds([0, 1, 2, 3], [7, 8], 2, 0.5) == [0, 1, 7, 8, 2, 3]
