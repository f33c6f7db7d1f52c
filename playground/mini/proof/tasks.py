"""Scores of stage 2 from how likely a model holds the given answers, with intervals over scenes and seeds.

Letters: Q questions of a task, S seeds, N draws, P and A questions about what is present and absent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from playground.mini.proof.experiment import PRIMARY_STAGE_2, PRIMARY_STEP, Budget
from playground.mini.proof.steps import file_name
from playground.mini.proof.summary import DRAWS, Estimate, estimate_over_seeds, markdown, seeds_of

TASKS = {
    "existence": "existence, d' (0)",
    "name_of_category": "one of four names, same category (1/4)",
    "name": "one of four names (1/4)",
    "side": "left, middle or right (1/3)",
    "cell": "cell of 3 x 3 (1/9)",
    "caption": "caption, nats",
}
"""Tasks, and their columns with the level of chance."""


class StageTwo:
    """What was measured of stage 2 of all arms and seeds."""

    def __init__(self, state: Path, budget: Budget):
        self.budget = budget
        self.steps = (0, *budget.stage_2_steps)
        self.questions = {
            (arm, seed, step): pd.read_parquet(
                state / "measures" / f"{file_name(f'{arm}, seed {seed} after {step} steps of stage 2')}.parquet"
            )
            for arm in budget.stage_2
            for seed in budget.stage_2_seeds
            for step in self.steps
        }

    def estimate(self, task: str, arm: str, step: int, held_out: bool = False, less: str | None = None) -> Estimate:
        """Score of a task, or with `less` its difference from another arm."""
        found = [self._of_seed(task, arm, seed, step, held_out) for seed in self.budget.stage_2_seeds]
        if less is not None:
            others = [self._of_seed(task, less, seed, step, held_out) for seed in self.budget.stage_2_seeds]
            found = [(a - b, of_a - of_b) for (a, of_a), (b, of_b) in zip(found, others, strict=True)]
        return estimate_over_seeds(found)

    def _of_seed(self, task: str, arm: str, seed: int, step: int, held_out: bool) -> tuple[float, np.ndarray]:
        questions = self.questions[arm, seed, step]
        scenes, images = pd.factorize(questions["image"])
        drawn = np.random.default_rng(0).multinomial(len(images), np.full(len(images), 1 / len(images)), size=DRAWS)
        weights = np.concatenate([np.ones((1, len(images))), drawn])[:, scenes]  # [1 + N, questions]
        chosen = ((questions["task"] == task) & (questions["held_out"].notna() == held_out)).to_numpy()
        scores = score(questions[chosen], weights[:, chosen])
        return float(scores[0]), scores[1:]

    def table(self, held_out: bool = False) -> str:
        """Scores of all tasks by arm and step; a cell has all seeds."""
        tasks = [task for task in TASKS if task != "caption" or not held_out]
        rows = [
            [arm, str(step), *(seeds_of(self.estimate(task, arm, step, held_out).of_seed) for task in tasks)]
            for arm in self.budget.stage_2
            for step in self.steps
        ]
        return markdown(["stage 1", "steps", *(TASKS[task] for task in tasks)], rows)

    def areas(self) -> str:
        """Mean of each curve over the steps of stage 2, by trapezoids."""

        def area(task: str, arm: str) -> str:
            curve = np.array([self.estimate(task, arm, step).of_seed for step in self.steps])  # [steps, S]
            return seeds_of(tuple(np.trapezoid(curve, self.steps, axis=0) / self.steps[-1]))

        rows = [[arm, *(area(task, arm) for task in TASKS)] for arm in self.budget.stage_2]
        return markdown(["stage 1", *TASKS.values()], rows)

    def differences(self) -> str:
        """The primary outcomes."""
        step = PRIMARY_STEP if PRIMARY_STEP in self.steps else self.steps[-1]
        rows = [
            [f"{first} − {second}", *self.estimate("existence", first, step, less=second).cells]
            for first, second in PRIMARY_STAGE_2
        ]
        return markdown([f"d' of existence after {step} steps", "mean", "95% interval", "seeds"], rows)


def score(questions: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """Score of the questions of one task under each weighting `[N, Q]`: `[N]`."""
    answers, log_p = questions["answer"].to_numpy(), [np.asarray(values) for values in questions["log_p"]]
    if questions["task"].iloc[0] == "existence":
        margins = np.array([yes - no for yes, no in log_p])
        return detectability(margins, answers == 0, weights)
    if questions["task"].iloc[0] == "caption":
        values = np.array([values[0] for values in log_p])
    else:
        values = np.array([np.argmax(values) == answer for values, answer in zip(log_p, answers, strict=True)])
    return weights @ values / weights.sum(axis=1)


def detectability(margins: np.ndarray, is_present: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """d' under each weighting `[N, Q]`: sqrt(2) z(AUC), from the area under the ROC curve. A bias to Yes has no effect.

    An AUC of 0 or 1 counts as half a pair away from it.
    """
    present, absent = margins[is_present], margins[~is_present]
    wins = (present[:, None] > absent) + 0.5 * (present[:, None] == absent)  # [P, A]
    of_present, of_absent = weights[:, is_present], weights[:, ~is_present]  # [N, P], [N, A]
    area = ((of_present @ wins) * of_absent).sum(axis=1) / (of_present.sum(axis=1) * of_absent.sum(axis=1))
    margin = 0.5 / wins.size
    return np.sqrt(2) * torch.special.ndtri(torch.from_numpy(area.clip(margin, 1 - margin))).numpy()
