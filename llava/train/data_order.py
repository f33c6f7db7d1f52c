"""The order of samples: a function of seed and epoch alone, the same on all ranks and after a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Yields the order of the epoch set by `set_epoch`.

    Args:
        draw_order: draws one order from torch's global generator, which is seeded for it and put back afterwards.
        length: number of samples.
        seed: of the run's data order.
    """

    def __init__(self, draw_order: Callable[[], list[int]], length: int, seed: int):
        self.draw_order = draw_order
        self.length = length
        self.seed = seed
        self.epoch = 0
        self._drawn: tuple[int, list[int]] | None = None  # of one epoch: drawing half a million takes seconds

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration is for."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """Indices of the samples in the order of that epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + epoch)  # torch.manual_seed would seed the GPUs as well
                self._drawn = (epoch, self.draw_order())
        return self._drawn[1]

    def fingerprint(self, epoch: int) -> str:
        """Short hash of an epoch's order; equal hashes mean equal data order."""
        return hashlib.sha256(" ".join(map(str, self.order(epoch))).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))
