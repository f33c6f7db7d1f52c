"""How commands begin and end: those of `argparse`, which keep LLaVA's names, and those of `typer`."""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

_WRONG_INPUT = (ImportError, OSError, ValueError)


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m module`, whose help is the module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_command(
    command: Callable[[Any], object], parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> None:
    """Parses the command line and runs; wrong input ends with one sentence, Ctrl-C with none, bugs with tracebacks."""
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command(args)
    except _WRONG_INPUT as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def typer_app(help_text: str | None = None, **settings: Any) -> typer.Typer:
    """An app for commands under `clear_errors`; their flags may be spelled with underscores, as LLaVA's are."""
    context_settings = {"token_normalize_func": lambda token: token.replace("_", "-"), "obj": {"debug": False}}
    return typer.Typer(
        help=help_text,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=context_settings,
        **settings,
    )


def typer_app_with_debug(help_text: str) -> typer.Typer:
    """A `typer_app` of several commands, with an option `--debug` before them."""
    app = typer_app(help_text, no_args_is_help=True)

    @app.callback()
    def options(
        context: typer.Context,
        debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    ) -> None:
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
        context.obj = {"debug": debug}

    return app


def clear_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a command end with one sentence and exit code 2 where its input is wrong; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(context: typer.Context, **arguments: Any) -> Any:
        try:
            return command(context, **arguments)
        except _WRONG_INPUT as error:
            if context.obj["debug"]:
                raise
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

    return wrapped
