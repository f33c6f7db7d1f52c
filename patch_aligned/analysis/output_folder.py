"""Whether results can be written, asked before hours are spent on them."""

from __future__ import annotations

import os
from pathlib import Path


def require_output_folder(output: Path) -> None:
    """Checks that `output` is a folder that can be written to, or can be made; nothing is made here.

    Raises:
        NotADirectoryError: it is a file, or lies below one.
        PermissionError: it may not be written to.
    """
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--output {output}: found a file at {there}; expected a folder, or nothing yet.")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--output {output}: {there} may not be written to; expected a folder that may.")
