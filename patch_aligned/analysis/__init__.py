"""What projectors do: entropy, Align(V, W), cosine, and the words on their patches.

The five functions that a notebook calls, and their settings, are found here: `load_models`, `analyse`, `localise`,
`token_maps`, `write_report`. Each is imported when it is first asked for, so that this package itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch_aligned.analysis.analysed_models import load_models
    from patch_aligned.analysis.analysis import analyse
    from patch_aligned.analysis.analysis_results import AnalysisSettings
    from patch_aligned.analysis.localisation import localise
    from patch_aligned.analysis.measured_images import MeasureSettings
    from patch_aligned.analysis.report import write_report
    from patch_aligned.analysis.token_map import token_maps

__all__ = [
    "AnalysisSettings",
    "MeasureSettings",
    "analyse",
    "load_models",
    "localise",
    "token_maps",
    "write_report",
]

_MODULES = {
    "AnalysisSettings": "analysis_results",
    "MeasureSettings": "measured_images",
    "analyse": "analysis",
    "load_models": "analysed_models",
    "localise": "localisation",
    "token_maps": "token_map",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
