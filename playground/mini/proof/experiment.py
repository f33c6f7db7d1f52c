"""What the experiment trains and measures. It was committed before the test scenes were drawn.

Primary outcomes are `PRIMARY`; everything else is exploratory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MODELS = "playground/mini/cache/models"
LLM, TOWER = f"{MODELS}/smollm2-135m-instruct", f"{MODELS}/dinov2-small"

WARMUP_STEPS = 1600
JOINT_STEPS = 48
RATES = (3e-4, 1e-3, 3e-3)
"""Tried for captions alone, on development scenes; all other arms take 1e-3, as the paper does."""
RATE = 1e-3
BETA = 5.0

TILE_PX = 224
"""Of a model like InternVL, which merges 2 x 2 patches: 64 visual tokens, as LLaVA has with pictures of 112 px."""

STAGE_2_RATE = 1e-4
STAGE_2_TEMPLATE = "chatml_direct"
STAGE_2_STEPS = (30, 100, 300)
"""Steps after which stage 2 is measured, beside 0: the frozen LLM with the projector of stage 1."""


@dataclass(frozen=True)
class Draw:
    """A set of scenes."""

    seed: int  # of the generator; no two sets share one
    scenes: int  # how many


DRAWS = {"train": Draw(0, 1600), "development": Draw(1, 120), "test": Draw(2, 240)}


@dataclass(frozen=True)
class Arm:
    """One way of training stage 1. Arms of one seed share initialisation, scenes and their order."""

    name: str  # in tables
    training: str  # in words
    isolates: str  # what a difference from another arm shows
    variant: Literal["tags", "deranged", "union"] | None = None  # of the training files, see `playground.mini.arms`
    has_warmup: bool = True  # whether patch steps come before the joint ones
    beta: tuple[float, float] | None = (BETA, BETA)  # at the first and last joint step; None for captions alone
    rotated: bool = False  # whether targets are rotated words


ARMS = {
    arm.name: arm
    for arm in (
        Arm("C", "captions alone", "the baseline", has_warmup=False, beta=None),
        Arm("T", "captions, each followed by every label", "T - C: the same words as text", "tags", False, None),
        Arm("P", "warm-up, then captions and patch loss", "P - C: the claim"),
        Arm("R", "P towards rotated words", "P - R: the word; R - C: clustering, supervision, updates", rotated=True),
        Arm("D", "P with names deranged", "P - D: whether the LLM says what the token was told", "deranged"),
        Arm("M", "P with each label on all objects of the scene", "P - M: the place", "union"),
        Arm("P>C", "warm-up, then captions alone", "P - P>C: the joint loss after initialisation", beta=(0.0, 0.0)),
        Arm("R>C", "rotated warm-up, then captions alone", "P>C - R>C: the word", beta=(0.0, 0.0), rotated=True),
        Arm("P ramp", "no warm-up, beta 0 to 5", "the paper's own schedule", has_warmup=False, beta=(0.0, BETA)),
    )
}

PRIMARY = (("P", "C"), ("P", "R"), ("P", "D"))
"""Differences of the name score `name_bound` on test scenes, over all objects, paired over seeds."""
PRIMARY_STAGE_2, PRIMARY_STEP = (("P", "C"), ("P", "R")), 100
"""Differences of d' of existence on test scenes, names that texts mention, after this many steps of stage 2."""


@dataclass(frozen=True)
class Budget:
    """How much of the experiment is run.

    `like` is the architecture of transformers that `patch-aligned stitch` puts together and `patch-aligned train`
    trains; None for LLaVA's own.
    """

    seeds: tuple[int, ...]  # of initialisation and order
    arms: tuple[str, ...] = tuple(ARMS)
    joint_steps: int = JOINT_STEPS  # of stage 1, for all arms
    curve: tuple[int, ...] = (300,)  # steps after which C is measured again, at its best rate, with the first seed
    warmup_steps: int = WARMUP_STEPS  # of the arms that have a warm-up
    draws: Mapping[str, Draw] = field(default_factory=lambda: DRAWS)
    stage_2: tuple[str, ...] = ()  # arms whose projectors stage 2 starts from
    stage_2_seeds: tuple[int, ...] = ()  # of stage 1 and 2
    stage_2_steps: tuple[int, ...] = STAGE_2_STEPS  # after which it is measured
    like: str | None = None


BUDGETS = {
    "primary": Budget(seeds=(0, 1, 2), arms=("C", "P", "R", "D"), curve=()),
    "short": Budget(seeds=(0, 1, 2)),
    "evening": Budget(
        seeds=(0,), arms=("C", "P", "R", "D"), curve=(300, 1000), stage_2=("C", "P", "R"), stage_2_seeds=(0,)
    ),
    "nights": Budget(seeds=(0, 1, 2, 3, 4), curve=(300, 1000), stage_2=("C", "P", "R"), stage_2_seeds=(0, 1, 2)),
    "internvl": Budget(seeds=(0, 1), arms=("C", "P", "R"), curve=(), warmup_steps=800, like="internvl"),
    "tiny": Budget(
        seeds=(0, 1),
        arms=("C", "P", "R", "D"),
        joint_steps=2,
        curve=(3,),
        warmup_steps=4,
        draws={"train": Draw(0, 16), "development": Draw(1, 8), "test": Draw(2, 8)},
        stage_2=("C", "P", "R"),
        stage_2_seeds=(0, 1),
        stage_2_steps=(1, 2),
    ),
}
