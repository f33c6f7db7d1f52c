"""The commands `patch-aligned annotate`, `patch-aligned reselect` and `patch-aligned models fetch`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llava.command import RunRecord, clear_errors
from patch_aligned.annotate.options import (
    DETECTOR,
    REVISION_HELP,
    SAM,
    Engine,
    ModelOptions,
    Selection,
    Workload,
    with_options,
    work_option,
)

if TYPE_CHECKING:
    from patch_aligned.annotate.folder import RunFolder

app = typer.Typer(rich_markup_mode="markdown")
models_app = typer.Typer(name="models", no_args_is_help=True, help="The models that annotate.")
app.add_typer(models_app)


@app.command(epilog="Output, statuses and many GPUs: docs/annotation.md.")
@clear_errors
@with_options
def annotate(
    context: typer.Context,
    images: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="A folder of images, or a list: .txt with a path a line, .jsonl, LLaVA's .json."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="For manifest, settings and shards. The same command resumes it.")
    ],
    models: ModelOptions,
    selection: Selection,
    workload: Workload,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the paths of a list start from. Needed for a list.")
    ] = None,
    engine: Annotated[Engine, work_option(help="One process, one of several (RANK, WORLD_SIZE), or Ray.")] = "local",
    ray_workers: Annotated[int | None, work_option(min=1, help="Actors. Default: one a GPU.")] = None,
    device: Annotated[str, work_option(help="`auto`, `cpu`, `cuda:1` ...")] = "auto",
    shard_size: Annotated[int, work_option(min=1, help="Images a shard.")] = 2000,
    retry: Annotated[
        str | None,
        work_option(metavar="STATUS[,STATUS]", help="Annotate records of these statuses again, such as `unreadable`."),
    ] = None,
) -> None:
    """Annotate images with regions: RAM tags, Grounding DINO boxes the tags, SAM masks the boxes; or SAM 3 does both.

    The work is divided into shards, each a file that is written atomically. Repeat an interrupted command to resume
    it. Every image gets one record, with its status. Afterwards `patch-aligned merge` makes one file.

    Example:

    `patch-aligned annotate --images blip_laion_cc_sbu_558k.json --image_folder images --output runs/pad
    --ram models/ram_swin_large_14m.pth --ram_tag_list models/ram_tag_list.txt
    --ram_thresholds models/ram_tag_list_threshold.txt`
    """
    from patch_aligned.annotate.manifest import list_images
    from patch_aligned.annotate.run import AnnotationJob, run_annotate, statuses_named
    from patch_aligned.annotate.stages import build_stages

    models, statuses = models.resolved(), statuses_named(retry)
    entries, root = list_images(images, image_folder)
    build = partial(build_stages, models, selection, entries=entries)
    # Ray's workers may start in another folder.
    job = AnnotationJob(entries, root.resolve(), output.resolve(), build, workload, shard_size, statuses)

    def begin_record(folder: RunFolder) -> Callable[[], None]:
        # settings.json holds the hashes of all files of the models.
        hashes = {"images": folder.settings["manifest_sha256"], "settings.json": folder.settings_sha256}
        record = RunRecord(folder.path, context.params, hashes)
        record.begin()
        return record.end

    run_annotate(job, engine, device, ray_workers, begin_record)


@models_app.callback()
def _models() -> None:
    """The models that annotate."""


@models_app.command()
@clear_errors
def fetch(
    context: typer.Context,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the files are stored.")] = Path(
        "playground/data/annotation_models"
    ),
    ram: Annotated[Literal["ram", "ram_plus"], typer.Option(help="Which tagger.")] = "ram",
    detector: Annotated[str, typer.Option(help="Hub name of Grounding DINO.")] = DETECTOR,
    detector_revision: Annotated[str | None, typer.Option(metavar="COMMIT", help=REVISION_HELP)] = None,
    sam: Annotated[str, typer.Option(help="Hub name of SAM or SAM 2.")] = SAM,
    sam_revision: Annotated[str | None, typer.Option(metavar="COMMIT", help=REVISION_HELP)] = None,
) -> None:
    """Download RAM with its tag list and thresholds, Grounding DINO and SAM, and check existing files.

    RAM's files are checked against their published hashes. Without a network, the error lists which file to put where.
    """
    from patch_aligned.annotate.fetch import RAM_WEIGHTS, TAG_FILES, fetch_models, folder_name

    weights = RAM_WEIGHTS[ram]
    fetch_models(output, [weights, *TAG_FILES], {detector: detector_revision, sam: sam_revision})
    typer.echo(
        f"All files are there. Next: patch-aligned annotate --ram {output / weights.name} "
        f"--ram_tag_list {output / TAG_FILES[0].name} --ram_thresholds {output / TAG_FILES[1].name} "
        f"--detector {output / folder_name(detector)} --sam {output / folder_name(sam)} --images ... --output ..."
    )


@app.command()
@clear_errors
@with_options
def reselect(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="OUT_OR_PAD",
            help="Output folder of `patch-aligned annotate`, or a PAD file merged with `--keep_candidates`.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="PAD file: .json, .jsonl, .jsonl.gz or .parquet.")],
    changes: Annotated[dict[str, Any], Selection],
    keep_candidates: Annotated[
        bool, typer.Option("--keep-candidates", help="Keep the boxes before NMS, to reselect again.")
    ] = False,
) -> None:
    """Choose and label regions again, from the boxes that an annotation run kept at low thresholds.

    Options that are not given keep the run's value.

    No model is needed: masks are taken from the run. So a stricter choice and other labels are always possible, but a
    box that was never segmented cannot become a region. If the new thresholds would select such boxes, nothing is
    written and the error lists them. `annotate --segment_candidates` makes masks for all boxes, which takes SAM longer.

    `FILE.settings.json` records how the regions were chosen. For a run, `FILE.skipped.jsonl` lists the images without
    regions.

    Example:

    `patch-aligned reselect runs/pad --box_threshold 0.35 --label_mode best_tag --output pad_035.jsonl.gz`
    """
    from patch_aligned.annotate.reselect import reselect as reselect_records

    before, after = reselect_records(source, output, changes, keep_candidates=keep_candidates)
    for name, was, now in (
        ("images with regions", before.images, after.images),
        ("regions", before.regions, after.regions),
        ("different tags", len(before.tags), len(after.tags)),
    ):
        typer.echo(f"{name:<20} {was:>12,} -> {now:,}")
    typer.echo(f"Wrote {output}")


@app.command()
@clear_errors
def merge(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder of `patch-aligned annotate`.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="PAD file: .json, .jsonl, .jsonl.gz or .parquet.")],
    keep_all: Annotated[
        bool, typer.Option("--all", help="Take images that ended without regions too, if they could be read.")
    ] = False,
    keep_candidates: Annotated[bool, typer.Option("--keep-candidates", help="Keep the boxes before NMS.")] = False,
) -> None:
    """Merge the shards of a finished annotation run into one PAD file.

    The file holds one record for each image that ended `ok`, in the manifest's order. `FILE.skipped.jsonl` lists all
    others with their reason, `FILE.settings.json` says how the records were made. If shards are missing or damaged,
    nothing is written, and they are named.
    """
    from patch_aligned.annotate.folder import RunFolder
    from patch_aligned.annotate.folder import merge as merge_run

    done = merge_run(RunFolder(run), output, keep_all=keep_all, keep_candidates=keep_candidates)
    for name, count in {"images": done.images, **{f"status {name}": n for name, n in done.counts.items()}}.items():
        typer.echo(f"{name}: {count:,}")
    typer.echo(f"{output}: {done.written:,} records, {done.regions:,} regions")
    if others := done.images - done.written:
        typer.echo(f"{done.skipped}: the other {others:,} images, with the reason of each")
