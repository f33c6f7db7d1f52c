"""What projectors do: entropy, Align(V, W), cosine, and the words on their patches.

The functions that a notebook calls, and their settings: `load_models`, `analyse`, `localise`,
`save_localisation_figure`, `token_maps`, `write_report`. Each is imported lazily, so this package itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch_aligned.analysis.localisation import localise, save_localisation_figure
    from patch_aligned.analysis.report import write_report
    from patch_aligned.analysis.run import AnalysisSettings, MeasureSettings, analyse
    from patch_aligned.analysis.words import token_maps
    from patch_aligned.models.load import load_models

__all__ = [
    "AnalysisSettings",
    "MeasureSettings",
    "analyse",
    "load_models",
    "localise",
    "save_localisation_figure",
    "token_maps",
    "write_report",
]

_MODULES = {
    "AnalysisSettings": "patch_aligned.analysis.run",
    "MeasureSettings": "patch_aligned.analysis.run",
    "analyse": "patch_aligned.analysis.run",
    "load_models": "patch_aligned.models.load",
    "localise": "patch_aligned.analysis.localisation",
    "save_localisation_figure": "patch_aligned.analysis.localisation",
    "token_maps": "patch_aligned.analysis.words",
    "write_report": "patch_aligned.analysis.report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
