"""How the commands of this package begin and end."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any


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
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
