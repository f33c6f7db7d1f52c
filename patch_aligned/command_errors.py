"""How commands end where their input is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer


def clear_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a command end with one sentence and exit code 2 where its input is wrong; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(context: typer.Context, **arguments: Any) -> Any:
        try:
            return command(context, **arguments)
        except (ValueError, OSError, ImportError) as error:
            if context.obj["debug"]:
                raise
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

    return wrapped
