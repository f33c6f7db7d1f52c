"""The command `python -m eval.captions.score`: captions of any source against reference captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import AliasChoices, BaseModel, Field

from eval.captions.metrics import as_json, as_text, find_spice, require_metrics, score_captions
from eval.captions.references import CaptionedImage, read_references
from eval.captions.run import REFERENCES_HELP, SpiceJarsOption, SpiceJavaOption, SplitOption
from llava.command import clear_errors, typer_app
from patch_aligned.files import refuse_inputs, validated
from patch_aligned.record_files import iter_records, named

app = typer_app()


@app.command()
@clear_errors
def main(
    context: typer.Context,
    answers: Annotated[
        Path, typer.Option(metavar="FILE", help="Records of `image_id` (or `image`) and `caption` (or `answer`).")
    ],
    references: Annotated[Path, typer.Option(metavar="FILE", help=REFERENCES_HELP)],
    split: SplitOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images of the references.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file for all scores, also those of each image.")
    ] = None,
    spice_jars: SpiceJarsOption = None,
    spice_java: SpiceJavaOption = None,
) -> None:
    """Score captions of any source: METEOR, ROUGE-L, SPICE, CIDEr and BLEU, as pycocoevalcap computes them.

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


class _Answer(BaseModel):
    image: Annotated[int | str, Field(validation_alias=AliasChoices("image_id", "image"))]
    caption: Annotated[str, Field(validation_alias=AliasChoices("caption", "answer", "text"))]


def read_answers(path: Path, images: Sequence[CaptionedImage]) -> dict[str, str]:
    """Read captions of another source by the image's id; records name images of the references by id or by path."""
    ids = {name: image.id for image in images for name in (image.image, image.id)}
    answers: dict[str, str] = {}
    unknown = []
    for number, record in enumerate(iter_records(path)):
        answer = validated(_Answer, record, f"{path}: record {number}")
        name = str(answer.image)
        if name not in ids:
            unknown.append(name)
        elif ids[name] in answers:
            raise ValueError(f"{path}: record {number}: found image {name!r} a second time, expected one caption each")
        else:
            answers[ids[name]] = answer.caption
    if unknown:
        raise ValueError(
            f"{path}: found captions of {named(unknown)}, which are not among the {len(images)} images of the "
            "references; are these the captions of the same images?"
        )
    return answers


if __name__ == "__main__":
    app()
