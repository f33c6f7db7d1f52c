"""The command `patch-aligned analyze`: any number of projectors on one set of images, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava.command import clear_errors

# Options that the commands which look into models share.

ProjectorOption = Annotated[
    list[str],
    typer.Option(
        "--projector",
        "--model",
        metavar="NAME=PATH",
        help="A projector or a whole model under a name; repeat for each. PATH is an --output_dir of stage 1, an "
        "mm_projector.bin, a full checkpoint, a model of transformers, or `random[:SEED]` for untrained weights.",
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
        typer.Option(help="Which tokens of a cosine map are the prediction; the report also has Align under each."),
    ] = "mid_range",
    min_coverage: Annotated[
        float, typer.Option(min=0.01, max=1, help="A token belongs to a region that covers this share of its cell.")
    ] = 0.5,
    region_kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only regions whose extra key `kind` has this value, such as `object`."),
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one pass through the tower.")] = 8,
    device: DeviceOption = "cpu",
) -> None:
    """Analyses projectors side by side, on images whose regions are labelled: one report, and every number as JSON.

    How much does a projector compress (**entropy** before and after), can a label's word embedding find its place in
    the image (**Align**), and how near are a region's visual tokens to its label (**cosine**, beside it the same with
    wrong labels)? With intervals, by size and label, and as differences; with pictures of where labels are found and
    which words are on the patches.

    Projectors of one tower see the same features, in float32. The language model itself is never run.

    Example:

    `patch-aligned analyze --projector llava=runs/captions --projector ours=runs/patch --base models/vicuna-7b-v1.5
    --data annotations/instances_val2017.json --image-folder val2017 --limit 100 --output runs/analysis`
    """
    from patch_aligned.analysis.jobs import run_analyze
    from patch_aligned.analysis.regions import Resampling
    from patch_aligned.analysis.run import AnalysisSettings, MeasureSettings
    from patch_aligned.analysis.words import PursuitSettings

    measure = MeasureSettings(
        data=data,
        image_folder=image_folder,
        threshold_rule=threshold_rule,
        min_coverage=min_coverage,
        limit=limit,
        region_kind=region_kind,
        seed=seed,
        batch_size=batch_size,
        picture_rows=picture_rows,
        data_format=data_format,
        subset=subset,
        on_error=on_error,
    )
    run_analyze(
        projectors=projector,
        settings=AnalysisSettings(measure, Resampling(resamples, seed), tuple(range(random_init))),
        output=output,
        base=base,
        vision_tower=vision_tower,
        image_aspect_ratio=image_aspect_ratio,
        token_map_images=token_maps,
        pursuit=PursuitSettings(rounds),
        english=english,
        device=device,
    )


# The command `patch-aligned token-map`: the words on the patches of images, for several projectors.


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
        bool, typer.Option("--orthogonal", help="Fit all words anew each round (orthogonal matching pursuit).")
    ] = False,
    unscaled: Annotated[
        bool, typer.Option("--unscaled", help="Take the words as they are: Algorithm 1 to the letter.")
    ] = False,
    english: EnglishOption = "auto",
    png: Annotated[bool, typer.Option(help="Whether a PNG is drawn for each image.")] = True,
    vision_tower: VisionTowerOption = None,
    image_aspect_ratio: AspectRatioOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Shows the words on the patches of images: which words each visual token is made of, by matching pursuit.

    One map a word and projector, over the image: the nearest word of each patch, then the nearest of what is left of
    it, and so on. The larger a word, the larger its cosine; English words are coloured.

    Example:

    `patch-aligned token-map --projector llava=runs/captions --projector ours=runs/patch
    --base models/vicuna-7b-v1.5 --image street.jpg --output runs/token_map`
    """
    from patch_aligned.analysis.jobs import run_token_map
    from patch_aligned.analysis.words import PursuitSettings

    run_token_map(
        projectors=projector,
        base=base,
        output=output,
        images=image or [],
        data=data,
        image_folder=image_folder,
        limit=limit,
        settings=PursuitSettings(rounds, choice == "absolute", orthogonal, not unscaled),
        english=english,
        png=png,
        vision_tower=vision_tower,
        image_aspect_ratio=image_aspect_ratio,
        device=device,
    )
