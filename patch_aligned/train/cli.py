"""The command `patch-aligned stitch`: a model whose projector stage 1 trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava.command import RunRecord, clear_errors

app = typer.Typer(rich_markup_mode="markdown")


@app.command(epilog="Which encoders and LLMs fit: docs/vlm.md.")
@clear_errors
def stitch(
    context: typer.Context,
    vision: Annotated[
        str, typer.Option(metavar="MODEL", help="A vision encoder, or a vision-language model whose encoder is taken.")
    ],
    llm: Annotated[str, typer.Option(metavar="MODEL", help="The language model; folders or hub names.")],
    like: Annotated[str, typer.Option(metavar="ARCHITECTURE", help="llava, internvl, qwen2_5_vl or qwen3_vl.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the model and its processor.")],
    seed: Annotated[int, typer.Option(help="Of the projector's weights.")] = 0,
) -> None:
    """Put an encoder and an LLM together to a model of transformers with an untrained projector, for stage 1.

    Their weights stay as they are. The chat template is the LLM's, with images.

    Example: `patch-aligned stitch --vision facebook/dinov2-small --llm HuggingFaceTB/SmolLM2-135M-Instruct --like
    internvl --output runs/stitched`
    """
    from patch_aligned.models import stitch as stitching

    record = RunRecord(output, context.params, {}, resumes=False)
    model = stitching.stitch(vision, llm, like, output, seed)
    record.end()
    typer.echo(
        f"Wrote {output}: {type(model).__name__} with an untrained projector, {model.num_parameters():,} weights."
    )
