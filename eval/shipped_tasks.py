"""Where the tasks lie that lmms-eval ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def shipped_tasks_folder() -> Path:
    """The folder of the tasks that lmms-eval ships.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    spec = importlib.util.find_spec("lmms_eval")  # the package itself takes ten seconds to import
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("lmms-eval is not installed; install it by: pip install 'patch-aligned-llava[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"
