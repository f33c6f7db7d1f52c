"""What `patch-aligned analyze` does: load, analyse, write, show."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patch_aligned.analysis.analysed_models import load_models
from patch_aligned.analysis.analysis import analyse
from patch_aligned.analysis.analysis_results import Analysis, AnalysisSettings
from patch_aligned.analysis.image_progress import image_progress
from patch_aligned.analysis.output_folder import require_output_folder
from patch_aligned.analysis.report import provenance_of, write_report
from patch_aligned.analysis.report_tables import as_text, headline_table
from patch_aligned.analysis.token_map import PursuitSettings, token_maps
from patch_aligned.analysis.word_list import english_words
from patch_aligned.dataset.image_files import image_path


def run_analyze(
    *,
    projectors: Sequence[str],
    settings: AnalysisSettings,
    output: Path,
    base: str | None = None,
    vision_tower: str | None = None,
    image_aspect_ratio: str | None = None,
    token_map_images: int = 2,
    pursuit: PursuitSettings | None = None,
    english: str = "auto",
    device: str = "cpu",
) -> Analysis:
    """Analyses projectors and writes a report into `output`; see `write_report` for its files.

    Args:
        projectors: `NAME=PATH` or `NAME=random[:SEED]`, see `load_models`.
        settings: what decides the numbers.
        output: where the report goes.
        base, vision_tower, image_aspect_ratio: see `load_models`.
        token_map_images: how many of the pictured images get token maps.
        pursuit, english: see `token_maps`.
        device: where everything runs.

    Raises:
        ValueError: an input does not fit; the message says which and what to do.
        OSError: a file or folder is missing or broken.
        ImportError: matplotlib is not installed, or the word list.
    """
    # All that can be wrong with the arguments is found before the first large file is read.
    measure = settings.measure
    if not measure.data.is_file():
        raise FileNotFoundError(f"--data {measure.data}: there is no such file.")
    if not measure.image_folder.is_dir():
        raise FileNotFoundError(f"--image-folder {measure.image_folder}: there is no such folder.")
    require_output_folder(output)
    if english != "auto":
        english_words(english)  # or a list that is not installed would show after hours
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("The report's pictures need matplotlib: pip install 'patch-aligned-llava[analysis]'.")

    console = Console(markup=False)  # names and paths may hold brackets
    transformers_logging.disable_progress_bar()
    models = load_models(projectors, base, vision_tower, image_aspect_ratio, device)
    with console.status("Hashing the weights"):
        provenance = provenance_of(models)
    with image_progress(f"Analysing {len(models)} projectors", console) as on_images:
        analysis = analyse(models, settings, on_images)
    shown = [row.image_id for row in analysis.picture[:token_map_images]]
    maps = None
    if shown:
        with image_progress("Finding words", console) as on_images:
            images = [(image_id, image_path(measure.image_folder, image_id)) for image_id in shown]
            maps = token_maps(models, images, pursuit, english, on_images)
    with console.status("Writing the report"):
        written = write_report(analysis, output, maps, provenance)

    headline = headline_table(analysis)
    title = f"{analysis.images:,} images, threshold rule {measure.threshold_rule}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    rows = [as_text(row) for row in headline.rows]
    for index, column in enumerate(headline.columns):
        # Where the terminal is narrow, headers and long names are folded and numbers stay whole.
        widest = max(len(line) for row in rows for line in row[index].splitlines() or [""])
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(column, justify=justify, overflow="fold", min_width=widest if index else min(widest, 13))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if analysis.broken_images:
        console.print(
            f"Left out: {len(analysis.broken_images):,} images that cannot be measured; report.html says why."
        )
    console.print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True)
    return analysis
