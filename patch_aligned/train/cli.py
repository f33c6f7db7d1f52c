"""The commands `patch-aligned stitch`, `train` and `publish-projector`: a fresh projector, its stage 1, its upload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava.command import RunRecord, clear_errors, read_record

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


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@clear_errors
def train(context: typer.Context) -> None:
    """Train the projector of a vision-language model by captions and the patch loss, under TRL and with its flags.

    Example: `patch-aligned train runs/stitched --data pad.jsonl --images DIR --output_dir runs/stage1`
    """
    from patch_aligned.train import train as training

    typer.echo(f"Wrote {training.train(context.args)}: the model, its processor, README.md and run.json.")


@app.command()
@clear_errors
def publish_projector(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The --output_dir of a stage 1, LLaVA's or `train`'s.")],
    repo: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload to this repository of the Hugging Face hub.")
    ] = None,
) -> None:
    """Publish the projector of a stage 1 with a model card. Without `--repo` the card is written, to be read first."""
    from patch_aligned.train import publish

    names = ", ".join(file.name for file in publish.publish_projector(run, read_record(run), repo))
    typer.echo(f"Uploaded to {repo}: {names}" if repo else f"Read {run / 'README.md'}, then pass --repo: {names}")
