"""Notebooks run from the first cell to the last, and show what they say."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

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


@pytest.mark.slow
def test_what_the_notebook_shows_of_tokens_is_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="processors of InternVL need torchvision")
    monkeypatch.chdir(tmp_path)  # no quickstart is here
    names = run("see_what_tokens_mean.ipynb", tmp_path, monkeypatch)
    models, opened = names["models"], Image.open(names["image"])
    assert [model.name for model in models] == ["one", "other"]
    for model in models:
        [tokens] = model.visual_tokens(model.encode([opened]))  # [T, D]
        grid = model.layout(opened.size, tokens).whole
        cosines = F.normalize(tokens[grid.tokens.ravel()], dim=-1) @ F.normalize(model.words.table, dim=-1).T  # [S, M]
        sought = model.words.tokenizer.convert_tokens_to_ids(names["word"])
        cell = names["found"].cells[model.name]
        torch.testing.assert_close(cell.cosine.ravel(), cosines[:, sought], rtol=1e-4, atol=1e-5)
        first = names["maps"].images[0].maps[model.name].pursuit.ids[:, 0]
        readable = cosines[:, : len(model.words.tokenizer)].clone()
        readable[:, model.words.placeholder] = -1
        torch.testing.assert_close(cosines.gather(1, first[:, None])[:, 0], readable.max(dim=1).values)
    analysis, shown = names["analysis"], names["shown"]
    other, one = (analysis.models[name].metrics.loc[shown.index, "value"] for name in ("other", "one"))
    assert (other - one - shown["value"]).abs().max() < 1e-9
    assert 1 < analysis.models["one"].entropy_after.effective_rank < 64
