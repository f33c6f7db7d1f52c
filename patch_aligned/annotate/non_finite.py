"""Images for which a model computed no finite numbers."""

from __future__ import annotations


class NonFiniteScoresError(ArithmeticError):
    """Images whose scores or boxes are not finite, even in float32.

    Attributes:
        positions: of these images in the batch.
    """

    def __init__(self, model: str, positions: list[int]) -> None:
        super().__init__(
            f"{model}: found scores that are not finite for images {positions} of the batch, also in float32"
        )
        self.positions = positions
