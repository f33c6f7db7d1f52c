"""How long each stage took, for the progress bar, the log and the benchmark. Never part of the data."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Seconds and images by stage, counted by any number of threads.

    Attributes:
        seconds: wall time of each stage, including what it waited for. Chunks that are worked on at once count each.
        images: that each stage took.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.images: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str, images: int) -> Iterator[None]:
        """Counts the block's time and `images` for `stage`."""
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        with self._lock:
            self.seconds[stage] += elapsed  # type: ignore[assignment]
            self.images[stage] += images

    def rates(self) -> dict[str, float]:
        """Images a second of each stage."""
        with self._lock:
            return {stage: self.images[stage] / seconds for stage, seconds in self.seconds.items() if seconds}
