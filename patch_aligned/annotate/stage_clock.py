"""How long each stage took, for the progress bar, the log and the benchmark. Never part of the data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

STAGES = ("decode", "tag", "detect", "segment")


class StageTime(NamedTuple):
    """Images that a stage took, and how long.

    Attributes:
        images: their number.
        seconds: wall time, with what it waited for. Chunks that are worked on at once count each.
    """

    images: int = 0
    seconds: float = 0.0

    def __add__(self, other: StageTime) -> StageTime:  # type: ignore[override]
        return StageTime(self.images + other.images, self.seconds + other.seconds)


StageTimes = dict[str, StageTime]
"""By stage."""


class StageClock:
    """Counts the time of stages in any number of threads, and tells of each image that is done.

    Attributes:
        times: what was counted.
    """

    def __init__(self, on_image: Callable[[], None] = lambda: None) -> None:
        """Starts at nothing.

        Args:
            on_image: called when an image is done, never by two threads at once.
        """
        self.times: StageTimes = dict.fromkeys(STAGES, StageTime())
        self._on_image = on_image
        self._lock = threading.Lock()

    def image_done(self) -> None:
        """Says that an image has its record."""
        with self._lock:
            self._on_image()

    @contextmanager
    def measure(self, stage: str, images: int) -> Iterator[None]:
        """Counts the block's time and `images` for `stage`."""
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        with self._lock:
            self.times[stage] += StageTime(images, elapsed)
