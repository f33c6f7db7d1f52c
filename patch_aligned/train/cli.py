"""The commands `patch-aligned stitch`, `train` and `publish-projector`: a fresh projector, its stage 1, its upload."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llava.checkpoint_files import require_checkpoint
from llava.command import RunRecord, clear_errors, names_config, parse_known_flags, read_record, require_files
from patch_aligned.train.arguments import PatchArguments, TrainArguments

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
        f"Wrote {output}: {type(model).__name__} with an untrained projector, {model.num_parameters():,} weights.\n"
        f"Next: patch-aligned train {output} --data PAD --images DIR --output_dir {output}-trained"
    )


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@clear_errors
def train(context: typer.Context) -> None:
    """Train the projector of a vision-language model by captions and the patch loss, under TRL and with its flags.

    Example: `patch-aligned train runs/stitched --data pad.jsonl --images DIR --output_dir runs/stage1`
    """
    arguments = context.args
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    if not names_config(arguments):  # the file's keys are read with the flags of TRL
        _check_command_line(arguments)
    from patch_aligned.train import train as training

    output = training.train(arguments)
    if os.environ.get("RANK", "0") == "0":
        flags = read_record(output)["flags"]
        typer.echo(f"Wrote {output}: the model, its processor, README.md and run.json.")
        typer.echo(
            f"Next: patch-aligned analyze --projector trained={output} --data {flags['data']} --image-folder "
            f"{flags['images']} --output {output}/analysis"
        )


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


def _check_command_line(arguments: Sequence[str]) -> None:
    """Refuse what is wrong before torch and TRL are imported, which takes seconds."""
    trainers = {"trl": ["trainer/sft_config.py", "trainer/base_config.py"], "transformers": ["training_args.py"]}
    flags = parse_known_flags((TrainArguments, PatchArguments), arguments, "patch-aligned train", **trainers)
    require_files(flags, ("data", "images"))
    require_checkpoint(flags.model, None)
