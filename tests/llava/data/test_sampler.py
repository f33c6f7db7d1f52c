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
