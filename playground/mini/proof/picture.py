"""Draws where each word of a scene is found, captions alone against patch-aligned, on the scene of median IoU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from pycocotools import mask as coco_mask

from patch_aligned.analysis.localisation import HEAT_MAP, PictureRow, bare, localise
from patch_aligned.analysis.regions import MeasureSettings
from patch_aligned.analysis.run import AnalysisSettings, analyse
from patch_aligned.images import image_path
from patch_aligned.intervals import Resampling
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.load import load_models
from patch_aligned.pad import AnnotatedImage, read_annotations
from playground.mini.proof.experiment import LLM


def median_scene(model: VisionLanguageModel, scenes: Path) -> AnnotatedImage:
    """Return the scene whose mean IoU over objects is the median of all scenes; of an even number the lower one."""
    settings = MeasureSettings(scenes / "pad.json", scenes, region_kind="object", picture_rows=0)
    regions = analyse([model], AnalysisSettings(settings, Resampling(0))).regions
    by_scene = regions.groupby("image", observed=True)["iou_px"].mean().sort_values()
    chosen = by_scene.index[(len(by_scene) - 1) // 2]
    return list(read_annotations(scenes / "pad.json"))[chosen]


def draw(scene: AnnotatedImage, rows: list[PictureRow], path: Path) -> None:
    """Draw the picture, and under each word the cosine of every token with it, a row for each model, on one scale."""
    from matplotlib.figure import Figure

    names = list(rows[0].cells)
    cosines = [cell.cosine.numpy() for row in rows for cell in row.cells.values()]
    low, high = min(map(np.min, cosines)), max(map(np.max, cosines))
    side, left = 1.5, 1.0
    figure = Figure(figsize=(left + side * (len(rows) + 1) + 0.7, side * len(names) + 0.35), dpi=160, facecolor="white")
    axes = figure.subplots(len(names), len(rows) + 1, squeeze=False)
    width, height = scene.size_wh
    for line, name in enumerate(names):
        for column, axis in enumerate(axes[line]):
            bare(axis)
            if column == 0:
                axis.imshow(rows[0].image)
                axis.set_ylabel(name.replace("_", "-"), fontsize=10)
                continue
            row = rows[column - 1]
            cell = row.cells[name]
            drawn = axis.pcolormesh(
                cell.grid.x_edges, cell.grid.y_edges, cell.cosine.numpy(), cmap=HEAT_MAP, vmin=low, vmax=high
            )
            axis.contour(row.truth, levels=[0.5], colors="white", linewidths=1)
            axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
            if line == 0:
                axis.set_title(row.label, fontsize=11)
    figure.subplots_adjust(left=0.05, right=0.9, top=0.9, bottom=0.02, wspace=0.06, hspace=0.06)
    figure.colorbar(drawn, cax=figure.add_axes((0.915, 0.1, 0.012, 0.72)), label="cosine")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)  # or few words cut the label of the scale


def main(
    projector: Annotated[list[str], typer.Option(metavar="NAME=FOLDER", help="Give two; the last chooses the scene.")],
    scenes: Annotated[Path, typer.Option(help="Folder of scenes that were not trained on.")],
    output: Annotated[Path, typer.Option(help="The picture.")],
) -> None:
    """Draw the scene of median IoU."""
    models = load_models(projector, base=LLM)
    scene = median_scene(models[-1], scenes)
    size_hw = list(scene.size_wh[::-1])
    masks: dict[str, list[dict[str, object]]] = {}
    for region in scene.regions:
        masks.setdefault(region.tag, []).append({"size": size_hw, "counts": region.rle_mask.encode()})
    picture = image_path(scenes, scene.image_id)
    rows = [
        localise(models, picture, tag, coco_mask.decode(coco_mask.merge(of_tag)).astype(bool))
        for tag, of_tag in masks.items()
    ]
    draw(scene, rows, output)
    print(f"{output}: {scene.image_id}, {', '.join(masks)}")


if __name__ == "__main__":
    typer.run(main)
