"""The command `patch-aligned`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import logging
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from patch_aligned.analysis.token_map_command import app as token_map_app
from patch_aligned.annotate.commands import app as annotate_app
from patch_aligned.annotate.reselect_command import app as reselect_app
from patch_aligned.command_errors import clear_errors
from patch_aligned.dataset.commands import app as dataset_app
from patch_aligned.pack_command import app as pack_app
from patch_aligned.results.commands import app as results_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Patch-aligned training: its data and its measures.",
    # LLaVA's flags are spelled with underscores: both are taken, in all commands.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Patch-aligned training: its data and its measures."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    context.obj = {"debug": debug}


class ThresholdRule(str, Enum):
    """Rules that turn a cosine map into a prediction; `analysis.alignment.THRESHOLD_RULES` says what each does."""

    MID_RANGE = "mid_range"
    OTSU = "otsu"
    MEAN_STD = "mean_std"
    TOP_AREA = "top_area"


class AspectRatio(str, Enum):
    """What happens to an image that is no square."""

    SQUARE = "square"
    PAD = "pad"


@app.command(epilog="How to read the numbers: docs/measures.md.")
@clear_errors
def measure(
    context: typer.Context,
    projector: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH",
            help="A projector under a name; repeat for each. PATH is an --output_dir of stage 1, an mm_projector.bin, "
            "a full checkpoint, or `random[:SEED]` for untrained weights.",
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="The language model (folder or hub name). Only its word embeddings and tokenizer are read.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Annotated images in PAD format: JSON, JSONL or Parquet.")],
    image_folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder that the image ids are relative to.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where measures.json, measures.md and localisation.png go.")
    ],
    vision_tower: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The vision tower. Default: the one the projectors' configs name."),
    ] = None,
    threshold_rule: Annotated[
        ThresholdRule, typer.Option(help="Which tokens of a cosine map are the prediction.")
    ] = ThresholdRule.MID_RANGE,
    min_coverage: Annotated[
        float, typer.Option(min=0.01, max=1, help="A token belongs to a region that covers this share of its cell.")
    ] = 0.5,
    region_kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only regions whose extra key `kind` has this value, such as `object`."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the control with shuffled labels.")] = 0,
    image_aspect_ratio: Annotated[
        AspectRatio | None, typer.Option(help="How images are made square. Default: as in the projectors' configs.")
    ] = None,
    picture_rows: Annotated[int, typer.Option(min=0, help="Images in localisation.png; 0 draws none.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one pass through the tower.")] = 8,
    device: Annotated[
        str, typer.Option(help="Where the tower and the projectors run: `cpu`, `cuda`, `cuda:1` ...")
    ] = "cpu",
) -> None:
    """Measures projectors side by side: entropy, Align(V, W) and cosine.

    Three questions about a projector, answered on images whose regions are labelled: how much does it compress
    (**entropy** before and after), can a label's word embedding find its place in the image (**Align**), and how near
    are a region's visual tokens to its label (**cosine**; beside it the same with wrong labels, as a control).

    All projectors see the same features of the same tower, in float32. The language model itself is never run.

    Example:

    `patch-aligned measure --projector random=random:0 --projector llava=runs/captions --projector ours=runs/patch
    --base models/vicuna-7b-v1.5 --data pad/held_out.jsonl --image-folder images --output runs/measures`
    """
    from patch_aligned.analysis.command import run_measure

    run_measure(
        projectors=projector,
        base=base,
        data=data,
        image_folder=image_folder,
        output=output,
        vision_tower=vision_tower,
        threshold_rule=threshold_rule.value,
        min_coverage=min_coverage,
        region_kind=region_kind,
        limit=limit,
        seed=seed,
        image_aspect_ratio=image_aspect_ratio.value if image_aspect_ratio else None,
        picture_rows=picture_rows,
        batch_size=batch_size,
        device=device,
    )


app.add_typer(token_map_app)
app.add_typer(dataset_app)
app.add_typer(pack_app)
app.add_typer(reselect_app)
app.add_typer(annotate_app)
app.add_typer(results_app)

if __name__ == "__main__":
    sys.exit(app())
