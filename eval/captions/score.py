"""The command `python -m eval.captions.score`: captions of any source against reference captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from eval.captions.metrics import find_spice, require_metrics, score_captions
from eval.captions.references import read_references
from eval.captions.run import (
    REFERENCES_HELP,
    SpiceJarsOption,
    SpiceJavaOption,
    SplitOption,
    as_json,
    as_text,
    read_answers,
)
from llava.command import clear_errors, typer_app
from patch_aligned.files import refuse_inputs

app = typer_app()


@app.command()
@clear_errors
def main(
    context: typer.Context,
    answers: Annotated[
        Path, typer.Option(metavar="FILE", help="Records of `image_id` (or `image`) and `caption` (or `answer`).")
    ],
    references: Annotated[
        Path,
        typer.Option(metavar="FILE", help=REFERENCES_HELP),
    ],
    split: SplitOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images of the references.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON for all scores, those of each image among them.")
    ] = None,
    spice_jars: SpiceJarsOption = None,
    spice_java: SpiceJavaOption = None,
) -> None:
    """Scores captions of any source: METEOR, ROUGE-L, SPICE, CIDEr and BLEU, as pycocoevalcap has them.

    Example:

    `python -m eval.captions.score --answers captions.json --references captions_val2014.json`
    """
    if output is not None:
        refuse_inputs(output, (answers, references))
    require_metrics()
    spice = find_spice(spice_jars, spice_java)
    images = read_references(references, split).images
    found = read_answers(answers, images)
    chosen = images[:limit]
    scores = score_captions(
        {image.id: image.captions for image in chosen},
        {image.id: found[image.id] for image in chosen if image.id in found},
        spice,
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(as_json(scores), indent=2) + "\n", encoding="utf-8")
    typer.echo(as_text(scores))


if __name__ == "__main__":
    app()
