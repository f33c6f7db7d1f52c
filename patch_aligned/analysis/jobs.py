"""What `patch-aligned analyze` does: load, analyse, write, show."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patch_aligned.analysis.report import as_text, headline_table, provenance_of, write_report
from patch_aligned.analysis.run import Analysis, AnalysisSettings, analyse
from patch_aligned.analysis.sets import open_annotated_set
from patch_aligned.analysis.token_map_page import save_token_map_figures, write_token_map_page
from patch_aligned.analysis.words import PursuitSettings, TokenMaps, english_words, token_maps
from patch_aligned.images import image_path
from patch_aligned.models.load import load_models

# Whether results can be written, asked before hours are spent on them.


def require_output_folder(output: Path) -> None:
    """Checks that `output` is a folder that can be written to, or can be made; nothing is made here.

    Raises:
        NotADirectoryError: it is a file, or lies below one.
        PermissionError: it may not be written to.
    """
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--output {output}: found a file at {there}; expected a folder, or nothing yet.")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--output {output}: {there} may not be written to; expected a folder that may.")


# A bar in the terminal that counts images.


@contextmanager
def image_progress(description: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar while the block runs; what it yields is told how much is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


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


# What `patch-aligned token-map` does: load, decompose, draw, write.


def run_token_map(
    *,
    projectors: Sequence[str],
    base: str | None,
    output: Path,
    images: Sequence[Path] = (),
    data: Path | None = None,
    image_folder: Path | None = None,
    limit: int = 4,
    settings: PursuitSettings | None = None,
    english: str = "auto",
    png: bool = True,
    vision_tower: str | None = None,
    image_aspect_ratio: str | None = None,
    device: str = "cpu",
) -> TokenMaps:
    """Writes `token_map.html`, `token_map.json` and a PNG an image into `output`, and returns the maps.

    The arguments are the options of the command; `projectors` are `NAME=PATH` or `NAME=random[:SEED]`.

    Raises:
        ValueError: an input does not fit; the message says which and what to do.
        OSError: a file or folder is missing or broken.
        ImportError: PNGs are asked for without matplotlib, or a word list that is not installed.
    """
    # All that can be wrong with the arguments is found before the first large file is read.
    chosen = _chosen_images(images, data, image_folder, limit)
    require_output_folder(output)
    if png and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("PNGs need matplotlib: pip install 'patch-aligned-llava[analysis]', or pass --no-png.")

    console = Console(markup=False)  # names and paths may hold brackets
    transformers_logging.disable_progress_bar()
    models = load_models(projectors, base, vision_tower, image_aspect_ratio, device)
    with image_progress("Decomposing images", console) as on_images:
        maps = token_maps(models, chosen, settings, english, on_images)
    written = write_token_map_page(maps, output)
    if png:
        with image_progress("Drawing", console) as on_images:
            written += save_token_map_figures(maps, output, on_images)
    console.print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True)
    return maps


def _chosen_images(
    images: Sequence[Path], data: Path | None, image_folder: Path | None, limit: int
) -> list[tuple[str, Path]]:
    """Id and path of each image, from files or from a set of annotated images."""
    if bool(images) == (data is not None):
        given = "both" if images else "neither"
        raise ValueError(f"Found {given} of --image and --data; expected one: pass --image FILE, or --data FILE.")
    if data is None:
        if missing := [path for path in images if not path.is_file()]:
            raise FileNotFoundError(f"--image {missing[0]}: there is no such file.")
        return [(path.name, path) for path in images]
    if not data.is_file():
        raise FileNotFoundError(f"--data {data}: there is no such file.")
    if image_folder is None or not image_folder.is_dir():
        found = "nothing" if image_folder is None else f"{image_folder}, which is no folder"
        raise ValueError(f"--image-folder: found {found}; expected the folder that the ids of {data} are relative to.")
    annotated = open_annotated_set(data, image_folder).first(limit)
    chosen = [(image.image_id, image_path(image_folder, image.image_id)) for image in annotated]
    if not chosen:
        raise ValueError(f"--data {data}: found no record; expected at least one image.")
    if missing := [path for _, path in chosen if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: there is no such file. Is --image-folder {image_folder} the right one?")
    return chosen
