"""Families of transformers measured side by side, each on its own grids, against NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models, localise, token_maps
from patch_aligned.analysis.words import PursuitSettings
from patch_aligned.cli import app
from patch_aligned.intervals import Resampling
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.tokens import PROJECTORS, image_inputs, visual_tokens
from tests.pads import rle_of
from tests.patch_aligned.models.families import FAMILIES, save_tiny

SIZES = [(300, 200), (201, 333), (80, 56)]
BOXES = {"cat": (0.1, 0.1, 0.6, 0.7), "what": (0.5, 0.4, 1, 1), "a cat": (0.3, 0, 0.36, 0.06)}
"""Label and rectangle of each region, as shares of the image; the last one covers no token of a coarse grid."""


@pytest.fixture
def pad(tmp_path: Path) -> Path:
    generator, records = np.random.default_rng(0), []
    (tmp_path / "pictures").mkdir()
    for index, (width, height) in enumerate(SIZES):
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{index}.png")
        labels = []
        for tag, (left, top, right, bottom) in BOXES.items():
            mask = np.zeros((height, width), dtype=np.uint8, order="F")
            box = [round(left * width), round(top * height), round(right * width), round(bottom * height)]
            mask[box[1] : box[3], box[0] : box[2]] = 1
            labels.append({"tag": tag, "bbox": box, "rle_mask": rle_of(mask)})
        records.append({"image_id": f"{index}.png", "size": [width, height], "caption": "noise", "labels": labels})
    (tmp_path / "pad.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "pad.jsonl"


def save(name: str, folder: Path) -> Any:
    if not FAMILIES[name].is_installed:
        pytest.skip(f"needs transformers >= {FAMILIES[name].since}")
    return save_tiny(name, folder)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def entropy(tokens: np.ndarray) -> float:
    energies = np.linalg.svd(tokens, compute_uv=False) ** 2
    shares = energies[energies > 0] / energies.sum()
    return float(-(shares * np.log(shares)).sum())


def overlaps(edges: Sequence[float], pixels: int) -> np.ndarray:
    """Share of each cell that lies in each pixel along one axis: `[cells, pixels]`."""
    lows, highs = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    inside = np.minimum(highs, np.arange(1, pixels + 1)) - np.maximum(lows, np.arange(pixels))
    return inside.clip(0) / (highs - lows)


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "gemma3, pan and scan", "llava", "llava_next",
     "paligemma", "mistral3", "ovis2"],
)  # fmt: skip
def test_figures_equal_numpy_on_every_grid(name: str, pad: Path, tmp_path: Path):
    whole = save(name, tmp_path / "model")
    [model] = load_models([f"tiny={tmp_path / 'model'}"])
    encoder: Any = model.encoder
    if FAMILIES[name].overrides:  # which no processor saves
        encoder.processor.images_kwargs = encoder.processor.images_kwargs | FAMILIES[name].overrides
    settings = AnalysisSettings(MeasureSettings(pad, pad.parent / "pictures"), Resampling(0))
    found = analyse([model], settings).models["tiny"]

    table = whole.get_input_embeddings().weight.detach().double().numpy()
    before: list[np.ndarray] = []
    first = PROJECTORS[encoder.config.model_type][0]
    whole.get_submodule(first).register_forward_pre_hook(
        lambda module, args: before.append(args[0].reshape(-1, args[0].shape[-1]).double().numpy())
    )
    after, ious, cosines, best, shapes = [], [], [], [], []
    for record in map(json.loads, pad.read_text().splitlines()):
        image = Image.open(pad.parent / "pictures" / record["image_id"])
        tokens = visual_tokens(whole, image_inputs(encoder.processor, [[image]])).double().numpy()
        [layout] = layouts_of(encoder.processor, [image.size])
        shapes.append(" + ".join(f"{rows} × {cols}" for rows, cols in (grid.shape for grid in layout.grids)))
        after.append(tokens[sorted({index for grid in layout.grids for index in grid.tokens.ravel()})])
        pictured = [grid for grid in layout.grids if grid.kind == "whole"] or layout.grids
        for region in record["labels"]:
            ids = model.words.tokenizer(region["tag"], add_special_tokens=False).input_ids
            label = unit(table[ids].mean(axis=0))
            mask = coco_mask.decode({"size": record["size"][::-1], "counts": region["rle_mask"].encode()})
            of_grids = []
            for grid in layout.grids:
                across, down = overlaps(grid.x_edges, image.width), overlaps(grid.y_edges, image.height)
                coverage = (down @ mask @ across.T).ravel()
                own = tokens[grid.tokens.ravel()]
                if (coverage >= 0.5 - 1e-9).any():
                    of_grids.append(unit(own[coverage >= 0.5 - 1e-9].mean(axis=0)))
                if grid is pictured[0] and coverage.sum() > 0:
                    cosine = unit(own) @ label
                    predicted = cosine > (cosine.min() + cosine.max()) / 2
                    shared = coverage[predicted].sum()
                    ious.append(shared / (predicted.sum() + coverage.sum() - shared))
            if of_grids:
                cosines.append(np.mean([mean @ label for mean in of_grids]))
                words = unit(table[: len(model.words.tokenizer)])
                words[model.words.placeholder] = 0
                best.append(np.mean([(words @ mean).max() for mean in of_grids]))

    assert found.entropy_before.entropy_nats == pytest.approx(entropy(np.concatenate(before)), rel=1e-5)
    assert found.entropy_after.entropy_nats == pytest.approx(entropy(np.concatenate(after)), rel=1e-5)
    assert found.metrics.loc["align_px", "value"] == pytest.approx(np.mean(ious), rel=1e-5)
    assert found.metrics.loc["cosine", "value"] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert found.metrics.loc["best_word_cosine", "value"] == pytest.approx(np.mean(best), rel=1e-5)
    assert found.metrics.loc[["align_px", "cosine"], "regions"].tolist() == [len(ious), len(cosines)]
    assert found.layouts == {shape: shapes.count(shape) for shape in shapes}


def test_tiled_images_are_mapped_and_localised_on_the_whole_image(pad: Path, tmp_path: Path):
    """LLaVA-NeXT has a base tile, tiles, and tokens that close rows and have no place."""
    save("llava_next", tmp_path / "model")
    models = load_models([f"tiny={tmp_path / 'model'}"])
    image = pad.parent / "pictures" / "0.png"
    [tokens] = models[0].visual_tokens(models[0].encode([Image.open(image)]))
    row = localise(models, image, "cat")
    assert (row.cells["tiny"].grid.kind, row.cells["tiny"].grid.shape) == ("whole", (8, 8))
    direction = models[0].words.directions_of_labels(["cat"])[0]
    expected = torch.nn.functional.cosine_similarity(tokens[:64], direction[None])
    torch.testing.assert_close(row.cells["tiny"].cosine.ravel(), expected, rtol=1e-5, atol=1e-6)
    found = token_maps(models, [("0.png", image)], PursuitSettings(1), "none").images[0].maps["tiny"]
    assert found.grid.kind == "whole"
    words = models[0].words.table[: len(models[0].words.tokenizer)].clone()
    words[models[0].words.placeholder] = 0
    nearest = tokens[:64] @ torch.nn.functional.normalize(words, dim=-1).T
    assert torch.equal(found.pursuit.ids[:, 0], nearest.argmax(dim=1))


def test_four_families_stand_side_by_side_in_one_report(pad: Path, tmp_path: Path):
    names = ["qwen3_vl", "internvl", "smolvlm", "gemma3"]
    for name in names:
        save(name, tmp_path / name)
    projectors = [argument for name in names for argument in ("--projector", f"{name}={tmp_path / name}")]
    data = ["--data", str(pad), "--image-folder", str(pad.parent / "pictures")]
    how = ["--output", str(tmp_path / "report"), "--random-init", "2", "--resamples", "50", "--token-maps", "1"]
    result = CliRunner().invoke(app, ["analyze", *projectors, *data, *how])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert list(document["models"]) == names
    assert document["models"]["gemma3"]["grid"] == [4, 4]
    assert document["models"]["internvl"]["grid"] is None
    assert document["models"]["qwen3_vl"]["layouts"] == {"6 × 9": 1, "10 × 6": 1, "2 × 2": 1}
    assert document["models"]["smolvlm"]["untrained"]["seeds"] == [0, 1]
    assert list(document["picture"][0]["iou_px"]) == names
    page = (tmp_path / "report" / "report.html").read_text()
    for shown in (*names, "6 × 9, 10 × 6, 2 × 2", "untrained, as internvl"):
        assert shown in page
