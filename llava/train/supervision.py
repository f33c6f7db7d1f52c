"""Counts samples that teach nothing, and stops a run that has too many of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

logger = logging.getLogger(__name__)

GRACE_SAMPLES = 10
"""Up to here unsupervised samples are listed only: a share means nothing among the first few."""
LARGEST_SHARE = 0.01


def supervised_tokens(input_ids: Tensor, labels: Tensor, visual_tokens: Tensor, max_length: int | None) -> Tensor:
    """How many tokens of each row carry a label after images are put in and the row is cut, `[B]`.

    Args:
        input_ids: `[B, T]`, right-padded, IMAGE_TOKEN_INDEX for an image.
        labels: `[B, T]`.
        visual_tokens: how many take the place of each image, `[N]`, in the order of the rows.
        max_length: where the model cuts a row; None where it does not.
    """
    supervised = labels != IGNORE_INDEX  # [B, T]
    if max_length is not None:
        place = (input_ids != IMAGE_TOKEN_INDEX).long()
        place[input_ids == IMAGE_TOKEN_INDEX] = visual_tokens
        supervised = supervised & (place.cumsum(1) <= max_length)
    return supervised[:, 1:].sum(1)  # [B]; nothing predicts the first position


class UnsupervisedSamples:
    """Book of the samples in which no token carries a label.

    Such a sample adds nothing to the loss. It is listed in `path`, one JSON line each, and counted.

    Args:
        path: the list of this rank; created with the first entry.
        sum_over_ranks: sums a list of counts over all ranks.
    """

    def __init__(self, path: Path, sum_over_ranks: Callable[[list[int]], list[int]]):
        self.path = path
        self.sum_over_ranks = sum_over_ranks
        self.seen = 0
        self.unsupervised = 0
        self._step_rows = 0
        self._step_ids: list[str] = []

    def add(self, sample_ids: list[str], supervised_tokens: list[int], step: int) -> None:
        """Takes down one micro-batch: its samples and how many tokens of each carry a label."""
        empty = [name for name, count in zip(sample_ids, supervised_tokens, strict=True) if count == 0]
        self._step_rows += len(sample_ids)
        self._step_ids += empty
        if empty:
            logger.warning("No supervised token in %s; listed in %s.", ", ".join(empty), self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps({"step": step, "id": name}) + "\n" for name in empty)

    def close_step(self, step: int) -> None:
        """Judges the global batch after its last micro-batch; all ranks call it.

        Raises:
            ValueError: the whole global batch has no supervised token, or too large a share of all samples has none.
        """
        rows, empty = self.sum_over_ranks([self._step_rows, len(self._step_ids)])
        ids, self._step_rows, self._step_ids = self._step_ids, 0, []
        self.seen += rows
        self.unsupervised += empty
        advice = (
            f"Samples of this rank: {', '.join(ids) or 'none'}; all are listed in {self.path}. Check that --version "
            "fits the language model, that answers are not empty, and that --model_max_length leaves room for them."
        )
        if rows and empty == rows:
            raise ValueError(f"Step {step}: none of the {rows} samples of the batch has a supervised token. {advice}")
        if self.unsupervised > max(GRACE_SAMPLES, LARGEST_SHARE * self.seen):
            raise ValueError(
                f"Step {step}: {self.unsupervised} of {self.seen} samples so far have no supervised token, more than "
                f"{LARGEST_SHARE:.0%}. {advice}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Counts to carry over a restart."""
        return {"seen": self.seen, "unsupervised": self.unsupervised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the counts of an interrupted run."""
        self.seen, self.unsupervised = state["seen"], state["unsupervised"]
