"""Von Neumann entropy of a set of tokens: how many directions they spread over (the paper's Definition 3.1).

The tokens' uncentred second moment, divided by its trace, has eigenvalues that sum to one like probabilities; their
Shannon entropy is the measure. Tokens that all point along one line give 0, tokens spread evenly over `d` dimensions
give `log d`. The moment is `d x d` however many tokens there are, so any number of images streams through.

Letters: N tokens, d width of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class EntropyAccumulator:
    """Second moment of a stream of tokens, in float64, and the entropy of its spectrum.

    float64, because the sum runs over millions of tokens and small eigenvalues matter to the entropy.

    Args:
        width: `d`, the tokens' last dimension.
        device: where the `[d, d]` moment lives and is added up; the tokens are moved there.
    """

    def __init__(self, width: int, device: torch.device | str | None = None):
        if width < 1:
            raise ValueError(f"The width of a token must be at least 1, got {width}.")
        self.width = width
        self.token_count = 0
        self.moment = torch.zeros(width, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Adds tokens.

        Args:
            tokens: `[..., d]`, any floating dtype; the leading dimensions do not matter.

        Raises:
            ValueError: the width is another than the accumulator's, or a value is not finite.
        """
        if tokens.shape[-1] != self.width:
            raise ValueError(
                f"Tokens of shape {list(tokens.shape)} have width {tokens.shape[-1]}; this entropy is taken over "
                f"width {self.width}."
            )
        rows = tokens.reshape(-1, self.width).to(self.moment)  # [..., d] -> [N, d]
        update = rows.T @ rows  # [d, d]
        if not torch.isfinite(update.diagonal()).all():
            raise ValueError(f"Tokens of shape {list(tokens.shape)} hold NaN or infinity: their entropy is undefined.")
        self.moment += update
        self.token_count += len(rows)

    def spectrum(self) -> Tensor:
        """Eigenvalues of the moment divided by its trace: `[d]`, float64, falling, not negative, sum 1.

        Raises:
            ValueError: no token was seen, or all were zero.
        """
        trace = self.moment.trace()
        if self.token_count == 0 or trace == 0:
            seen = "no token was seen" if self.token_count == 0 else f"all {self.token_count} tokens are zero"
            raise ValueError(f"The entropy is undefined: {seen}.")
        eigenvalues = torch.linalg.eigvalsh(self.moment / trace).flip(0).clamp_min(0)  # [d], rounding may give -1e-17
        return eigenvalues / eigenvalues.sum()

    def entropy_nats(self) -> float:
        """`-sum lambda log lambda` over the spectrum, in nats: 0 for rank one, at most `log d`."""
        return float(torch.special.entr(self.spectrum()).sum())

    def effective_rank(self) -> float:
        """`exp(entropy)`: the number of equally used directions that would have the same entropy."""
        return math.exp(self.entropy_nats())
