"""Chooses the learning rate of captions alone: the best name score on development scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from playground.mini.proof.experiment import RATES
from playground.mini.proof.steps import file_name


def main(
    state: Annotated[Path, typer.Argument(help="Folder of the run.")],
    runs: Annotated[list[str], typer.Argument(help="Names of the measured runs, one for each rate.")],
) -> None:
    """Write the best rate to STATE/rate.txt."""
    scores = [
        float(pd.read_parquet(state / "measures" / f"{file_name(run)}.parquet")["name_bound"].mean()) for run in runs
    ]
    found = dict(zip(RATES, scores, strict=True))
    print(", ".join(f"{rate:g}: {score:.3f} nats" for rate, score in found.items()))
    (state / "rate.txt").write_text(str(max(found, key=lambda rate: found[rate])), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
