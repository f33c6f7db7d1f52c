"""Looks for another package under the name of one of ours, such as upstream's llava, before it is imported.

Entry points run this file by its path, as `llava` may be the other one.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def require_own_packages(*names: str) -> None:
    """Raises `ImportError` naming the file that would be imported in place of one of ours."""
    for name in names:
        spec = find_spec(name)
        file = spec and Path(spec.origin or next(iter(spec.submodule_search_locations or ()))).resolve()
        if file and ROOT / name not in (file, file.parent):
            raise ImportError(
                f"{name}: {file} would be imported, expected {ROOT / name}. Uninstall the other package, or "
                f"install this checkout: pip install -e {ROOT}"
            )


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    try:
        require_own_packages("llava", "patch_aligned", "eval")
    except ImportError as error:
        sys.exit(f"error: {error}")
