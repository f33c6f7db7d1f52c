"""Says whether Align(V, W) and the cosine rise from projector to projector: `check_order.py ANALYSIS NAME NAME...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

FIGURES = ("align_px", "cosine")


def orders(analysis: dict[str, Any], names: Sequence[str]) -> list[str]:
    """For each figure a line with its values, and whether they rise in the order of the names.

    Raises:
        ValueError: the analysis has no projector of a name.
    """
    models = analysis["models"]
    if missing := [name for name in names if name not in models]:
        raise ValueError(f"found no projector {missing[0]!r}; the analysis has {', '.join(models)}")
    found = []
    for figure in FIGURES:
        values = [models[name]["figures"][figure]["value"] for name in names]
        rises = None not in values and all(low < high for low, high in pairwise(values))
        line = " < ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True) if value is not None)
        found.append(f"{figure}: {line}: {'holds' if rises else 'does not hold'}")
    return found


def main(path: str, *names: str) -> None:
    """Prints the lines. An order that does not hold is a result and no error: untrained projectors differ by chance."""
    print("\n".join(orders(json.loads(Path(path).read_text(encoding="utf-8")), names)))


if __name__ == "__main__":
    main(*sys.argv[1:])
