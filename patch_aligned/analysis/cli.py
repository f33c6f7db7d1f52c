"""The command `patch-aligned analyze`: any number of projectors on one set of images, as a report."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llava.command import RunRecord, clear_errors

if TYPE_CHECKING:
    from rich.console import Console

    from patch_aligned.models.base import VisionLanguageModel

ProjectorOption = Annotated[
    list[str],
    typer.Option(
        "--projector",
        "--model",
        metavar="NAME=PATH",
        help="A projector or a whole model under a name; repeat for each. PATH is an --output_dir of stage 1, an "
        "mm_projector.bin, a full checkpoint, the folder or hub name of a model of transformers, or `random[:SEED]` "
        "for untrained weights.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The language model of LLaVA's projectors (folder or hub name). Only its word embeddings and "
        "tokenizer are read. Whole models have their own.",
    ),
]
VisionTowerOption = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="The vision tower. Default: the one the projectors' configs name."),
]
AspectRatioOption = Annotated[
    Literal["square", "pad"] | None,
    typer.Option(help="How images are made square. Default: as in the projectors' configs."),
]
DeviceOption = Annotated[
    str, typer.Option(help="Where towers, projectors and pursuit run: `cpu`, `cuda`, `cuda:1` ...")
]
EnglishOption = Annotated[
    Literal["auto", "pyspellchecker", "nltk", "none"],
    typer.Option(help="Which list tells English words; `auto` takes one that is installed."),
]


app = typer.Typer(rich_markup_mode="markdown")


@app.command(epilog="How to read the numbers: docs/measures.md. The report: docs/analysis.md.")
@clear_errors
def analyze(
    context: typer.Context,
    projector: ProjectorOption,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Annotated images: PAD, COCO's instances, or GranD-f.")],
    image_folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder that the image ids are relative to.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where report.html, report.md, analysis.json and the pictures go.")
    ],
    base: BaseOption = None,
    vision_tower: VisionTowerOption = None,
    data_format: Annotated[
        Literal["auto", "pad", "coco", "grandf"], typer.Option(help="Of --data; `auto` tells it by the first record.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images.")] = None,
    subset: Annotated[
        Literal["random", "first"], typer.Option(help="Which, with --limit: chosen by --seed, or the file's first.")
    ] = "random",
    seed: Annotated[int, typer.Option(help="Of the random subset, the shuffled labels and the intervals.")] = 0,
    random_init: Annotated[
        int, typer.Option(min=0, help="Untrained projectors of each shape to measure beside, as mean and sd; 0: none.")
    ] = 3,
    threshold_rule: Annotated[
        Literal["mid_range", "otsu", "mean_std", "top_area"],
        typer.Option(help="Which tokens of a cosine map are the prediction; analysis.json has Align under each."),
    ] = "mid_range",
    min_coverage: Annotated[
        float, typer.Option(min=0.01, max=1, help="A token belongs to a region that covers this share of its cell.")
    ] = 0.5,
    region_kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only regions whose extra key `kind` has this value, such as `object`."),
    ] = None,
    region_unit: Annotated[
        Literal["instance", "label"],
        typer.Option(help="A region is one annotated instance, or all instances of a label in an image together."),
    ] = "instance",
    positive_threshold: Annotated[
        bool,
        typer.Option("--positive-threshold", help="Raise thresholds below 0 to 0, as the paper's equation 3 has it."),
    ] = False,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|auto",
            help="Run the LLMs too: how much they read of the names of what is shown. `auto`: the labels of --data; "
            "FILE: one name a line, further forms after commas (`mouse, mice`).",
        ),
    ] = None,
    name_stem: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Beginning of the answer that names follow; repeat for several, of which scores are the mean. "
            "Default: `A picture of a` and `A picture with the`.",
            show_default=False,
        ),
    ] = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(
            help="An image that is missing, broken, or of another size than its record's: `fail` stops, `skip` leaves "
            "it out and lists it in the report."
        ),
    ] = "fail",
    resamples: Annotated[int, typer.Option(min=0, help="Draws of images behind an interval; 0: none.")] = 2000,
    image_aspect_ratio: AspectRatioOption = None,
    picture_rows: Annotated[int, typer.Option(min=0, help="Images in localisation.png; 0 draws none.")] = 4,
    token_maps: Annotated[int, typer.Option(min=0, help="Of them, images with token maps; 0: none.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Words a patch in the token maps.")] = 3,
    english: EnglishOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one pass through a tower of LLaVA.")] = 8,
    device: DeviceOption = "cpu",
) -> None:
    """Analyse projectors side by side, on images whose regions are labelled: one report, and every number as JSON.

    How much does a projector compress (**entropy** before and after), can a label's word embedding find its place in
    the image (**Align**), and how near are a region's visual tokens to its label (**cosine**, beside it the same with
    wrong labels)? With intervals, by size and label, and as differences; with pictures of where labels are found and
    which words are on the patches.

    Projectors of one tower see the same features, in float32. The language model itself is run for `--names` alone.

    Example:

    `patch-aligned analyze --projector llava=runs/captions --projector ours=runs/patch --base models/vicuna-7b-v1.5
    --data annotations/instances_val2017.json --image-folder val2017 --limit 100 --output runs/analysis`
    """
    from patch_aligned.analysis import report, run, words
    from patch_aligned.analysis.localisation import require_matplotlib
    from patch_aligned.analysis.names import STEMS, NameSettings, read_name_file
    from patch_aligned.files import sha256_of
    from patch_aligned.images import image_path
    from patch_aligned.intervals import Resampling

    measure = run.MeasureSettings(
        data=data,
        image_folder=image_folder,
        threshold_rule=threshold_rule,
        positive_threshold=positive_threshold,
        min_coverage=min_coverage,
        limit=limit,
        region_kind=region_kind,
        region_unit=region_unit,
        seed=seed,
        batch_size=batch_size,
        picture_rows=picture_rows,
        data_format=data_format,
        subset=subset,
        on_error=on_error,
    )
    # Whatever can be wrong with the options is found before the first large file is read.
    _require_file("--data", data)
    if not image_folder.is_dir():
        raise FileNotFoundError(f"--image-folder {image_folder}: there is no such folder.")
    _require_output_folder(output)
    asked = None
    if names is not None:
        known = None if names == "auto" else read_name_file(_require_file("--names", Path(names)))
        asked = NameSettings(known, tuple(name_stem or STEMS))
    elif name_stem:
        raise ValueError("--name-stem: found it without --names; pass --names auto or --names FILE too.")
    if english != "auto":
        words.english_words(english)
    require_matplotlib()

    console, models = _console(), _load(projector, base, vision_tower, image_aspect_ratio, device)
    with console.status("Hashing weights and data"):
        provenance = report.provenance_of(models)
        hashes = {"data": sha256_of(data), **provenance["sha256"]}
    record = RunRecord(output, context.params, hashes, resumes=False)
    with _progress(f"Analysing {len(models)} projectors", console) as on_images:
        settings = run.AnalysisSettings(measure, Resampling(resamples, seed), tuple(range(random_init)), asked)
        analysis = run.analyse(models, settings, on_images)
    shown = [(row.image_id, image_path(image_folder, row.image_id)) for row in analysis.picture[:token_maps]]
    maps = None
    if shown:
        with _progress("Finding words", console) as on_images:
            maps = words.token_maps(models, shown, words.PursuitSettings(rounds), english, on_images)
    with console.status("Writing the report"):
        written = report.write_report(analysis, output, maps, provenance)
        record.end()
    for table_of in (report.headline_table, report.health_table, report.names_table):
        if table := table_of(analysis):
            console.print(table.text())
    if analysis.broken_images:
        console.print(
            f"Left out: {len(analysis.broken_images):,} images that cannot be measured; report.html says why."
        )
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)


@app.command(epilog="How to read the maps: docs/analysis.md.")
@clear_errors
def token_map(
    context: typer.Context,
    projector: ProjectorOption,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where token_map.html, token_map.json and a PNG an image go.")
    ],
    base: BaseOption = None,
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="An image; repeat for each.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of --image: the first images of a file as analyze takes it."),
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the image ids of --data are relative to.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many images of --data.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Words a patch.")] = 5,
    choice: Annotated[
        Literal["signed", "absolute"],
        typer.Option(help="Words are chosen by their largest product, as in the paper, or by its largest magnitude."),
    ] = "signed",
    orthogonal: Annotated[
        bool, typer.Option("--orthogonal", help="Refit all words each round (orthogonal matching pursuit).")
    ] = False,
    unscaled: Annotated[
        bool, typer.Option("--unscaled", help="Take the words as they are: Algorithm 1 to the letter.")
    ] = False,
    english: EnglishOption = "auto",
    png: Annotated[bool, typer.Option(help="Whether a PNG is drawn for each image.")] = True,
    cosine_maps: Annotated[
        bool, typer.Option("--cosine-maps", help="Draw the cosines of each round beside its words (Figure 6).")
    ] = False,
    vision_tower: VisionTowerOption = None,
    image_aspect_ratio: AspectRatioOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Show the words on the patches of images: which words each visual token is made of, by matching pursuit.

    One map a word and projector, over the image: the nearest word of each patch, then the nearest of what is left of
    it, and so on. The larger a word, the larger its cosine; English words are coloured.

    Example:

    `patch-aligned token-map --projector llava=runs/captions --projector ours=runs/patch
    --base models/vicuna-7b-v1.5 --image street.jpg --output runs/token_map`
    """
    from patch_aligned.analysis.localisation import require_matplotlib
    from patch_aligned.analysis.report import local_sources
    from patch_aligned.analysis.token_map import save_token_map_figures, write_token_map_page
    from patch_aligned.analysis.words import PursuitSettings, token_maps
    from patch_aligned.files import sha256_of

    chosen = _chosen_images(image or [], data, image_folder, limit)
    _require_output_folder(output)
    if png:
        require_matplotlib()

    console, models = _console(), _load(projector, base, vision_tower, image_aspect_ratio, device)
    configs = {source: Path(source, "config.json") for source in local_sources(models)}  # weights take a minute to hash
    hashes = {name: sha256_of(path) for name, path in [*chosen, *configs.items()] if path.is_file()}
    record = RunRecord(output, context.params, hashes, resumes=False)
    with _progress("Decomposing images", console) as on_images:
        settings = PursuitSettings(rounds, choice == "absolute", orthogonal, not unscaled)
        maps = token_maps(models, chosen, settings, english, on_images)
    written = write_token_map_page(maps, output)
    if png:
        with _progress("Drawing", console) as on_images:
            written += save_token_map_figures(maps, output, on_images, cosine_maps=cosine_maps)
    record.end()
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)


@app.command(epilog="What to do with the number: docs/troubleshooting_projector.md.")
@clear_errors
def reads(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="LLaVA's --output_dir, or a folder or hub name of transformers.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Captions not trained on: LLaVA's training file, or PAD.")],
    image_folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder that the images are relative to.")],
    base: BaseOption = None,
    vision_tower: VisionTowerOption = None,
    limit: Annotated[int, typer.Option(min=9, help="At most so many captions, chosen by --seed.")] = 180,
    seed: Annotated[int, typer.Option(help="Of the captions, of the other pictures and of the interval.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON with each caption's score.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure whether a language model looks at the picture at all: any family, no masks.

    How much likelier is a caption after its own picture than after nine pictures, its own and eight others? In nats: 0
    or below is blind, and log 9 = 2.20 a caption is the most.

    Example: `patch-aligned reads runs/captions --base models/vicuna-7b-v1.5 --data held_out.json --image-folder images`
    """
    from patch_aligned.intervals import Resampling
    from patch_aligned.models import reads as of_captions
    from patch_aligned.tables import Cell, Table, number

    captions = of_captions.read_captions(_require_file("--data", data))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)  # before the work that it is for
    chosen = random.Random(seed).sample(captions, min(limit, len(captions)))
    console = _console()
    with console.status("Loading the model"):
        reader = of_captions.open_reader(model, base, vision_tower, device)
    with _progress("Reading captions", console) as on_images:
        rows = of_captions.measure_reads(reader, chosen, image_folder, seed, lambda done: on_images(done, len(chosen)))
    metrics = of_captions.reads_metrics(rows, Resampling(seed=seed))
    columns = [f"nats, of at most {math.log(of_captions.PICTURES):.2f}", *metrics]
    cells = [[Cell(name), *(Cell(number(value)) for value in row)] for name, *row in metrics.itertuples()]
    console.print(Table(f"{Path(model).name}: {len(rows)} captions", columns, cells).text())
    if output is not None:
        report = of_captions.reads_json({"model": model, "data": str(data), "seed": seed}, metrics, rows)
        output.write_text(report, encoding="utf-8")
        console.print(f"Written: {output}", soft_wrap=True)


@app.command(epilog="Families and limits: docs/vlm.md.")
@clear_errors
def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a model of transformers.")],
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="An image, drawn with the cells over it.")] = None,
    size: Annotated[
        str, typer.Option(metavar="WxH", help="Without --image: width and height of an image, pixels.")
    ] = "640x480",
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the picture goes.")] = Path("cells.png"),
) -> None:
    """Show where the visual tokens of a vision-language model look. Its weights are not needed.

    Family, image processor, the module that reads the visual tokens, the modules of the projector, and for each grid
    the size of its cells. The layout is checked on a tiny random copy of the model: parts of an image are painted over,
    and the tokens that change are compared with it.

    Example: `patch-aligned inspect Qwen/Qwen3-VL-2B-Instruct --image cat.jpg`
    """
    from patch_aligned.analysis.places import describe_grid, draw_cells, inspect_model
    from patch_aligned.images import decode_image

    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if sides is None:
        raise ValueError(f"--size {size}: expected a width and a height in pixels, such as 640x480.")
    image_wh, opened = (int(sides[1]), int(sides[2])), None
    if image is not None:
        _require_file("--image", image)
        opened = decode_image(image)
        image_wh = opened.size
    found = inspect_model(model, image_wh)
    lines = {
        "family": found.model_type,
        "image processor": found.image_processor,
        "visual tokens": f"{found.layout.length} of an image of {image_wh[0]} x {image_wh[1]} px, id {found.token_id}",
        "read by": found.decoder,
        "projector": ", ".join(found.projector) or "not known for this family",
        "grids": "; ".join(map(describe_grid, found.layout.grids)),
        "check": f"{found.check.changed} tokens changed, {found.check.missed} missed, {found.check.foreign} elsewhere",
    }
    for name, value in lines.items():
        typer.echo(f"{name + ':':17}{value}")
    if opened is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_cells(opened, found.layout).save(output)
        typer.echo(f"Written: {output}")
    if not found.check.passed:
        raise ValueError(
            f"{model}: its visual tokens do not look where the layout says. Report the release of transformers and the "
            "model; do not train or measure with this layout."
        )


@app.command(epilog="Families and limits: docs/vlm.md.")
@clear_errors
def coverage(
    context: typer.Context,
    model: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub names; weights not needed.")],
    data: Annotated[Path, typer.Option(metavar="PAD", help="Images with regions, as annotate writes them.")],
    min_coverage: Annotated[
        float, typer.Option(min=0.01, max=1, help="A token belongs to a region that covers this share of its cell.")
    ] = 0.5,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images.")] = None,
) -> None:
    """Count which share of regions keeps a visual token, by size of the region and kind of grid, models side by side.

    A region that covers no token is in neither loss nor measures. Cells differ between models by a factor of four.

    Example: `patch-aligned coverage Qwen/Qwen3-VL-2B-Instruct google/gemma-3-4b-it --data pad.jsonl`
    """
    from patch_aligned.analysis.places import coverage_of_models
    from patch_aligned.tables import Cell, Table, number

    _require_file("--data", data)
    console = _console()
    with _progress("Reading regions", console) as on_images:
        shares = coverage_of_models(model, data, min_coverage, limit, lambda done: on_images(done, limit))
    rows = [
        [Cell(name, kind), *(Cell(number(share)) for share in row)]
        for (name, kind), row in zip(shares.index, shares.to_numpy().tolist(), strict=True)
    ]
    console.print(Table("Share of regions that keep a token", ["model (grid)", *shares.columns], rows).text())


def _chosen_images(
    images: Sequence[Path], data: Path | None, image_folder: Path | None, limit: int
) -> list[tuple[str, Path]]:
    """Id and path of each image, from files or from a set of annotated images."""
    from patch_aligned.annotated_sets import open_annotated_set
    from patch_aligned.images import image_path

    if bool(images) == (data is not None):
        given = "both" if images else "neither"
        raise ValueError(f"Found {given} of --image and --data; expected one: pass --image FILE, or --data FILE.")
    if data is None:
        for path in images:
            _require_file("--image", path)
        return [(path.name, path) for path in images]
    _require_file("--data", data)
    if image_folder is None or not image_folder.is_dir():
        found = "nothing" if image_folder is None else f"{image_folder}, which is no folder"
        raise ValueError(f"--image-folder: found {found}; expected the folder that the ids of {data} are relative to.")
    ids = [image.image_id for image in open_annotated_set(data, image_folder).choose(limit)]
    chosen = [(image_id, image_path(image_folder, image_id)) for image_id in ids]
    if not chosen:
        raise ValueError(f"--data {data}: found no record; expected at least one image.")
    if missing := [path for _, path in chosen if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: there is no such file. Is --image-folder {image_folder} the right one?")
    return chosen


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False)  # names and paths may hold brackets


def _load(projectors: Sequence[str], *how: Any) -> list[VisionLanguageModel]:
    """Load models as `load_models` does, without the bars of transformers."""
    from transformers.utils import logging as transformers_logging

    from patch_aligned.models.load import load_models

    transformers_logging.disable_progress_bar()
    return load_models(projectors, *how)


def _require_file(option: str, path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file.")
    return path


def _require_output_folder(output: Path) -> None:
    """Check that `output` is a folder that can be written to, or can be made; nothing is made here."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--output {output}: found a file at {existing}; expected a folder, or nothing yet.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output}: {existing} may not be written to; expected a folder that may.")


@contextmanager
def _progress(description: str, console: Console) -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar while the block runs; yields the callback that takes how much is done, and of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
