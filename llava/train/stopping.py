"""Save before stopping on SIGTERM, Slurm's warning SIGUSR1, and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_SIGNAL_SECONDS = 1.0
"""Within this time signals count as one: launchers forward what a terminal or Slurm has sent to all processes."""


class StopRequest(ContextDecorator):
    """Records the first signal while a run can save. A second one, or one before that, ends the process at once."""

    signum: int | None = None
    can_save = False
    _since = 0.0

    @property
    def exit_status(self) -> int:
        """What shells give for SIGTERM or Ctrl-C; also where another rank took the signal."""
        return 128 + (signal.SIGINT if self.signum == signal.SIGINT else signal.SIGTERM)

    def _receive(self, signum: int, frame: Any) -> None:
        is_first, self.signum = self.signum is None, self.signum or signum
        if is_first and self.can_save:
            self._since = time.monotonic()
        elif is_first or time.monotonic() - self._since > ONE_SIGNAL_SECONDS:
            os.write(2, f"{signal.Signals(signum).name}: ended at once.\n".encode())
            os._exit(self.exit_status)

    def __enter__(self) -> StopRequest:
        self.signum, self.can_save = None, False
        self._children = set(multiprocessing.active_children())
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS if in_main_thread}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        workers = set(multiprocessing.active_children()) - self._children
        if workers and self._before:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report them as lost
        for worker in workers:
            worker.kill()  # they ignore SIGTERM, and one that was stopped would be waited for


stop_request = StopRequest()
"""That of the process."""


def start_worker(seed_worker: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a data loader worker to ignore SIGTERM: the last step before a run stops needs its batch."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if seed_worker is not None:
        seed_worker(worker)
