"""What `patch-aligned measure` does: load, measure, write, show."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patch_aligned.analysis.embeddings import WordEmbeddings
from patch_aligned.analysis.localisation_figure import save_localisation_figure
from patch_aligned.analysis.measure import Measures, measure_projectors
from patch_aligned.analysis.measured_images import MeasureSettings
from patch_aligned.analysis.projector_sources import default_config_of, load_tower, parse_projectors
from patch_aligned.analysis.report import COLUMNS, table_rows, write_report


def run_measure(
    *,
    projectors: Sequence[str],
    base: str,
    data: Path,
    image_folder: Path,
    output: Path,
    vision_tower: str | None = None,
    threshold_rule: str = "mid_range",
    min_coverage: float = 0.5,
    region_kind: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    image_aspect_ratio: str | None = None,
    picture_rows: int = 4,
    batch_size: int = 8,
    device: str = "cpu",
) -> Measures:
    """Measures projectors and writes `measures.json`, `measures.md` and `localisation.png` into `output`.

    The arguments are the options of the command; `projectors` are `NAME=PATH` or `NAME=random[:SEED]`.

    Raises:
        ValueError: an input does not fit; the message says which and what to do.
        OSError: a file or folder is missing or broken.
        ImportError: a picture is asked for without matplotlib.
    """
    settings = MeasureSettings(
        data=data,
        image_folder=image_folder,
        threshold_rule=threshold_rule,
        min_coverage=min_coverage,
        limit=limit,
        region_kind=region_kind,
        seed=seed,
        batch_size=batch_size,
        picture_rows=picture_rows,
    )
    # All that can be wrong with the arguments is found before the first large file is read.
    sources = parse_projectors(projectors)
    if not data.is_file():
        raise FileNotFoundError(f"--data {data}: there is no such file.")
    if not image_folder.is_dir():
        raise FileNotFoundError(f"--image-folder {image_folder}: there is no such folder.")
    if picture_rows and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "localisation.png needs matplotlib: pip install 'patch-aligned-llava[analysis]', or pass --picture-rows 0."
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here. Pass --device cpu.")

    console = Console()
    transformers_logging.disable_progress_bar()
    tower = load_tower(sources, vision_tower, image_aspect_ratio, device)
    words = WordEmbeddings.load(base)
    measured = [source.build(tower, words, default_config_of(sources)) for source in sources]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"Measuring {len(measured)} projectors", total=limit)
        measures = measure_projectors(
            tower, measured, settings, lambda done, total: progress.update(task, completed=done, total=total)
        )

    provenance = {
        "base": base,
        "vision_tower": tower.name,
        "mm_vision_select_layer": tower.select_layer,
        "image_aspect_ratio": tower.image_aspect_ratio,
        "device": device,
        "dtype": "float32",
        "versions": {name: version(name) for name in ("patch-aligned-llava", "torch", "transformers")},
    }
    written = write_report(measures, settings, provenance, output)
    if measures.picture:
        picture = output / "localisation.png"
        save_localisation_figure(measures.picture, picture, threshold_rule)
        written.append(picture)

    table = Table(title=f"{measures.images} images, threshold rule {threshold_rule}")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for row in table_rows(measures):
        table.add_row(*row)
    console.print(table)
    console.print("Written: " + ", ".join(str(path) for path in written))
    return measures
