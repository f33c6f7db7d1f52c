"""Running a stage over many images in batches, and what happens where a batch is too large or an image breaks it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from patch_aligned.annotate.non_finite import NonFiniteScoresError

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Failure(NamedTuple):
    """Why an item has no result.

    Attributes:
        status: `out_of_memory` or `non_finite`.
        reason: in words; the same wherever it happens, as it goes into the shard.
    """

    status: str
    reason: str


_OUT_OF_MEMORY = Failure("out_of_memory", "does not fit in memory, even alone")
_NON_FINITE = Failure("non_finite", "the model's scores are not finite, also in float32")


def run_in_batches(
    stage: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], batch_size: int
) -> Iterator[Result | Failure]:
    """What `stage` makes of each item, in order, as soon as its batch is done.

    A batch that doesn't fit in memory is halved until it does. An item that doesn't fit alone fails, as does one whose
    scores aren't finite; the others of its batch don't suffer.

    Args:
        stage: takes a batch and returns one result an item.
        items: all of them.
        batch_size: items of a batch.

    Raises:
        Exception: any other error of `stage`, which is a bug or a broken machine.
    """
    for start in range(0, len(items), batch_size):
        yield from _run(stage, items[start : start + batch_size])


def _run(stage: Callable[[Sequence[Item]], Sequence[Result]], batch: Sequence[Item]) -> list[Result | Failure]:
    if not batch:
        return []
    try:
        return [*stage(batch)]
    except NonFiniteScoresError as error:
        broken = set(error.positions)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        broken = set()
        _logger.warning("A batch of %d does not fit in memory: %s", len(batch), error)
    # Outside of the except blocks, as their traceback keeps the failed batch's tensors alive.
    if broken:
        others = iter(_run(stage, [item for position, item in enumerate(batch) if position not in broken]))
        return [_NON_FINITE if position in broken else next(others) for position in range(len(batch))]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        return [_OUT_OF_MEMORY]
    half = -(-len(batch) // 2)
    return [*_run(stage, batch[:half]), *_run(stage, batch[half:])]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "_ALLOC_FAILED")
    )
