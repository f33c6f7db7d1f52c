"""The command `patch-aligned pack`: from masks to covered tokens, once for all runs of one geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava.command import clear_errors

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
@clear_errors
def pack(
    context: typer.Context,
    pad: Annotated[Path, typer.Argument(metavar="PAD", help="JSON, JSON lines, either gzipped, or Parquet.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the pack goes. Default: PAD.packed.arrow")
    ] = None,
    grid: Annotated[int, typer.Option(min=1, help="Rows and columns of visual tokens.")] = 24,
    side: Annotated[int, typer.Option(min=1, help="Width and height of the model's image, pixels.")] = 336,
    image_aspect_ratio: Annotated[
        Literal["square", "pad"], typer.Option(help="How images are made square; stage 1 crops them (square).")
    ] = "square",
    min_coverage: Annotated[
        float, typer.Option(min=0.01, max=1, help="A token belongs to a region that covers this share of its cell.")
    ] = 0.5,
    squeeze: Annotated[
        bool, typer.Option("--squeeze", help="Images are squeezed to a square, not cropped: SigLIP, anyres' base tile.")
    ] = False,
    shortest_edge: Annotated[
        int | None,
        typer.Option(min=1, help="What the processor resizes the shortest edge to, if not to the side of its output."),
    ] = None,
    processed_side: Annotated[
        int | None, typer.Option(min=1, help="Side of the processor's output, if patches leave a rest of it unseen.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken records out, as --patch_on_error skip does.")
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the converted PAD file is kept; see --patch_cache_dir.")
    ] = None,
) -> None:
    """Works out which visual tokens each region covers, so that training need not read the masks again.

    One bit a token: 72 bytes a region for 24 x 24 tokens, and its tag. Training finds `PAD.packed.arrow` beside the PAD
    file, or is told with `--patch_packed_path FILE`; its results are the same to the last bit. A pack of another
    geometry or PAD file is refused, with the command that makes the right one.

    Example:

    `patch-aligned pack PAD/pad_558k.jsonl --grid 24 --side 336 --image-aspect-ratio square --workers 8`
    """
    from dataclasses import replace
    from functools import partial

    from rich.console import Console
    from rich.progress import track

    from llava.image_geometry import ImageGeometry
    from patch_aligned.packed_tokens import PackedFor, default_pack_path, pack_tokens
    from patch_aligned.pad import AnnotationError, open_annotation_index

    index = open_annotation_index(pad, cache_dir)
    if index.rejected and not skip_broken:
        raise AnnotationError(
            f"{index.rejection_message()}\nCorrect them, or leave them out with --skip-broken.", -1, ""
        )
    kind = "anyres" if squeeze and image_aspect_ratio == "square" else image_aspect_ratio
    geometry = ImageGeometry.of(kind, (side, side), side, (grid, grid), shortest_edge)
    packed_for = PackedFor.of(replace(geometry, processed_side=processed_side), min_coverage)
    output = output or default_pack_path(index.source)
    show = partial(track, description="Packing", total=index.batches, console=Console(stderr=True), transient=True)
    pack_tokens(index, packed_for, output, workers=workers, watch=show)
    regions, size = index.regions, output.stat().st_size
    each = f", {size / regions:.0f} bytes a region" if regions else ""
    typer.echo(f"{output}: {regions:,} regions of {len(index):,} images{each}")
    typer.echo(f"Training reads it with --patch_packed_path {output}, or unasked where it stands beside the PAD file.")
