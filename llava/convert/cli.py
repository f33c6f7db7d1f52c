"""The command `llava-convert`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from llava.command import clear_errors, typer_app_with_debug

app = typer_app_with_debug("LLaVA checkpoints to Hugging Face's LlavaForConditionalGeneration, and back.")


def _shard_size(text: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(f"found {text!r}, expected a size such as 500MB or 5GB")
    return text


MaxShardSize = Annotated[str, typer.Option(help="Largest file of weights.", callback=_shard_size)]


@app.command("to-hf", epilog="How to serve the folder: docs/serving.md.")
@clear_errors
def to_hf_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="LLaVA checkpoint: a folder or a hub name.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new folder for transformers.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The language model, where SRC is a projector alone or a LoRA adapter."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="Dtype of the weights; `auto` is that of SRC's config."),
    ] = "auto",
    conv_mode: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Conversation template. Default: what SRC records, else by its name."),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Writes a folder that `AutoModelForImageTextToText` and vLLM load: weights, processor, chat template, model card.

    What Hugging Face's Llava can carry is converted: the projector `mlp2x_gelu`; CLIP, SigLIP and DINOv2 towers; images
    cropped or padded to a square; any language model that this package takes. Everything else is refused by name. Runs
    on the CPU, with memory for about one copy of the model.

    Examples:

    `llava-convert to-hf checkpoints/llava-v1.5-7b exports/llava-v1.5-7b`

    `llava-convert to-hf checkpoints/projector exports/stage-1 --base lmsys/vicuna-7b-v1.5`
    """
    from llava.convert.to_hf import to_hf

    try:
        to_hf(source, destination, base, dtype, conv_mode, max_shard_size)
    except (ValueError, FileNotFoundError) as error:  # other commands call it --model-base
        raise type(error)(str(error).replace("--model-base", "--base")) from error
    _report(destination, "load or serve it as its README.md says; before you publish it, fill in the licence there.")


@app.command("from-hf")
@clear_errors
def from_hf_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A LlavaForConditionalGeneration: folder or hub name.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new folder for the LLaVA checkpoint.")],
    vision_tower: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name the tower by this hub name or folder, if it has SRC's very weights (that is checked). Default: "
            "SRC's tower is written to DST/vision_tower.",
        ),
    ] = None,
    image_aspect_ratio: Annotated[
        Literal["square", "pad"] | None,
        typer.Option(
            help="How images are made square. Default: what SRC's image processor does. The published llava-1.5 "
            "folders crop, though the models were trained with `pad`."
        ),
    ] = None,
    conv_mode: Annotated[
        str | None, typer.Option(metavar="NAME", help="Conversation template to record in config.json.")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Writes a full LLaVA checkpoint, as stage 2 does: to evaluate, fine-tune or measure a model from the hub here.

    Rows of the word embeddings that no token of the tokenizer has are trimmed. A folder that `to-hf` wrote comes back
    bit for bit.

    Example:

    `llava-convert from-hf llava-hf/llava-1.5-7b-hf checkpoints/llava-v1.5-7b --image-aspect-ratio pad --conv-mode v1
    --vision-tower openai/clip-vit-large-patch14-336`
    """
    from llava.convert.from_hf import from_hf

    from_hf(source, destination, vision_tower, image_aspect_ratio, conv_mode, max_shard_size)
    flags = f"--model-path {destination} --image-file IMAGE"
    if json.loads((destination / "config.json").read_text(encoding="utf-8")).get("conversation_version") == "plain":
        caption = f"python -m llava.eval.run_llava {flags} --query ''"
        _report(destination, f"{caption}   (it went through stage 1 alone: it captions, and answers no question)")
    else:
        _report(destination, f"python -m llava.serve.cli {flags}")


def _report(folder: Path, next_step: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    typer.echo(f"Wrote {folder}: {len(files)} files, {size_mb:.1f} MB.")
    typer.echo(f"Next: {next_step}")


if __name__ == "__main__":
    sys.exit(app())
