"""The commands `patch-aligned annotate` and `patch-aligned models fetch`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava.command import RunRecord, clear_errors

if TYPE_CHECKING:
    from patch_aligned.annotate.folder import RunFolder

app = typer.Typer(rich_markup_mode="markdown")
models_app = typer.Typer(name="models", no_args_is_help=True, help="The models that annotate.")
app.add_typer(models_app)

_REVISION_HELP = "On the hub. Default: the pinned commit of the default model, `main` of another."

_model_option = partial(typer.Option, rich_help_panel="Models")
_choice_option = partial(typer.Option, rich_help_panel="Which boxes become regions")
_work_option = partial(typer.Option, rich_help_panel="How the work is done")


@app.command(epilog="Output, statuses and many GPUs: docs/annotation.md.")
@clear_errors
def annotate(
    context: typer.Context,
    images: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="A folder of images, or a list: .txt with a path a line, .jsonl, LLaVA's .json."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="For manifest, settings and shards. The same call goes on with it.")
    ],
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the paths of a list count from. Needed for a list.")
    ] = None,
    ram: Annotated[Path | None, _model_option(metavar="FILE", help="RAM's or RAM++'s .pth.")] = None,
    ram_tag_list: Annotated[Path | None, _model_option(metavar="FILE", help="RAM's ram_tag_list.txt.")] = None,
    ram_thresholds: Annotated[
        Path | None, _model_option(metavar="FILE", help="RAM's ram_tag_list_threshold.txt.")
    ] = None,
    resample: Annotated[
        Literal["bilinear", "bicubic"], _model_option(help="How pictures are resized for RAM.")
    ] = "bilinear",
    detector: Annotated[
        str, _model_option(help="Grounding DINO or MM Grounding DINO: folder or hub.")
    ] = "IDEA-Research/grounding-dino-tiny",
    detector_revision: Annotated[str | None, _model_option(metavar="COMMIT", help=_REVISION_HELP)] = None,
    sam: Annotated[str, _model_option(help="SAM or SAM 2: folder or hub.")] = "facebook/sam-vit-huge",
    sam_revision: Annotated[str | None, _model_option(metavar="COMMIT", help=_REVISION_HELP)] = None,
    prompt_join: Annotated[
        Literal[", ", ". "], _choice_option(metavar="', '|'. '", help="What joins the tags of a prompt.")
    ] = ", ",
    box_threshold: Annotated[float, _choice_option(help="A box's score is above it.")] = 0.25,
    text_threshold: Annotated[float, _choice_option(help="A token's score in the phrase is above it.")] = 0.2,
    nms_iou: Annotated[float, _choice_option(help="Of two boxes that overlap more one goes.")] = 0.5,
    label_mode: Annotated[
        Literal["phrase", "best_tag"],
        _choice_option(
            metavar="phrase|best_tag", help="A region is called by the tokens that its box answers to, or by one tag."
        ),
    ] = "phrase",
    min_box_area_px: Annotated[float, _choice_option(help="Of a box within the image, at least.")] = 1.0,
    candidate_box_threshold: Annotated[
        float, _choice_option(min=0, max=1, help="Candidates are kept above it, for reselect.")
    ] = 0.15,
    candidate_text_threshold: Annotated[float, _choice_option(min=0, max=1, help="Likewise for their tokens.")] = 0.15,
    segment_candidates: Annotated[
        bool,
        _choice_option(
            "--segment-candidates",
            help="Make masks for all candidates, so that reselect may choose any. Costs SAM's time.",
        ),
    ] = False,
    engine: Annotated[
        Literal["local", "torchrun", "ray"],
        _work_option(help="One process, one of several (RANK, WORLD_SIZE), or Ray."),
    ] = "local",
    ray_workers: Annotated[int | None, _work_option(min=1, help="Actors. Default: one a GPU.")] = None,
    device: Annotated[str, _work_option(help="`auto`, `cpu`, `cuda:1` ...")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _work_option(help="`auto`: bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto",
    shard_size: Annotated[int, _work_option(min=1, help="Images a shard.")] = 2000,
    on_error: Annotated[
        Literal["skip", "fail"], _work_option(help="Record images that fail, or stop after their shard.")
    ] = "skip",
    retry: Annotated[
        str | None,
        _work_option(metavar="STATUS[,STATUS]", help="Make the records of these statuses anew, such as `unreadable`."),
    ] = None,
    allow_missing: Annotated[
        bool, _work_option("--allow-missing", help="Record shards of which no image is there, as if all were lost.")
    ] = False,
    tag_batch: Annotated[int, _work_option(min=1, help="Images tagged at a time.")] = 64,
    detect_batch: Annotated[int, _work_option(min=1, help="Images of one size detected at a time.")] = 8,
    segment_batch: Annotated[int, _work_option(min=1, help="Images segmented at a time.")] = 8,
    chunk: Annotated[
        int,
        _work_option(
            min=1, help="Decoded images in memory, in each chunk. One of 12 megapixels takes 36 MB: 32 for such."
        ),
    ] = 256,
    chunks_at_once: Annotated[
        int, _work_option(min=1, help="While one is on the device others are prepared: more if a GPU waits.")
    ] = 2,
    decode_workers: Annotated[int, _work_option(min=1, help="Threads that decode.")] = 8,
    min_side: Annotated[int, _work_option(min=1, help="Images with a shorter side are skipped.")] = 16,
    max_aspect: Annotated[float, _work_option(min=1, help="Images that are narrower are skipped.")] = 10.0,
) -> None:
    """Annotates images with regions: RAM tags, Grounding DINO boxes the tags, SAM masks the boxes.

    The work is cut into shards, each one file that appears whole or not at all: a call that was interrupted is made
    again and goes on. Every image gets one record, with its status. Afterwards `patch-aligned merge` makes one file.

    Example:

    `patch-aligned annotate --images blip_laion_cc_sbu_558k.json --image_folder images --output runs/pad
    --ram models/ram_swin_large_14m.pth --ram_tag_list models/ram_tag_list.txt
    --ram_thresholds models/ram_tag_list_threshold.txt`
    """
    from patch_aligned.annotate.fetch import revision_of
    from patch_aligned.annotate.pipeline import Workload
    from patch_aligned.annotate.regions import CandidateThresholds, Selection
    from patch_aligned.annotate.run import ModelRecipe, run_annotate, statuses_named

    if ram is None or ram_tag_list is None or ram_thresholds is None:
        raise ValueError(
            "--ram, --ram_tag_list, --ram_thresholds: not all are given. `patch-aligned models fetch` gets the files"
        )
    recipe = ModelRecipe(
        ram=ram.resolve(),
        ram_tag_list=ram_tag_list.resolve(),
        ram_thresholds=ram_thresholds.resolve(),
        detector=str(Path(detector).resolve()) if Path(detector).is_dir() else detector,
        sam=str(Path(sam).resolve()) if Path(sam).is_dir() else sam,
        detector_revision=revision_of(detector, detector_revision),
        sam_revision=revision_of(sam, sam_revision),
        resample=resample,
        prompt_join=prompt_join,
        candidate_thresholds=CandidateThresholds(candidate_box_threshold, candidate_text_threshold),
        selection=Selection(box_threshold, text_threshold, nms_iou, label_mode, min_box_area_px),
        segment_candidates=segment_candidates,
        dtype=dtype,
    )
    workload = Workload(
        tag_batch=tag_batch,
        detect_batch=detect_batch,
        segment_batch=segment_batch,
        chunk=chunk,
        decode_workers=decode_workers,
        chunks_at_once=chunks_at_once,
        min_side=min_side,
        max_aspect=max_aspect,
        on_error=on_error,
        allow_missing=allow_missing,
    )

    def begin_record(folder: RunFolder) -> Callable[[], None]:
        # settings.json holds the hashes of all files of the models.
        hashes = {"images": folder.settings["manifest_sha256"], "settings.json": folder.settings_sha256}
        record = RunRecord(folder.path, context.params, hashes)
        record.begin()
        return record.end

    run_annotate(
        images=images,
        image_folder=image_folder,
        output=output,
        recipe=recipe,
        workload=workload,
        engine=engine,
        shard_size=shard_size,
        device=device,
        ray_workers=ray_workers,
        retry=frozenset() if retry is None else statuses_named(retry),
        begin_record=begin_record,
    )


@models_app.callback()
def _models() -> None:
    """The models that annotate."""


@models_app.command()
@clear_errors
def fetch(
    context: typer.Context,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = Path(
        "playground/data/annotation_models"
    ),
    ram: Annotated[Literal["ram", "ram_plus"], typer.Option(help="Which tagger.")] = "ram",
    detector: Annotated[str, typer.Option(help="Hub name of Grounding DINO.")] = "IDEA-Research/grounding-dino-tiny",
    detector_revision: Annotated[str | None, typer.Option(metavar="COMMIT", help=_REVISION_HELP)] = None,
    sam: Annotated[str, typer.Option(help="Hub name of SAM or SAM 2.")] = "facebook/sam-vit-huge",
    sam_revision: Annotated[str | None, typer.Option(metavar="COMMIT", help=_REVISION_HELP)] = None,
) -> None:
    """Fetches RAM with its tag list and thresholds, Grounding DINO and SAM, and checks what is there already.

    RAM's files are checked against their published hashes. Without a network it says which file belongs where.
    """
    from patch_aligned.annotate.fetch import RAM_WEIGHTS, TAG_FILES, HubCheckpoint, fetch_models, revision_of

    weights = RAM_WEIGHTS[ram]
    detector_checkpoint = HubCheckpoint(detector, revision_of(detector, detector_revision))
    sam_checkpoint = HubCheckpoint(sam, revision_of(sam, sam_revision))
    fetch_models(output, [weights, *TAG_FILES], [detector_checkpoint, sam_checkpoint])
    typer.echo(
        f"All there. Next: patch-aligned annotate --ram {output / weights.name} "
        f"--ram_tag_list {output / TAG_FILES[0].name} --ram_thresholds {output / TAG_FILES[1].name} "
        f"--detector {output / detector_checkpoint.folder_name} --sam {output / sam_checkpoint.folder_name} "
        "--images ... --output ..."
    )


# The command `patch-aligned reselect`: other thresholds, NMS or labels, without a model.


@app.command()
@clear_errors
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
    box_threshold: Annotated[float | None, typer.Option(min=0, max=1, help="A box's score is above it.")] = None,
    text_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="A token's score in the phrase is above it.")
    ] = None,
    nms_iou: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of two boxes that overlap more one goes.")
    ] = None,
    label_mode: Annotated[
        Literal["phrase", "best_tag"] | None,
        typer.Option(help="Call a region by Grounding DINO's phrase, or by the tag that fits best."),
    ] = None,
    min_box_area_px: Annotated[float | None, typer.Option(min=0, help="Of a box within the image, at least.")] = None,
    keep_candidates: Annotated[
        bool, typer.Option("--keep-candidates", help="Keep the boxes before NMS, to reselect again.")
    ] = False,
) -> None:
    """Chooses and names regions anew, from the boxes that an annotation run kept at low thresholds.

    Options that aren't given stay as they were in the run.

    No model is needed, and masks are taken over. So the choice may get stricter, and labels may change; a box that was
    never segmented can't become a region. If the new thresholds ask for one, nothing is written, and the boxes are
    named. `annotate --segment_candidates` makes masks for all of them, at the price of more time for SAM.

    `FILE.settings.json` says how the regions were chosen. Of a run, `FILE.skipped.jsonl` lists the images without any.

    Example:

    `patch-aligned reselect runs/pad --box_threshold 0.35 --label_mode best_tag --output pad_035.jsonl.gz`
    """
    from patch_aligned.annotate.reselect import reselect as reselect_records

    options = {
        "box_threshold": box_threshold,
        "text_threshold": text_threshold,
        "nms_iou": nms_iou,
        "label_mode": label_mode,
        "min_box_area_px": min_box_area_px,
    }
    changes = {name: value for name, value in options.items() if value is not None}
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
    from tqdm import tqdm

    from patch_aligned.annotate.folder import RunFolder
    from patch_aligned.annotate.folder import merge as merge_run

    watch = partial(tqdm, desc="Merging", unit=" images", disable=None, leave=False)
    done = merge_run(RunFolder(run), output, keep_all=keep_all, keep_candidates=keep_candidates, watch=watch)
    for name, count in {"images": done.images, **{f"status {name}": n for name, n in done.counts.items()}}.items():
        typer.echo(f"{name}: {count:,}")
    typer.echo(f"{output}: {done.written:,} records, {done.regions:,} regions")
    if others := done.images - done.written:
        typer.echo(f"{done.skipped}: the other {others:,} images, with the reason of each")
