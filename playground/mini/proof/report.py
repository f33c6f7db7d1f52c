"""Writes the report of the experiment: tables with every seed, differences with intervals, and two plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import transformers
import typer
from jinja2 import Environment, PackageLoader, StrictUndefined

from patch_aligned.files import written_whole
from playground.mini.proof.experiment import ARMS, BUDGETS, PRIMARY, RATES, Budget
from playground.mini.proof.steps import file_name
from playground.mini.proof.summary import Bootstrap, Estimate, markdown, seeds_of
from playground.mini.proof.tasks import StageTwo

TEMPLATES = Environment(
    loader=PackageLoader("playground.mini.proof", ""),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)

ISOLATES = {
    ("P", "C"): "the claim",
    ("P", "R"): "the word",
    ("P", "D"): "whether the LLM says what the token was told",
    ("R", "C"): "clustering, supervision, updates",
    ("P", "M"): "the place, against an image tag",
    ("T", "C"): "the words as text, without place",
    ("P", "P>C"): "the joint loss after the warm-up",
    ("P>C", "R>C"): "the word, in the warm-up alone",
    ("P", "P ramp"): "the warm-up, against the paper's schedule",
}
EXPLORATORY = [pair for pair in ISOLATES if pair not in PRIMARY]


@dataclass(frozen=True)
class Run:
    """What was measured of one training: numbers of the whole, and a row for each object of the test scenes."""

    numbers: dict[str, Any]
    objects: pd.DataFrame


class Runs:
    """All runs of a budget that were measured."""

    def __init__(self, state: Path, budget: Budget):
        self.folder, self.budget = state / "measures", budget
        self.arms = {arm: [self.read(f"{arm}, seed {seed}") for seed in budget.seeds] for arm in budget.arms}
        self.bootstrap = Bootstrap(self.arms["C"][0].objects)

    def read(self, run: str) -> Run:
        """Read what was measured of the run of this name."""
        path = self.folder / file_name(run)
        return Run(json.loads(path.with_suffix(".json").read_text()), pd.read_parquet(path.with_suffix(".parquet")))

    def estimate(self, arm: str, score: str, of: str = "all", less: str | None = None) -> Estimate:
        """Mean of a score, or with `less` its difference from another arm; `of` all objects, `named` or `unnamed`."""
        found = [_scores(run.objects, score, of) for run in self.arms[arm]]
        if less is None:
            return self.bootstrap.mean(found)
        return self.bootstrap.difference(found, [_scores(run.objects, score, of) for run in self.arms[less]])

    def seeds(self, arm: str, score: str, of: str = "all") -> str:
        """Means of a score of all seeds, one after the other."""
        return seeds_of(self.estimate(arm, score, of).of_seed)

    def numbers(self, arm: str, *keys: str) -> str:
        """A number of the whole of all seeds, one after the other; `keys` lead to it."""
        found: list[Any] = [reduce(getitem, keys, run.numbers) for run in self.arms[arm]]
        return seeds_of(found)


def _scores(objects: pd.DataFrame, score: str, of: str) -> np.ndarray:
    scores = objects[score].to_numpy(dtype=float)
    if of == "all":
        return scores
    named = objects["in_caption"].to_numpy(dtype=bool)
    return np.where(named if of == "named" else ~named, scores, np.nan)


def arm_table(runs: Runs, columns: Mapping[str, Callable[[Runs, str], str]], arms: Sequence[str] = ()) -> str:
    """A row for each arm; each cell has all seeds."""
    rows = [[arm, *(text(runs, arm) for text in columns.values())] for arm in arms or runs.arms]
    return markdown(["arm", *columns], rows)


def _scored(score: str, of: str = "all") -> Callable[[Runs, str], str]:
    return lambda runs, arm: runs.seeds(arm, score, of)


def _numbered(*keys: str) -> Callable[[Runs, str], str]:
    return lambda runs, arm: runs.numbers(arm, *keys)


ALIGNMENT = {
    "retrieval of the own label": _scored("top1"),
    "contrast": _scored("contrast"),
    "cosine": _scored("cosine"),
    "best word": _scored("best_word_cosine"),
    "Align own": _scored("iou_px"),
    "Align other": _scored("shuffled_iou_px"),
    "H after": _numbered("entropy_after_nats"),
    "background retrieval": _numbered("background", "retrieval_top1"),
}
"""How tokens of objects lie to words."""
NAMING = {
    "name score (i), all": _scored("name_bound"),
    "named in captions": _scored("name_bound", "named"),
    "not named": _scored("name_bound", "unnamed"),
    "(ii)": _scored("name_information"),
    "AUC": _scored("name_auc"),
    "captions: precision": _numbered("captions", "precision"),
    "captions: recall": _numbered("captions", "recall"),
    "captions: F1": _numbered("captions", "f1"),
}
"""What the frozen LLM says."""
OWN = {
    "retrieval of own targets": _scored("own_top1"),
    "contrast with own targets": _scored("own_contrast"),
    "name score (i), own names": _scored("own_name_bound"),
    "AUC, own names": _scored("own_name_auc"),
}
"""How well the controls learnt their own targets."""


def difference_table(runs: Runs, pairs: Sequence[tuple[str, str]]) -> str:
    """Differences of the name score (i) over all objects."""
    columns = ["difference", "nats", "95% interval", "seeds", "isolates"]
    rows = [
        [f"{first} − {second}", *runs.estimate(first, "name_bound", less=second).cells, ISOLATES[first, second]]
        for first, second in pairs
        if {first, second} <= set(runs.arms)
    ]
    return markdown(columns, rows)


def requirement_table(runs: Runs) -> str:
    """What must hold on P, object regions alone."""
    align = runs.bootstrap.difference(
        *([_scores(run.objects, score, "all") for run in runs.arms["P"]] for score in ("iou_px", "shuffled_iou_px"))
    )
    retrieval, contrast, bound = (runs.estimate("P", score) for score in ("top1", "contrast", "name_bound"))
    rows = [
        _required("retrieval of the own label", retrieval, 0.60, retrieval.value),
        _required("contrast", contrast, 0.25, contrast.value),
        _required("Align own − other", align, 0.10, align.value),
        _required("name score (i), lower end", bound, 0.0, bound.low),
    ]
    return markdown(["measure", "mean", "95% interval", "seeds", "at least", "holds"], rows)


def _required(name: str, found: Estimate, least: float, judged: float) -> list[str]:
    return [name, *found.cells, f"{least:.2f}", "yes" if judged >= least else "no"]


def captions_table(runs: Runs) -> str:
    """Captions alone: the rates that were tried on development scenes, and longer training at the best."""
    trials = [(f"rate {rate:g}, development scenes", runs.read(f"C at {rate:g}")) for rate in RATES]
    curve = [(f"{steps} steps, test scenes", runs.read(f"C after {steps} steps")) for steps in runs.budget.curve]
    columns = ["captions alone, one seed", "retrieval", "name score (i)", "AUC", "captions: F1"]
    rows = [
        [
            name,
            *(f"{run.objects[score].mean():.2f}" for score in ("top1", "name_bound", "name_auc")),
            seeds_of([run.numbers["captions"]["f1"]]),
        ]
        for name, run in [*trials, *curve]
    ]
    return markdown(columns, rows)


def _entropy_drop(run: Run) -> float:
    return run.numbers["entropy_before_nats"] - run.numbers["entropy_after_nats"]


def paper_table(runs: Runs) -> str:
    """The rows of the paper's Table 3, and whether its direction holds here."""
    captions, patches = runs.arms["C"], runs.arms["P"]

    def mean(of: Sequence[Run], value: Callable[[Run], float]) -> float:
        return float(np.mean([value(run) for run in of]))

    measures: dict[str, tuple[float, float, Callable[[Run], float]]] = {
        "entropy drop": (2.7991, 3.8352, _entropy_drop),
        "Align(V, W)": (0.142, 0.279, lambda run: run.objects["iou_px"].mean()),
        "cosine of the own label": (0.07, 0.56, lambda run: run.objects["cosine"].mean()),
        "cosine of the best word": (0.07, 0.56, lambda run: run.objects["best_word_cosine"].mean()),
    }
    rows = []
    for name, (paper_captions, paper_patches, value) in measures.items():
        here = mean(captions, value), mean(patches, value)
        holds = "holds" if here[1] > here[0] else "does not hold"
        rows.append([name, f"{paper_captions:g}", f"{paper_patches:g}", *(f"{number:.2f}" for number in here), holds])
    columns = ["Table 3", "paper: captions", "paper: patch-aligned", "here: C", "here: P", "direction"]
    return markdown(columns, rows)


def draw(runs: Runs, path: Path) -> None:
    """Draw the name score of each arm, seeds as points."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.45 * len(runs.arms) + 1.2), layout="constrained")
    for row, arm in enumerate(runs.arms):
        found = runs.estimate(arm, "name_bound")
        axes.plot([found.low, found.high], [row, row], color="0.6", linewidth=3, solid_capstyle="round")
        axes.plot(found.of_seed, [row] * len(found.of_seed), "o", color="tab:blue", markersize=5)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_yticks(range(len(runs.arms)), [f"{arm}: {ARMS[arm].training}" for arm in runs.arms])
    axes.invert_yaxis()
    axes.set_xlabel("name score (i), nats; 0 is blind")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(runs: Runs, stage_2: StageTwo, name: str, folder: Path) -> Path:
    """Write `report.md` and its plot; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(runs, folder / "arms.png")
    first = runs.arms["P"][0].numbers
    arms = [[arm, ARMS[arm].training, ARMS[arm].isolates] for arm in runs.arms]
    tables = {
        "arms": markdown(["arm", "stage 1", "a difference isolates"], arms),
        "primary": difference_table(runs, PRIMARY),
        "required": requirement_table(runs),
        "naming": arm_table(runs, NAMING),
        "alignment": arm_table(runs, ALIGNMENT),
        "own": arm_table(runs, OWN, [arm for arm in ("P", "R", "D") if arm in runs.arms]),
        "exploratory": difference_table(runs, EXPLORATORY),
        "captions": captions_table(runs),
        "paper": paper_table(runs),
    }
    if stage_2.budget.stage_2:
        tables |= {
            "stage_2": stage_2.table(),
            "stage_2_areas": stage_2.areas(),
            "stage_2_held_out": stage_2.table(held_out=True),
            "stage_2_primary": stage_2.differences(),
        }
    text = TEMPLATES.get_template("report.md.j2").render(
        name=name,
        budget=runs.budget,
        numbers=first,
        ceiling=math.log(first["images"]),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        **tables,
    )
    path = folder / "report.md"
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def main(
    budget: Annotated[str, typer.Option(help=f"One of {', '.join(BUDGETS)}.")],
    state: Annotated[Path, typer.Option(help="Folder of the run.")],
) -> None:
    """Write STATE/report."""
    chosen = BUDGETS[budget]
    print(write(Runs(state, chosen), StageTwo(state, chosen), budget, state / "report"))


if __name__ == "__main__":
    typer.run(main)
