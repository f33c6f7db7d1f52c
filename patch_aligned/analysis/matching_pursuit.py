"""Matching pursuit: the words that a visual token is made of (the paper's Algorithm 1), for all tokens at once.

In each round every token takes the word embedding that has the largest inner product with what is left of it, and loses
its projection on that word. The paper writes the projection as `<w, v> w`, which it is only for a `w` of length one, so
words are scaled to unit length here; `unit_length=False` takes the algorithm to the letter.

The largest product is the signed one, as in the algorithm, so that a word that points away from a token does not
describe it; `absolute=True` takes the largest magnitude, as matching pursuit does elsewhere.

Letters: S visual tokens, D width of the LLM, M vocabulary, C words of a chunk, K rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class WordDictionary:
    """The words that a pursuit chooses from: rows of the LLM's table of word embeddings.

    Rows of norm zero are never chosen: they have no direction. Neither are rows beyond `size`, the padding that many
    tables end with. The table is read in chunks and never copied as a whole.

    Args:
        table: `[M, D]`, any floating dtype. On the device where the pursuit runs, or each round moves it there.
        size: words that the tokenizer knows; the rest of the table is left out. None takes all rows.
        unit_length: scale the words to length one.
        excluded: ids of other rows that are never chosen.
        chunk: C, words that are compared at a time. It bounds the memory and changes nothing else.

    Raises:
        ValueError: `size` is not in 1..M, a row is not finite, or all rows are zero.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        size: int | None = None,
        unit_length: bool = True,
        excluded: Sequence[int] = (),
        chunk: int = 2048,
    ):
        if table.ndim != 2 or not table.is_floating_point():
            raise ValueError(f"Expected a table [M, D] of floating numbers, got {list(table.shape)} of {table.dtype}.")
        size = len(table) if size is None else size
        if not 1 <= size <= len(table):
            raise ValueError(
                f"The tokenizer knows {size} words, but the table has {len(table)} rows: they do not belong together."
            )
        if chunk < 1:
            raise ValueError(f"The chunk must hold at least one word, got {chunk}.")
        self.table, self.unit_length, self.chunk = table.detach()[:size], unit_length, chunk
        parts = self.table.split(chunk)
        self._norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=_precise(part)) for part in parts])  # [M]
        if not torch.isfinite(self._norms).all():
            first = int((~torch.isfinite(self._norms)).nonzero()[0])
            raise ValueError(f"Row {first} of the word embeddings holds NaN or infinity: the weights are broken.")
        self._norms[[row for row in excluded if row < size]] = 0  # as if they had no direction
        if not self._norms.any():
            raise ValueError(f"All {size} word embeddings are zero: no word can be chosen.")
        self._has_zero = not bool(self._norms.all())

    def __len__(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int:
        """D, the width of a word embedding."""
        return self.table.shape[1]

    def words(self, ids: Tensor, like: Tensor) -> Tensor:
        """The words as the pursuit subtracts them: ids `[...]` -> `[..., D]`, in dtype and on device of `like`."""
        ids = ids.to(self.table.device)
        rows = self.table[ids].to(like)
        return rows / self._norms[ids].to(like).unsqueeze(-1) if self.unit_length else rows

    def best(self, residuals: Tensor, absolute: bool) -> Tensor:
        """Ids `[S]` of the words whose inner product with `[S, D]` is largest (in magnitude, if `absolute`).

        Among equal products the lower id wins.
        """
        largest = residuals.new_full((len(residuals),), -torch.inf)
        ids = torch.zeros(len(residuals), dtype=torch.long, device=residuals.device)
        for start in range(0, len(self), self.chunk):
            norms = self._norms[start : start + self.chunk].to(residuals)  # [C]
            products = residuals @ self.table[start : start + self.chunk].to(residuals).T  # [S, C]
            if absolute:
                products.abs_()
            if self.unit_length:
                products /= norms
            if self._has_zero:
                products.masked_fill_(norms == 0, -torch.inf)
            # The first of equal values in a chunk, and a later chunk only where it is larger: the lower id.
            value, place = products.max(dim=1)  # [S], [S]
            ids = torch.where(value > largest, place + start, ids)
            largest = torch.maximum(value, largest)
        return ids


@dataclass(frozen=True)
class Pursuit:
    """The words of each visual token, in the order in which they were chosen."""

    ids: Tensor  # [S, K] int64, rows of the table
    coefficients: Tensor  # [S, K], what each word (of unit length, unless unscaled) contributes to the token
    cosines: Tensor  # [S, K], of the word with what was left of the token at that round; 0 where nothing was left
    residual_norms: Tensor  # [S, K + 1], length of what is left: of the token itself, then after each round


@torch.no_grad()
def matching_pursuit(
    visual_tokens: Tensor,
    dictionary: WordDictionary | Tensor,
    rounds: int = 5,
    *,
    absolute: bool = False,
    orthogonal: bool = False,
) -> Pursuit:
    """Decompose visual tokens into words (Algorithm 1), in float32, or in float64 where the tokens are float64.

    Args:
        visual_tokens: `[S, D]`; the pursuit runs on their device.
        dictionary: the words, or a table `[M, D]` of which all rows are words, scaled to unit length.
        rounds: K, words a token.
        absolute: choose by the magnitude of the inner product, not by the signed value.
        orthogonal: after each round refit all chosen words by least squares (orthogonal matching pursuit): the residual
            is orthogonal to all of them. `coefficients` are then those of the last fit.

    Raises:
        ValueError: shapes do not fit, a token is not finite, or `rounds` is below 1.
    """
    words = dictionary if isinstance(dictionary, WordDictionary) else WordDictionary(dictionary)
    if visual_tokens.ndim != 2 or visual_tokens.shape[1] != words.width:
        raise ValueError(
            f"Visual tokens {list(visual_tokens.shape)} do not fit words of width {words.width}: expected [S, D]."
        )
    if rounds < 1:
        raise ValueError(f"A pursuit takes at least one round, got {rounds}.")
    tokens = visual_tokens.to(_precise(visual_tokens))  # [S, D]
    if not torch.isfinite(tokens).all():
        raise ValueError("The visual tokens hold NaN or infinity; they cannot be decomposed.")

    residuals = tokens.clone()
    ids, coefficients, cosines = [], [], []
    norms = [torch.linalg.vector_norm(residuals, dim=1)]  # [S]
    for _ in range(rounds):
        ids.append(words.best(residuals, absolute))
        chosen = words.words(ids[-1], like=tokens)  # [S, D]
        products = (chosen * residuals).sum(dim=1)  # [S]
        lengths = torch.linalg.vector_norm(chosen, dim=1) * norms[-1]
        cosines.append(torch.where(lengths > 0, products / lengths, 0))
        coefficients.append(products)
        if orthogonal:
            chosen = words.words(torch.stack(ids, dim=1), like=tokens)  # [S, k, D]
            coefficients = list(_least_squares(chosen, tokens).unbind(dim=1))
            residuals = tokens - (torch.stack(coefficients, dim=1).unsqueeze(1) @ chosen).squeeze(1)
        else:
            residuals = residuals - products.unsqueeze(1) * chosen
        norms.append(torch.linalg.vector_norm(residuals, dim=1))
    columns = (torch.stack(part, dim=1) for part in (ids, coefficients, cosines, norms))
    return Pursuit(*columns)


def _least_squares(chosen: Tensor, tokens: Tensor) -> Tensor:
    """Coefficients `[S, k]` of the words `[S, k, D]` nearest to the tokens `[S, D]`; words may be dependent."""
    wide, target = chosen.double(), tokens.double().unsqueeze(-1)  # float64: the Gram matrix squares the condition
    gram = wide @ wide.mT  # [S, k, k]
    return (torch.linalg.pinv(gram, hermitian=True) @ (wide @ target)).squeeze(-1).to(tokens)


def _precise(values: Tensor) -> torch.dtype:
    """float32 for half precision."""
    return torch.promote_types(values.dtype, torch.float32)
