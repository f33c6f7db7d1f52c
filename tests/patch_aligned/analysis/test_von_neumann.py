"""The entropy against closed forms, and the stream against all tokens at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patch_aligned.analysis.entropy import EntropyAccumulator

WIDTH = 12


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy_nats(tokens: torch.Tensor) -> float:
    seen = EntropyAccumulator(tokens.shape[-1])
    seen.update(tokens)
    return seen.entropy_nats()


def test_tokens_on_one_line_have_no_entropy():
    direction = random_tokens(1, WIDTH)
    tokens = random_tokens(50, 1, seed=1) * direction  # both signs: uncentred, so the sign does not matter
    assert entropy_nats(tokens) == pytest.approx(0, abs=1e-12)


def test_isotropic_tokens_reach_the_log_of_the_width():
    assert entropy_nats(3 * torch.eye(WIDTH)) == pytest.approx(math.log(WIDTH), rel=1e-12)


def test_two_directions_with_known_energies_give_their_binary_entropy():
    tokens = torch.tensor([[math.sqrt(3.0), 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)  # energies 3 : 1
    assert entropy_nats(tokens) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-12)


def test_the_mean_is_not_taken_out():
    """A common offset counts: centred tokens would give log 2 here."""
    offset = torch.tensor([[1000.0, 0.0, 0.0]], dtype=torch.float64)
    tokens = offset + torch.tensor([[0.0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=torch.float64)
    assert entropy_nats(tokens) < 1e-4


def test_rotation_and_scale_do_not_change_the_entropy():
    tokens = random_tokens(40, WIDTH) * torch.linspace(0.1, 2, WIDTH, dtype=torch.float64)
    rotation = torch.linalg.qr(random_tokens(WIDTH, WIDTH, seed=2)).Q
    assert entropy_nats(7 * tokens @ rotation) == pytest.approx(entropy_nats(tokens), rel=1e-12)


def test_entropy_equals_that_of_numpys_singular_values():
    tokens = random_tokens(30, WIDTH) * torch.linspace(0.1, 2, WIDTH, dtype=torch.float64)
    energies = np.linalg.svd(tokens.numpy(), compute_uv=False) ** 2
    shares = energies / energies.sum()
    accumulator = EntropyAccumulator(WIDTH)
    accumulator.update(tokens)
    assert accumulator.entropy_nats() == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    assert accumulator.effective_rank() == pytest.approx(math.exp(accumulator.entropy_nats()), rel=1e-12)
    np.testing.assert_allclose(accumulator.spectrum().numpy(), shares, rtol=1e-10)


def test_streaming_equals_one_shot():
    tokens = random_tokens(4, 9, WIDTH).float()
    whole, streamed = EntropyAccumulator(WIDTH), EntropyAccumulator(WIDTH)
    whole.update(tokens)
    for part in (tokens[0], tokens[1], tokens[2:]):
        streamed.update(part)
    assert streamed.token_count == whole.token_count == 36
    assert streamed.entropy_nats() == pytest.approx(whole.entropy_nats(), rel=1e-12)


def test_sums_are_taken_in_double_precision():
    """In float32 the second direction, 1e-9 of the energy, would drown in the sum."""
    tokens = torch.zeros(1000, 2)
    tokens[:, 0] = 1
    tokens[500, 1] = 1e-3
    small = 1e-6 / 1000 * (1 - 1 / 1000)  # of a 2 x 2 matrix: its determinant over its trace, and that over the trace
    accumulator = EntropyAccumulator(2)
    for token in tokens:
        accumulator.update(token)
    assert float(accumulator.spectrum()[1]) == pytest.approx(small, rel=1e-5)  # double rounds the sum to 1e-7 of it


def test_undefined_entropies_say_why():
    accumulator = EntropyAccumulator(WIDTH)
    with pytest.raises(ValueError, match="no token was seen"):
        accumulator.entropy_nats()
    accumulator.update(torch.zeros(5, WIDTH))
    with pytest.raises(ValueError, match="all 5 tokens are zero"):
        accumulator.spectrum()
    with pytest.raises(ValueError, match=r"width 3.*width 12"):
        accumulator.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        accumulator.update(torch.full((1, WIDTH), torch.nan))
