"""Notebooks run from the first cell to the last, and show what they say."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute the code cells in order; return their names."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is part of the extra `analysis`")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    names: dict[str, Any] = {}
    for cell in json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept in the repository"
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
    pyplot.close("all")
    return names


@pytest.mark.slow
def test_the_projector_of_the_notebook_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="processors of InternVL need torchvision")
    models = run("any_vlm.ipynb", tmp_path, monkeypatch)["analysis"].models
    before, after = (models[name].metrics["value"] for name in ("before", "after"))
    assert after["contrast"] > before["contrast"] + 0.5
    assert after["retrieval_top1"] > 0.9 > before["retrieval_top1"] + 0.3
