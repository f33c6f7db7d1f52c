"""Options that the two commands which score captions share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

REFERENCES_HELP = "COCO's captions, Karpathy's, records of `image` and `captions`, or PAD."
SplitOption = Annotated[str | None, typer.Option(help="Of Karpathy's file. Default: `test`.")]
SpiceJarsOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of CoreNLP 3.6.0 for SPICE. Default: $SPICE_JARS.")
]
SpiceJavaOption = Annotated[
    str | None, typer.Option(metavar="PROGRAM", help="Java 8 or 11 for SPICE. Default: $SPICE_JAVA, or java.")
]
