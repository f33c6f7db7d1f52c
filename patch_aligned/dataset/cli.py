"""Commands on PAD files: `patch-aligned verify`, `stats`, `view`, `quality`, `join` and `publish`."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava.command import clear_errors

if TYPE_CHECKING:
    from patch_aligned.tables import Table

app = typer.Typer(rich_markup_mode="markdown")

File = Path | None
PadFile = Annotated[Path, typer.Argument(metavar="PAD", help="JSON, JSON lines, either gzipped, or Parquet.")]
Grid = Annotated[int, typer.Option(min=1, help="Rows and columns of visual tokens.")]
Side = Annotated[int, typer.Option(min=1, help="Width and height of the model's image, pixels.")]
AspectRatio = Annotated[
    Literal["square", "pad"], typer.Option(help="How images are made square: stage 1 crops (square), stage 2 pads.")
]
MinCoverage = Annotated[
    float, typer.Option(min=0.01, max=1, help="A token belongs to a region that covers this share.")
]
Plots = Annotated[bool, typer.Option(help="Draw stats.png; needs matplotlib.")]


@app.command()
@clear_errors
def verify(
    context: typer.Context,
    pad: PadFile,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with the image files below this folder too.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes. Default: PAD.verify")
    ] = None,
    box_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the image's side by which a box may leave it.")
    ] = 0.05,
    min_mask_box_iou: Annotated[
        float, typer.Option(min=0, max=1, help="A mask whose own box has less IoU with bbox is an error.")
    ] = 0.1,
    fail_on: Annotated[
        Literal["errors", "broken_file"],
        typer.Option(help="`broken_file`: errors of single regions (box, mask, score) are listed, but are no failure."),
    ] = "errors",
) -> None:
    """Check a PAD file: format, masks' run lengths, boxes, masks against boxes, duplicates, and the image files.

    Writes `verify.json`, `verify.md` and `problems.jsonl`: one line per problem with record, field, found and expected.
    Ends with exit code 1 if there is an error that `--fail-on` counts. What is only suspicious is a warning.
    """
    from patch_aligned.dataset.verify import VerifySettings, as_table, summary, write_verification

    if image_folder is not None and not image_folder.is_dir():
        raise FileNotFoundError(f"--image-folder {image_folder}: there is no such folder.")
    settings = VerifySettings(image_folder, box_tolerance, min_mask_box_iou)
    output = output or pad.with_name(pad.name + ".verify")
    found = write_verification(pad, settings, output)
    if found.examples:
        _show(as_table(found))
    typer.echo(summary(found))
    typer.echo(f"Report: {output / 'verify.md'}, verify.json, problems.jsonl")
    if found.errors > (found.errors_of_regions if fail_on == "broken_file" else 0):
        raise typer.Exit(1)


@app.command()
@clear_errors
def stats(
    context: typer.Context,
    pad: PadFile,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where files go. Default: PAD.stats")] = None,
    grid: Grid = 24,
    side: Side = 336,
    image_aspect_ratio: AspectRatio = "square",
    min_coverage: MinCoverage = 0.5,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    plots: Plots = True,
) -> None:
    """Count images, tags, regions and masks of a PAD file, and the regions that cover no visual token.

    Writes `stats.json`, `stats.md`, `tags.tsv` and `stats.png`.
    """
    from patch_aligned.dataset.stats import TokenSettings, as_table, gather_statistics, write_statistics

    _require_matplotlib(plots)
    tokens = TokenSettings(grid, side, image_aspect_ratio, min_coverage)
    statistics = gather_statistics(pad, tokens, limit)
    output = output or pad.with_name(pad.name + ".stats")
    numbers = write_statistics(statistics, output, plots)
    _show(as_table(numbers))
    typer.echo("Most frequent tags: " + ", ".join(f"{tag!r} {n:,}" for tag, n in list(numbers["tags"].items())[:10]))
    typer.echo(f"Written: {output / 'stats.json'}, stats.md, tags.tsv{', stats.png' if plots else ''}")


@app.command()
@clear_errors
def view(
    context: typer.Context,
    pad: PadFile,
    image_folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder that the image ids are relative to.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page, such as view.html.")],
    start: Annotated[int, typer.Option(min=0, help="First record.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Most records.")] = 100,
    ids: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE_ID", help="Only this image; repeat for several.")
    ] = None,
    tag: Annotated[str | None, typer.Option(metavar="TEXT", help="Only images with this text in a tag.")] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Records on one page; more make further pages.")] = 250,
    thumbnail_side: Annotated[int, typer.Option(min=64, max=2048, help="Longest side of an embedded image.")] = 640,
    grid: Grid = 24,
    side: Side = 336,
    image_aspect_ratio: AspectRatio = "square",
    min_coverage: MinCoverage = 0.5,
) -> None:
    """Make a page to look through a PAD file: images, masks, boxes, tags, captions and covered tokens.

    The page contains everything, and needs no server and no network. Arrow keys turn its pages.
    """
    from patch_aligned.dataset.stats import TokenSettings
    from patch_aligned.dataset.view import ViewSelection, write_view

    if not image_folder.is_dir():
        raise FileNotFoundError(f"--image-folder {image_folder}: there is no such folder.")
    selection = ViewSelection(start, limit, frozenset(ids or ()), tag)
    tokens = TokenSettings(grid, side, image_aspect_ratio, min_coverage)
    viewed = write_view(
        pad,
        image_folder,
        output,
        selection=selection,
        tokens=tokens,
        page_size=page_size,
        thumbnail_side=thumbnail_side,
    )
    for page in viewed.pages:
        typer.echo(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    typer.echo(f"{viewed.images:,} images, {viewed.regions:,} regions; {viewed.without_picture:,} without a picture.")
    if viewed.without_picture == viewed.images:
        raise FileNotFoundError(f"--image-folder {image_folder}: no image could be shown. Is it the right folder?")
    if viewed.not_found:
        typer.echo(f"Not among the chosen records: {', '.join(viewed.not_found)}")
    if viewed.next_record is not None:
        typer.echo(f"There are more. Continue with --start {viewed.next_record}")


@app.command(epilog="What the figures mean, and whether labels of a quality are worth training on: docs/quality.md.")
@clear_errors
def quality(
    context: typer.Context,
    pad: PadFile,
    truth: Annotated[File, typer.Option(metavar="FILE", help="Masks that people drew: COCO instances, or PAD.")] = None,
    against: Annotated[File, typer.Option(metavar="FILE", help="Another PAD file of the same images.")] = None,
    spot_check: Annotated[File, typer.Option(metavar="DIR", help="Judge regions by eye; answers go there.")] = None,
    image_folder: Annotated[File, typer.Option(metavar="DIR", help="The ids are below it. Default: PAD's.")] = None,
    output: Annotated[File, typer.Option(metavar="DIR", help="Where the report goes. Default: PAD.quality")] = None,
    synonyms: Annotated[File, typer.Option(metavar="JSON", help="Names that mean the same: {name: [name]}.")] = None,
    words: Annotated[str | None, typer.Option(metavar="LLM", help="Compare names by its word embeddings.")] = None,
    min_cosine: Annotated[float, typer.Option(min=-1, max=1, help="From which --words means the same.")] = 0.7,
    count: Annotated[int, typer.Option(min=1, help="Regions to judge by eye.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of their draw, uniform over all regions.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page to judge on; 0 takes a free one.")] = 8301,
) -> None:
    """Measure how good labels and masks are: against a truth, against another PAD file, or by eye.

    Writes `quality.json`, `quality.html` and `worst.html`. `--spot-check` serves a page on this machine instead, which
    saves each answer at once; the same command continues.
    """
    if sum(mode is not None for mode in (truth, against, spot_check)) != 1 or (synonyms and words):
        raise ValueError("Expected one of --truth, --against, --spot-check, and at most one of --synonyms, --words.")
    from patch_aligned.pad import open_annotation_index, write_annotations

    image_folder, output = image_folder or pad.parent, output or pad.with_name(pad.name + ".quality")
    if spot_check:
        from patch_aligned.dataset.spot_check import SpotCheck, create_app
        from patch_aligned.web import listen, run_server

        listener = listen("127.0.0.1", port)
        check = SpotCheck(open_annotation_index(pad), image_folder, spot_check, count, seed)
        typer.echo(f"Judge {check.count:,} regions: http://127.0.0.1:{listener.getsockname()[1]}/ (Ctrl-C ends)")
        run_server(create_app(check), listener)
        return
    from patch_aligned.annotated_sets import open_annotated_set
    from patch_aligned.dataset.quality import compare, figures, name_rule, worst_images, write_report

    files, other = (("PAD", "truth"), truth) if truth else (("A", "B"), against or pad)
    annotated = open_annotated_set(other, image_folder, crowds=True)
    if annotated.format != "pad":
        write_annotations(annotated, kept := output / "truth.parquet")
        shutil.copystat(other, kept)  # so that the same file is not indexed again
        other = kept
    indices = [open_annotation_index(path) for path in (pad, other)]
    rule, same = name_rule(synonyms, words, min_cosine)
    terms = compare(indices, files, same)
    images = terms["image"].nunique()
    about = {files[0]: str(pad), files[1]: str(other), "names": rule, "images in both": images}
    about |= {f"images only in {file}": len(index) - images for file, index in zip(files, indices, strict=True)}
    worst = worst_images(indices, files, terms[terms["file"] == "truth"] if truth else terms, same)
    for table in write_report(figures(terms), about, worst, image_folder, output):
        if not table.title.endswith(("size", "label")):
            _show(table)
    typer.echo("; ".join(f"{name}: {value}" for name, value in about.items()))
    typer.echo(f"Written: {output / 'quality.html'}, quality.json{', worst.html' if worst else ''}")


@app.command()
@clear_errors
def join(
    context: typer.Context,
    pad: PadFile,
    samples: Annotated[Path, typer.Argument(metavar="LLAVA_JSON", help="LLaVA's training JSON.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The new PAD file.")],
    only_matched: Annotated[bool, typer.Option("--only-matched", help="Leave images without a sample out.")] = False,
) -> None:
    """Take captions and sample ids from LLaVA's training JSON, matched by the image's path.

    The caption is the first answer of the image's first sample. Images that are in only one of the two files are
    counted, and listed in `FILE.unmatched.jsonl`.
    """
    from patch_aligned.dataset.join import join as join_files

    joined = join_files(pad, samples, output, only_matched=only_matched)
    left = "left out" if only_matched else "kept with their own caption"
    for what, count in (
        ("images in both", joined.matched),
        (f"only in {pad.name}, {left}", joined.pad_only),
        (f"only in {samples.name}", joined.samples_only),
        ("further samples of an image", joined.further_samples),
        ("samples without an image, or with several", joined.without_image),
    ):
        typer.echo(f"{what}: {count:,}")
    typer.echo(f"{output}: {joined.written:,} records. Images of one side: {joined.unmatched}")


@app.command()
@clear_errors
def publish(
    context: typer.Context,
    pad: PadFile,
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    name: Annotated[str, typer.Option(metavar="USER/NAME", help="Name on the hub.")] = "USER/NAME",
    license_name: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="Such as cc-by-4.0. Default: left open in the card.")
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="settings.json of the annotation run. Default: PAD.settings.json, if there."),
    ] = None,
    records_per_file: Annotated[int, typer.Option(min=1, help="Images of one Parquet file.")] = 100_000,
    grid: Grid = 24,
    side: Side = 336,
    image_aspect_ratio: AspectRatio = "square",
    min_coverage: MinCoverage = 0.5,
    plots: Plots = True,
) -> None:
    """Make a folder for the Hugging Face hub: a dataset card with statistics, and Parquet files.

    Nothing is uploaded: the command for that is printed.
    """
    from patch_aligned.dataset.publish import publish as publish_file
    from patch_aligned.dataset.stats import TokenSettings

    _require_matplotlib(plots)
    published = publish_file(
        pad,
        output,
        name=name,
        licence=license_name,
        settings=settings,
        records_per_file=records_per_file,
        tokens=TokenSettings(grid, side, image_aspect_ratio, min_coverage),
        plots=plots,
    )
    megabytes = sum(path.stat().st_size for path in published.files) / 1e6
    typer.echo(f"{output}: {published.images:,} images; Parquet files: {len(published.files)}, {megabytes:.2f} MB")
    if license_name is None:
        typer.echo(f"Choose a licence in {output / 'README.md'}, in its first lines and in its last section.")
    typer.echo(f"Read the card, then upload: hf upload {name} {output} --repo-type dataset")


def _show(table: Table) -> None:
    from rich.console import Console

    Console().print(table.text())


def _require_matplotlib(plots: bool) -> None:
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "stats.png needs matplotlib: pip install 'patch-aligned-llava[analysis]', or pass --no-plots."
        )
