"""What `patch-aligned token-map` does: load, decompose, draw, write."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from patch_aligned.analysis.analysed_models import load_models
from patch_aligned.analysis.annotated_sets import open_annotated_set
from patch_aligned.analysis.image_progress import image_progress
from patch_aligned.analysis.output_folder import require_output_folder
from patch_aligned.analysis.token_map import PursuitSettings, TokenMaps, token_maps
from patch_aligned.analysis.token_map_figure import save_token_map_figures
from patch_aligned.analysis.token_map_page import write_token_map_page
from patch_aligned.dataset.image_files import image_path


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
