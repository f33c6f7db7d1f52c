"""Options that the commands which look into models share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
EnglishOption = Annotated[
    Literal["auto", "pyspellchecker", "nltk", "none"],
    typer.Option(help="Which list tells English words; `auto` takes one that is installed."),
]
