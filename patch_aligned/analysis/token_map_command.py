"""The command `patch-aligned token-map`: the words on the patches of images, for several projectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava.command import clear_errors
from patch_aligned.analysis import model_options

app = typer.Typer(rich_markup_mode="markdown")


@app.command(epilog="How to read the maps: docs/analysis.md.")
@clear_errors
def token_map(
    context: typer.Context,
    projector: model_options.ProjectorOption,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where token_map.html, token_map.json and a PNG an image go.")
    ],
    base: model_options.BaseOption = None,
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
    english: model_options.EnglishOption = "auto",
    png: Annotated[bool, typer.Option(help="Whether a PNG is drawn for each image.")] = True,
    vision_tower: model_options.VisionTowerOption = None,
    image_aspect_ratio: model_options.AspectRatioOption = None,
    device: model_options.DeviceOption = "cpu",
) -> None:
    """Shows the words on the patches of images: which words each visual token is made of, by matching pursuit.

    One map a word and projector, over the image: the nearest word of each patch, then the nearest of what is left of
    it, and so on. The larger a word, the larger its cosine; English words are coloured.

    Example:

    `patch-aligned token-map --projector llava=runs/captions --projector ours=runs/patch
    --base models/vicuna-7b-v1.5 --image street.jpg --output runs/token_map`
    """
    from patch_aligned.analysis.token_map import PursuitSettings
    from patch_aligned.analysis.token_map_run import run_token_map

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
