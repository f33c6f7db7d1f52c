"""The command `patch-aligned reselect`: other thresholds, NMS or labels, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from patch_aligned.command_errors import clear_errors

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
    box_threshold: Annotated[
        float, typer.Option("--box_threshold", min=0, max=1, help="A box's score has to be above it.")
    ] = 0.25,
    text_threshold: Annotated[
        float,
        typer.Option("--text_threshold", min=0, max=1, help="A token's score has to be above it to be in the phrase."),
    ] = 0.2,
    nms_iou: Annotated[
        float, typer.Option("--nms_iou", min=0, max=1, help="Of two boxes that overlap more only the better one stays.")
    ] = 0.5,
    label_mode: Annotated[
        Literal["phrase", "best_tag"],
        typer.Option(
            "--label_mode", help="Name regions by Grounding DINO's phrase, or by the tag of the image that fits best."
        ),
    ] = "phrase",
    min_box_area_px: Annotated[
        float, typer.Option("--min_box_area_px", min=0, help="Boxes with a smaller area within the image are left out.")
    ] = 0,
    keep_candidates: Annotated[
        bool, typer.Option("--keep_candidates", help="Keep the boxes before NMS, to reselect again.")
    ] = False,
) -> None:
    """Chooses and names regions anew, from the boxes that an annotation run kept at low thresholds.

    No model is needed, and masks are taken over. So the choice may get stricter, and labels may change; a box that was
    never segmented can't become a region. If the new thresholds ask for one, nothing is written, and the boxes are
    named. `annotate --segment_candidates` makes masks for all of them, at the price of more time for SAM.

    `FILE.settings.json` says how the regions were chosen. Of a run, `FILE.skipped.jsonl` lists the images without any.

    Example:

    `patch-aligned reselect runs/pad --box_threshold 0.35 --label_mode best_tag --output pad_035.jsonl.gz`
    """
    from patch_aligned.annotate.reselect import reselect as reselect_records
    from patch_aligned.annotate.selection import Selection

    selection = Selection(box_threshold, text_threshold, nms_iou, label_mode, min_box_area_px)
    before, after = reselect_records(source, output, selection, keep_candidates=keep_candidates)
    for name, was, now in (
        ("images with regions", before.images, after.images),
        ("regions", before.regions, after.regions),
        ("different tags", len(before.tags), len(after.tags)),
    ):
        typer.echo(f"{name:<20} {was:>12,} -> {now:,}")
    typer.echo(f"Wrote {output}")
