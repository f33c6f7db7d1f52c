"""Options that the commands which look into models share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
