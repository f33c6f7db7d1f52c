"""Named scalars of a logging window, averaged over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sums = dict[str, tuple[float, float]]


class MetricWindow:
    """Running means; NaN means "nothing to report" and leaves the mean alone.

    Values stay on their device until the window is read, so that adding costs no synchronisation.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # each [2]: sum and count

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Takes one value of each name."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double().reshape(())
            present = ~value.isnan()
            entry = torch.stack([value.nan_to_num(posinf=torch.inf, neginf=-torch.inf), present.double()])
            before = self._sums.get(name)
            self._sums[name] = entry if before is None else before.to(entry.device) + entry

    def sums(self) -> Sums:
        """Sum and count of each name on this rank."""
        return {name: (entry[0].item(), entry[1].item()) for name, entry in self._sums.items()}

    def restore(self, sums: Sums) -> None:
        """Takes over the sums of an interrupted run."""
        self._sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}

    def drain(self, gather: Callable[[Sums], list[Sums]]) -> dict[str, float]:
        """Empties the window: means over all ranks, in the order of first appearance, without names that have none.

        Args:
            gather: collects this rank's sums with those of the others (a collective call).
        """
        totals: Sums = {}
        for sums in gather(self.sums()):
            for name, (total, count) in sums.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items() if count}
