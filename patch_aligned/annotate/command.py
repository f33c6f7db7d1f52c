"""What `patch-aligned annotate` does: list the images, choose an engine, watch it, sum up."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from patch_aligned.annotate.annotate_images import Workload
from patch_aligned.annotate.engines import Engine, Place, place_of, run_here, run_with_ray
from patch_aligned.annotate.job import AnnotationJob
from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.progress import ProgressReport, show_summary
from patch_aligned.annotate.recipes import Recipe
from patch_aligned.annotate.run_folder import RunFolder


def run_annotate(
    *,
    images: Path,
    image_folder: Path | None,
    output: Path,
    recipe: Recipe,
    workload: Workload,
    engine: Engine,
    shard_size: int,
    device: str,
    ray_workers: int | None,
    retry: frozenset[str] = frozenset(),
) -> RunFolder:
    """Annotates images into `output`; the arguments are the options of the command.

    Raises:
        ValueError: an input does not fit; the message says which and what to do.
        OSError: a file or folder is missing or broken.
    """
    place = Place(0, 1, device) if engine == "ray" else place_of(engine, device)
    entries, root = list_images(images, image_folder)
    # Ray's workers may start in another folder.
    job = AnnotationJob(entries, root.resolve(), output.resolve(), recipe, workload, shard_size, retry)
    console = Console()
    transformers_logging.disable_progress_bar()
    if place.rank == 0:
        console.print(f"{len(entries):,} images. Loading the models", soft_wrap=True)
    with ProgressReport(console, place) as report:
        if engine == "ray":
            folder = run_with_ray(job, ray_workers, device, report)
        else:
            folder = run_here(job, place, report)
    if place.rank == 0:
        show_summary(console, folder)
    return folder
