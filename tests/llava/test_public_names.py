"""Upstream's public names that mean something else here."""

from __future__ import annotations

import pytest
import torch

import llava.model
from llava.utils import disable_torch_init


def test_disable_torch_init_leaves_later_layers_initialised() -> None:
    reset = torch.nn.Linear.reset_parameters
    disable_torch_init()
    assert torch.nn.Linear.reset_parameters is reset
    torch.manual_seed(0)
    first = torch.nn.Linear(4, 4).weight
    torch.manual_seed(0)
    torch.testing.assert_close(torch.nn.Linear(4, 4).weight, first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["LlavaMptForCausalLM", "LlavaMptConfig"])
def test_mpt_names_say_that_they_are_gone(name: str) -> None:
    with pytest.raises(ImportError, match="MPT"):
        getattr(llava.model, name)
