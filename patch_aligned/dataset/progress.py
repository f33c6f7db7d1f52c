"""Progress of one pass over a file whose length is not known beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

T = TypeVar("T")
_SHOWN_EVERY = 64


def with_progress(records: Iterable[T], description: str, unit: str = "images") -> Iterator[T]:
    """The same records, with their count and rate on standard error while it is a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, rate="")
        count = 0
        for count, record in enumerate(records, start=1):
            yield record
            if count % _SHOWN_EVERY == 0:
                seconds = progress.tasks[0].elapsed or 1e-9
                progress.update(task, completed=count, rate=f"{count / seconds:,.0f} {unit}/s")
