"""The commands `patch-aligned table` and `patch-aligned compare`: results of runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava.command import clear_errors

if TYPE_CHECKING:
    from patch_aligned.results.render import Block


app = typer.Typer(rich_markup_mode="markdown")

Format = Literal["markdown", "latex", "html"]
FormatOption = Annotated[
    Format | None, typer.Option("--format", help="Default: by the suffix of --output, else markdown.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Where it goes (.md, .tex, .html) instead of the screen."),
]
FrameOption = Annotated[
    Literal["square", "image"] | None,
    typer.Option(help="How boxes are read where a run has both readings. Default: as the run's settings say."),
]
NamesOption = Annotated[
    str | None, typer.Option(metavar="A,B", help="Names of the models, one a folder. Default: as the runs have them.")
]


@app.command(epilog="What the columns mean, and which numbers to expect: docs/expected_numbers.md.")
@clear_errors
def table(
    context: typer.Context,
    number: Annotated[str, typer.Argument(metavar="1|...|8|runs", help="The paper's table, or all runs as they are.")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUNS",
            help="Folders of runs, one a model; for tables 1 to 3 folders of reports of `patch-aligned analyze`.",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of runs; more may follow it.", show_default=False)
    ] = None,
    format: FormatOption = None,
    output: OutputOption = None,
    box_frame: FrameOption = None,
    names: NamesOption = None,
) -> None:
    """Prints a table of the paper with the rows of our runs beside the paper's own.

    A folder of runs is what `eval.run` leaves: a folder for each benchmark. Missing cells are an en dash; the notes
    say under which conditions each column came about, and how much a row gains over the first. Runs of the miniature
    come as a table of their own. Rows of Tables 1 to 3 come from reports of `patch-aligned analyze`; without any, the
    paper's rows stand alone, and the notes have the command.

    Example:

    `patch-aligned table 5 --runs runs/eval/plain runs/eval/patch --output table5.tex`
    """
    from patch_aligned.results.tables import find_models, free_block, make_table, projector_block

    places = [*(runs or []), *(folders or [])]
    if number in ("1", "2", "3"):
        _write([projector_block(int(number), places)], format, output)
        return
    if number not in ("4", "5", "6", "7", "8", "runs"):
        raise ValueError(f"table: found {number!r}, expected a number from 1 to 8, or runs")
    if not places:
        raise ValueError("--runs: found no folder, expected at least one, such as runs/eval/MODEL")
    models = find_models(places, _names(names))
    if number == "runs":
        blocks = [free_block(models, "All runs", box_frame=box_frame)]
    else:
        blocks = make_table(int(number), models, box_frame)
    _write(blocks, format, output)


@app.command(name="compare", epilog="The method: docs/expected_numbers.md.")
@clear_errors
def compare_command(
    context: typer.Context,
    first: Annotated[
        str,
        typer.Argument(
            metavar="RUNS_A[,...]",
            help="Folder of runs of the model to compare with; of several seeds one each, joined by commas.",
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="RUNS_B[,...]", help="The same of the other model, seeds in the same order.")
    ],
    metric: Annotated[str | None, typer.Option(help="The score. Default: the headline of each benchmark.")] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    format: FormatOption = None,
    output: OutputOption = None,
    box_frame: FrameOption = None,
    names: NamesOption = None,
) -> None:
    """Says whether B is better than A: differences on the same questions, with intervals by the paired bootstrap.

    Example:

    `patch-aligned compare runs/eval/plain runs/eval/patch`

    `patch-aligned compare runs/plain_0,runs/plain_1,runs/plain_2 runs/patch_0,runs/patch_1,runs/patch_2`
    """
    from patch_aligned.results.compare import compare
    from patch_aligned.results.tables import find_models

    folders, others = ([Path(folder) for folder in arm.split(",")] for arm in (first, second))
    models = find_models([*folders, *others])
    arms = [models[: len(folders)], models[len(folders) :]]
    if named := _names(names):
        if len(named) != 2:
            raise ValueError(f"--names: found {len(named)}, expected 2, one for each model")
        arms = [[replace(model, name=name) for model in arm] for arm, name in zip(arms, named, strict=True)]
    _write([compare(arms[0], arms[1], metric, box_frame, resamples, seed)], format, output)


def _names(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def _write(blocks: Sequence[Block], format: Format | None, output: Path | None) -> None:
    from patch_aligned.results.render import as_html, as_latex, as_markdown

    suffixes: dict[str, Format] = {".md": "markdown", ".tex": "latex", ".html": "html"}
    if format is None and output is not None and output.suffix not in suffixes:
        raise ValueError(
            f"--output {output}: found suffix {output.suffix!r}, expected .md, .tex or .html, or a --format"
        )
    form = format or (suffixes[output.suffix] if output else "markdown")
    text = {"markdown": as_markdown, "latex": as_latex, "html": as_html}[form](blocks)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        typer.echo(f"{output}: {len(blocks)} table{'s' if len(blocks) > 1 else ''}")
