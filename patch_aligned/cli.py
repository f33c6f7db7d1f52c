"""The command `patch-aligned`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys

from llava.command import typer_app_with_debug
from patch_aligned.analysis.cli import app as analyze_app
from patch_aligned.analysis.cli import app as token_map_app
from patch_aligned.annotate.cli import app as annotate_app
from patch_aligned.annotate.cli import app as reselect_app
from patch_aligned.dataset.cli import app as dataset_app
from patch_aligned.results.cli import app as results_app

app = typer_app_with_debug("Patch-aligned training: its data and its analysis.")

# In the order of the work, which --help keeps: regions are made, looked after, used, and results compared.
app.add_typer(annotate_app)
app.add_typer(reselect_app)
app.add_typer(dataset_app)
app.add_typer(analyze_app)
app.add_typer(token_map_app)
app.add_typer(results_app)

if __name__ == "__main__":
    sys.exit(app())
