"""One process a GPU, as `accelerate launch` or torchrun start them: what the first decides, all do."""

from __future__ import annotations

import datetime
import os
from typing import TypeVar

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Number of this process, and how many there are; (0, 1) for a process that nothing launched."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def processes_here(count: int) -> int:
    """How many of `count` processes run on this machine, which is what its GPUs must suffice for."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count))


def shared(value: T) -> T:
    """The first process's value, in all of them; what the others give does not matter. All wait for it."""
    if rank_and_count()[1] == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # One process may have far more left to do than another. Without a word on CPUs, accelerate takes each process of
    # theirs for the only one.
    PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(weeks=52))
    (first,) = broadcast_object_list([value])
    return first


def wait_for_all() -> None:
    """Goes on when all processes have come here."""
    shared(None)
