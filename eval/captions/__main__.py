"""The command `python -m eval.captions`: a checkpoint captions images, and the captions are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from eval.captions.run import REFERENCES_HELP, SpiceJarsOption, SpiceJavaOption, SplitOption
from llava.command import clear_errors, typer_app

app = typer_app()


@app.command(epilog="Captions of another source are scored by `python -m eval.captions.score`.")
@clear_errors
def main(
    context: typer.Context,
    model_path: Annotated[str, typer.Option(metavar="DIR", help="The checkpoint, of stage 1 or stage 2.")],
    model_base: Annotated[
        str | None, typer.Option(metavar="DIR", help="The LLM that a stage-1 projector or an adapter belongs to.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="What tables call it. Default: from its folder.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="`captions_coco2014`, `captions_coco2017`, `captions_mini`, or a name of yours.")
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=REFERENCES_HELP),
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the paths of the images count from.")
    ] = None,
    split: SplitOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the runs. Default: runs/eval/NAME.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What the model is told to do. Default: to caption; after stage 1 (`plain`), nothing."),
    ] = None,
    conversation: Annotated[
        str | None,
        typer.Option(help="Template. Default: as trained, `plain` for a stage-1 projector that does not say."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a caption is cut off.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once, in each process.")] = 8,
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], typer.Option(help="`auto`: float16 on a GPU, else float32.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images: a trial.")] = None,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Stop before scoring, which needs Java; go on by the same command.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Replace a run of other settings. Captions that are there stay.")
    ] = False,
    spice_jars: SpiceJarsOption = None,
    spice_java: SpiceJavaOption = None,
) -> None:
    """Captions images with a checkpoint and scores the captions: METEOR, ROUGE-L, SPICE, CIDEr and BLEU.

    Leaves `OUTPUT/BENCHMARK/result.json` and `samples.jsonl`, from which `patch-aligned table 4` is made. The same
    command goes on where it was stopped. On several GPUs: `accelerate launch --num_processes 8 -m eval.captions ...`.

    Example:

    `python -m eval.captions --model-path checkpoints/llava-v1.5-7b-pretrain --model-base lmsys/vicuna-7b-v1.5
    --benchmark captions_coco2014`
    """
    from eval.captions.references import choose_set
    from eval.captions.run import Request, run

    request = Request(
        model_path=model_path.rstrip("/"),
        model_base=model_base,
        model_name=model_name,
        caption_set=choose_set(benchmark, references, image_folder),
        split=split,
        output=output,
        prompt=prompt,
        conversation=conversation,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        limit=limit,
        answers_only=answers_only,
        again=again,
        spice_jars=spice_jars,
        spice_java=spice_java,
    )
    run(request, typer.echo)


if __name__ == "__main__":
    app()
