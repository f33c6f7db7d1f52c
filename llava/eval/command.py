"""How the commands of this package begin and end."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any


def run_command(
    command: Callable[[Any], object], parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> None:
    """Parses the command line and runs; wrong input ends with one sentence, a bug with its traceback."""
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        command(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
