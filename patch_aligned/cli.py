"""The command `patch-aligned`. Commands import what they need when they run, so that `--help` is fast."""

from __future__ import annotations

import sys

from llava.command import typer_app_with_debug
from patch_aligned.analysis.cli import app as analysis_app
from patch_aligned.annotate.cli import app as annotate_app
from patch_aligned.dataset.cli import app as dataset_app
from patch_aligned.explore.cli import app as explore_app
from patch_aligned.results.cli import app as results_app
from patch_aligned.train.cli import app as train_app

app = typer_app_with_debug("Data, models and analysis of patch-aligned training.")

# Commands in the order of the workflow, which --help keeps.
for commands in (annotate_app, dataset_app, train_app, analysis_app, explore_app, results_app):
    app.add_typer(commands)

if __name__ == "__main__":
    sys.exit(app())
