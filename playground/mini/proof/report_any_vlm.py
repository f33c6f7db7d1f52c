"""Writes the report on a stitched model of transformers, beside LLaVA's figures of the same arms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from patch_aligned.files import written_whole
from playground.mini.proof.experiment import BUDGETS, Budget
from playground.mini.proof.report import TEMPLATES, Runs, difference_table
from playground.mini.proof.steps import file_name
from playground.mini.proof.summary import markdown

LLAVA, LLAVA_BUDGET = Path("docs/miniature/short"), BUDGETS["primary"]
PAIRS = (("P", "C"), ("P", "R"), ("R", "C"))
LEAST_READS = 1.0
"""Nats a caption that the interval of a patch-aligned projector must lie above; that of captions alone must reach 0."""
SCORES = {"name score (i)": "name_bound", "retrieval": "top1", "retrieval of own targets": "own_top1"}
SCORES |= {"contrast": "contrast", "cosine": "cosine"}


def main(
    budget: Annotated[str, typer.Option(help="Name of a budget with `like`.")],
    state: Annotated[Path, typer.Option(help="Folder of the run.")],
    output: Annotated[Path | None, typer.Option(help="The report. [default: STATE/report/report.md]")] = None,
) -> None:
    """Write the report on the seeds that are measured."""
    chosen = BUDGETS[budget]
    complete = [seed for seed in chosen.seeds if all(_reads_of(state, arm, seed).exists() for arm in chosen.arms)]
    chosen = replace(chosen, seeds=tuple(complete))
    runs = {chosen.like or "": Runs(state, chosen), "LLaVA": Runs(LLAVA, replace(LLAVA_BUDGET, arms=chosen.arms))}
    text = TEMPLATES.get_template("any_vlm.md.j2").render(
        name=budget,
        budget=chosen,
        llava=LLAVA_BUDGET,
        numbers=runs["LLaVA"].arms["P"][0].numbers,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        scores=scores_table(runs),
        differences={name: difference_table(of, PAIRS) for name, of in runs.items()},
        reads=reads_table(state, chosen),
    )
    path = output or state / "report" / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(path)


def scores_table(runs: dict[str, Runs]) -> str:
    """Scores of objects by architecture and arm, each with all seeds."""
    rows = [
        [name, arm, *(of.seeds(arm, score) for score in SCORES.values())]
        for name, of in runs.items()
        for arm in of.arms
    ]
    return markdown(["architecture", "arm", *SCORES], rows)


def reads_table(state: Path, budget: Budget) -> str:
    """What `patch-aligned reads` says of each run, and whether it is what was expected."""
    rows = []
    for arm in budget.arms:
        for seed in budget.seeds:
            metrics = json.loads(_reads_of(state, arm, seed).read_text())["metrics"]
            found = metrics["reads_per_caption"]
            expected, holds = {
                "C": ("not above 0", found["low"] <= 0),
                "P": (f"above {LEAST_READS:g}", found["low"] > LEAST_READS),
            }.get(arm, ("–", None))
            cells = [arm, str(seed), f"{found['value']:.2f}", f"{found['low']:.2f} … {found['high']:.2f}"]
            cells += [f"{metrics['loss_per_token']['value']:.2f}", expected, {True: "yes", False: "no"}.get(holds, "–")]
            rows.append(cells)
    columns = ["arm", "seed", "`reads`, nats a caption", "95% interval", "loss a token", "expected", "holds"]
    return markdown(columns, rows)


def _reads_of(state: Path, arm: str, seed: int) -> Path:
    return state / "measures" / f"{file_name(f'{arm}, seed {seed}')}_reads.json"


if __name__ == "__main__":
    typer.run(main)
