"""The command `patch-aligned`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from patch_aligned.analysis.analyze_command import app as analyze_app
from patch_aligned.analysis.token_map_command import app as token_map_app
from patch_aligned.annotate.commands import app as annotate_app
from patch_aligned.annotate.reselect_command import app as reselect_app
from patch_aligned.dataset.commands import app as dataset_app
from patch_aligned.pack_command import app as pack_app
from patch_aligned.results.commands import app as results_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Patch-aligned training: its data and its analysis.",
    # LLaVA's flags are spelled with underscores: both are taken, in all commands.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Patch-aligned training: its data and its analysis."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    context.obj = {"debug": debug}


app.add_typer(analyze_app)
app.add_typer(token_map_app)
app.add_typer(dataset_app)
app.add_typer(pack_app)
app.add_typer(reselect_app)
app.add_typer(annotate_app)
app.add_typer(results_app)

if __name__ == "__main__":
    sys.exit(app())
