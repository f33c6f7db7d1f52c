"""The command `patch-aligned reselect`: other thresholds, NMS or labels, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava.command import clear_errors

app = typer.Typer(rich_markup_mode="markdown")


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
