"""Matching pursuit against the paper's loop, taken to the letter, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_aligned.analysis.matching_pursuit import WordDictionary, matching_pursuit


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def literal_loop(token: list[float], table: list[list[float]], rounds: int, unit: bool, absolute: bool):
    """Algorithm 1 for one token, in plain Python."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    residual, ids, coefficients, norms = list(token), [], [], [math.sqrt(dot(token, token))]
    for _ in range(rounds):
        best, best_score, best_word, best_product = -1, -math.inf, [], 0.0
        for index, row in enumerate(table):
            length = math.sqrt(dot(row, row))
            if length == 0:
                continue
            word = [value / length for value in row] if unit else row
            product = dot(word, residual)
            score = abs(product) if absolute else product
            if score > best_score:
                best, best_score, best_word, best_product = index, score, word, product
        residual = [value - best_product * other for value, other in zip(residual, best_word, strict=True)]
        ids.append(best)
        coefficients.append(best_product)
        norms.append(math.sqrt(dot(residual, residual)))
    return ids, coefficients, norms


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("unit", [True, False])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), rounds=st.integers(1, 5), chunk=st.integers(1, 50))
def test_pursuit_equals_the_literal_loop(unit: bool, absolute: bool, seed: int, rounds: int, chunk: int):
    tokens, table = noise(6, 8, seed=seed), noise(40, 8, seed=seed + 1) / 3
    table[seed % 40] = 0
    found = matching_pursuit(tokens, WordDictionary(table, unit_length=unit, chunk=chunk), rounds, absolute=absolute)
    for index, token in enumerate(tokens.tolist()):
        ids, coefficients, norms = literal_loop(token, table.tolist(), rounds, unit, absolute)
        assert found.ids[index].tolist() == ids
        assert found.coefficients[index].tolist() == pytest.approx(coefficients, abs=1e-6)
        assert found.residual_norms[index].tolist() == pytest.approx(norms, abs=1e-6)


def test_planted_words_are_recovered_with_their_coefficients():
    table = torch.linalg.qr(noise(64, 64)).Q[:40] * torch.linspace(0.1, 9, 40, dtype=torch.float64).unsqueeze(1)
    ids = torch.tensor([[3, 17, 8], [39, 0, 20]])
    weights = torch.tensor([[5.0, 2.0, 1.0], [0.9, 0.8, 0.7]], dtype=torch.float64)
    units = table / table.norm(dim=1, keepdim=True)
    found = matching_pursuit((weights.unsqueeze(-1) * units[ids]).sum(dim=1), table, rounds=3)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.coefficients, weights)
    torch.testing.assert_close(found.residual_norms[:, -1], torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.cosines[:, 0], weights[:, 0] / weights.norm(dim=1))
    torch.testing.assert_close(found.cosines[:, -1], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_residuals_never_grow(orthogonal: bool, absolute: bool):
    tokens = noise(50, 12)
    found = matching_pursuit(tokens, noise(200, 12, seed=1), rounds=8, absolute=absolute, orthogonal=orthogonal)
    torch.testing.assert_close(found.residual_norms[:, 0], tokens.norm(dim=1))
    assert (found.residual_norms.diff(dim=1) <= 1e-12).all()


@pytest.mark.parametrize("unit_length", [True, False])
def test_excluded_rows_are_as_if_they_were_not_there(unit_length: bool):
    tokens, table = noise(30, 16), noise(60, 16, seed=1)
    kept = [row for row in range(60) if row not in (0, 31, 59)]
    table[31] = 100 * tokens[0]
    dictionary = WordDictionary(table, unit_length=unit_length, excluded=[0, 31, 59, 400], chunk=7)
    found = matching_pursuit(tokens, dictionary)
    without = matching_pursuit(tokens, WordDictionary(table[kept], unit_length=unit_length))
    assert torch.equal(found.ids, torch.tensor(kept)[without.ids])
    torch.testing.assert_close(found.residual_norms, without.residual_norms)


def test_every_chunk_gives_the_same():
    tokens, table = noise(30, 16), noise(101, 16, seed=1)
    whole = matching_pursuit(tokens, WordDictionary(table, chunk=1000))
    for chunk in (1, 7, 100, 101):
        parts = matching_pursuit(tokens, WordDictionary(table, chunk=chunk))
        assert torch.equal(parts.ids, whole.ids)
        assert torch.equal(parts.coefficients, whole.coefficients)
        assert torch.equal(parts.residual_norms, whole.residual_norms)


@pytest.mark.parametrize("chunk", [1, 2, 3, 10])
@pytest.mark.parametrize("absolute", [False, True])
def test_of_equal_words_the_lower_id_wins(chunk: int, absolute: bool):
    table = torch.tensor([[0, 1.0], [2, 0], [4, 0], [0, 1], [1, 0]])
    found = matching_pursuit(torch.tensor([[3.0, 1], [1, 2]]), WordDictionary(table, chunk=chunk), 2, absolute=absolute)
    assert found.ids.tolist() == [[1, 0], [0, 1]]


def test_only_words_with_a_direction_that_the_tokenizer_knows_are_chosen():
    table = torch.tensor([[0.0, 0], [1, 1], [0, 0], [3, 0]])
    token = torch.tensor([[-1.0, -0.5]])
    assert matching_pursuit(token, table, 1).ids.tolist() == [[3]]
    assert matching_pursuit(token, WordDictionary(table, size=3), 1).ids.tolist() == [[1]]


def test_the_sign_counts_unless_magnitudes_are_asked_for():
    table = torch.tensor([[-1.0, 0], [0, 1]])
    token = torch.tensor([[5.0, 1]])
    assert matching_pursuit(token, table, 1).ids.tolist() == [[1]]
    by_magnitude = matching_pursuit(token, table, 1, absolute=True)
    assert (by_magnitude.ids.item(), by_magnitude.coefficients.item(), by_magnitude.residual_norms[0, 1].item()) == (
        0,
        -5,
        1,
    )


def test_the_orthogonal_variant_is_the_least_squares_fit_of_its_words():
    tokens, table = noise(20, 10), noise(60, 10, seed=1)
    units = table / table.norm(dim=1, keepdim=True)
    plain = matching_pursuit(tokens, table, 4)
    found = matching_pursuit(tokens, table, 4, orthogonal=True)
    assert torch.equal(found.ids[:, 0], plain.ids[:, 0])
    for index in range(20):
        words = units[found.ids[index]]
        fit = torch.linalg.lstsq(words.T, tokens[index].unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(found.coefficients[index], fit)
        residual = tokens[index] - fit @ words
        assert (words @ residual).abs().max() < 1e-10
        assert found.residual_norms[index, -1].item() == pytest.approx(residual.norm().item(), rel=1e-9)


def test_the_orthogonal_variant_stands_equal_words_and_empty_residuals():
    table = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    tokens = torch.tensor([[2.0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    found = matching_pursuit(tokens, table, 3, orthogonal=True)
    assert found.residual_norms[0].tolist() == pytest.approx([2, 0, 0, 0], abs=1e-12)
    assert torch.isfinite(found.coefficients).all()
    assert found.cosines[1].tolist() == [0, 0, 0]


def test_half_precision_is_computed_in_float32():
    tokens, table = noise(9, 16).bfloat16(), noise(50, 16, seed=1).bfloat16()
    found, reference = matching_pursuit(tokens, table), matching_pursuit(tokens.double(), table)
    assert found.coefficients.dtype == torch.float32
    assert torch.equal(found.ids, reference.ids)
    torch.testing.assert_close(found.residual_norms.double(), reference.residual_norms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordDictionary(torch.ones(5, 2), size=6), "tokenizer knows 6 words, but the table has 5 rows"),
        (lambda: WordDictionary(torch.zeros(5, 2)), "All 5 word embeddings are zero"),
        (lambda: WordDictionary(torch.tensor([[1.0], [math.nan]])), "Row 1 of the word embeddings"),
        (lambda: WordDictionary(torch.ones(5, 2, dtype=torch.long)), "floating"),
        (lambda: WordDictionary(torch.ones(5, 2), chunk=0), "at least one word"),
        (lambda: matching_pursuit(torch.ones(3, 4), torch.ones(5, 2)), r"\[3, 4\] do not fit words of width 2"),
        (lambda: matching_pursuit(torch.full((1, 2), math.inf), torch.ones(5, 2)), "NaN or infinity"),
        (lambda: matching_pursuit(torch.ones(1, 2), torch.ones(5, 2), rounds=0), "at least one round"),
    ],
)
def test_what_cannot_be_decomposed_says_why(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
