"""Trains and measures all arms of the experiment, step by step, and writes the report.

What each step makes stays in the folder of the run. Called again, finished steps are skipped and a training that was
interrupted resumes. `progress.html` in that folder shows what is done and how long is left.
"""

from __future__ import annotations

import os
import signal
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from playground.mini.proof.experiment import ARMS, BUDGETS, LLM, PRIMARY, RATE, RATES, TILE_PX, TOWER, Arm, Budget
from playground.mini.proof.steps import Step, StepError, Steps, file_name

BudgetName = Enum("BudgetName", {name: name for name in BUDGETS})  # type: ignore[misc]


def steps_of(budget: Budget, name: str) -> list[Step]:
    """All steps of a budget. `{state}` in commands is the folder of the run."""
    steps = [Step("models", ("bash", "scripts/prepare_mini.sh"))]
    for seed in budget.seeds:
        steps += [_scenes(budget, place, seed) for place in ("train", "test")]
    if budget.like is not None:
        return steps + _stitched(budget, budget.like, name)

    captions, first = ARMS["C"], budget.seeds[0]
    steps.append(_scenes(budget, "development", first))
    tried = [f"C at {rate:g}" for rate in RATES]
    for run, tried_rate in zip(tried, RATES, strict=True):
        steps += _run(budget, captions, first, run, budget.joint_steps, str(tried_rate), "development")
    names = [f"measure {run}" for run in tried]
    choice = ("playground.mini.proof.choose_rate", "{state}", *tried)
    steps.append(_step("choose the rate of C", *choice, needs=names, minutes=0.1))
    measured = []
    of_primary = {arm for pair in PRIMARY for arm in pair}
    runs = [(ARMS[arm], seed) for seed in budget.seeds for arm in budget.arms]
    for arm, seed in sorted(runs, key=lambda run: run[0].name not in of_primary):
        rate = "{state}/rate.txt" if arm.beta is None else str(RATE)
        steps += _run(budget, arm, seed, f"{arm.name}, seed {seed}", budget.joint_steps, rate, "test")
        measured.append(steps[-1].name)
    for joint_steps in budget.curve:
        run = f"C after {joint_steps} steps"
        steps += _run(budget, captions, first, run, joint_steps, "{state}/rate.txt", "test")
        measured.append(steps[-1].name)
    for seed in budget.stage_2_seeds:
        for name_of_arm in budget.stage_2:
            of_stage_2 = _stage_2(budget, f"{name_of_arm}, seed {seed}", seed)
            steps += of_stage_2
            measured += [step.name for step in of_stage_2 if step.kind == "ask"]
    report = ("playground.mini.proof.report", "--budget", name, "--state", "{state}")
    return [*steps, _step("report", *report, needs=measured, minutes=0.2)]


def _scenes(budget: Budget, place: str, seed: int) -> Step:
    """Scenes whose pictures are the same for all seeds of training, and whose texts leave out a seed's own names."""
    draw = budget.draws[place]
    split = "train" if place == "train" else "heldout"
    return _step(
        f"scenes: {place}-{seed}",
        *("playground.mini.make_scenes", "--split", split, "--seed", str(draw.seed), "--count", str(draw.scenes)),
        *("--held-out-seed", str(seed), "--out", f"{{state}}/scenes/{place}-{seed}"),
        kind="scenes",
    )


def _run(budget: Budget, arm: Arm, seed: int, run: str, joint_steps: int, rate: str, scenes: str) -> tuple[Step, Step]:
    """A training of stage 1 and its measures."""
    folder = f"{{state}}/runs/{file_name(run)}"
    program = ["playground.mini.proof.train"]
    if budget.like is not None:
        program = ["playground.mini.proof.train_any_vlm", "--model", _model(seed)]
    training = _step(
        f"train {run}",
        *(*program, "--arm", arm.name, "--seed", str(seed), "--steps", str(joint_steps)),
        *("--warmup-steps", str(budget.warmup_steps), "--rate", rate),
        *("--scenes", f"{{state}}/scenes/train-{seed}", "--features", "{state}/features", "--output", folder),
        needs=[
            *("models" if budget.like is None else f"stitch, seed {seed}", f"scenes: train-{seed}"),
            *(["choose the rate of C"] if rate.startswith("{") else []),
        ],
        kind=f"train {joint_steps} steps",
        minutes=joint_steps * 4.4 / 60 + 1,
    )
    measure = _step(
        f"measure {run}",
        *("playground.mini.proof.measure", folder, "--arm", arm.name, "--seed", str(seed)),
        *("--targets", f"{{state}}/scenes/train-{seed}/pad.json"),
        *("--scenes", f"{{state}}/scenes/{scenes}-{seed}", "--output", f"{{state}}/measures/{file_name(run)}"),
        *(() if budget.like is None else ("--objects-only",)),
        needs=[training.name, f"scenes: {scenes}-{seed}"],
        kind="measure" + " own" * (arm.rotated or arm.variant == "deranged"),
        minutes=4,
    )
    return training, measure


def _stitched(budget: Budget, like: str, name: str) -> list[Step]:
    """All of a model of transformers: stitching, trainings, measures and the report."""
    steps = [_step("tower", "playground.mini.prepare_models", "--image_size", str(TILE_PX), needs=["models"])]
    measured: list[str] = []
    for seed in budget.seeds:
        parts = ("--vision", f"{TOWER}-{TILE_PX}", "--llm", LLM, "--like", like, "--seed", str(seed))
        command = ("patch_aligned.cli", "stitch", *parts, "--output", _model(seed))
        steps.append(_step(f"stitch, seed {seed}", *command, needs=["tower"], kind="stitch"))
        test, measures = f"{{state}}/scenes/test-{seed}", list[Step]()
        for arm in budget.arms:
            run = f"{arm}, seed {seed}"
            training, measure = _run(budget, ARMS[arm], seed, run, budget.joint_steps, str(RATE), "test")
            reads = _step(
                f"reads {run}",
                *("patch_aligned.cli", "reads", f"{{state}}/runs/{file_name(run)}", "--limit", "90"),
                *("--data", f"{test}/pad.json", "--image-folder", test),
                *("--output", f"{{state}}/measures/{file_name(run)}_reads.json"),
                needs=list(measure.needs),
                kind="reads",
                minutes=2,
            )
            steps.append(training)
            measures += [reads, measure]
        steps += measures
        measured += [step.name for step in measures]
    report = ("playground.mini.proof.report_any_vlm", "--budget", name, "--state", "{state}")
    return [*steps, _step("report", *report, needs=measured, minutes=0.2)]


def _model(seed: int) -> str:
    return f"{{state}}/models/seed_{seed}"


def _stage_2(budget: Budget, run: str, seed: int) -> list[Step]:
    """Stage 2 on the projector of a run, and its measures; the training continues once a measure has read the model."""
    stage_1, stage_2 = (f"{{state}}/runs/{file_name(f'{prefix}{run}')}" for prefix in ("", "stage 2 of "))
    test = f"{{state}}/scenes/test-{seed}"
    steps: list[Step] = []
    for count in (0, *budget.stage_2_steps):
        if count:
            training = _step(
                f"finetune {run} to {count} steps",
                *("playground.mini.proof.finetune", stage_1, "--seed", str(seed), "--steps", str(count)),
                *("--scenes", f"{{state}}/scenes/train-{seed}", "--features", "{state}/features", "--output", stage_2),
                needs=[f"train {run}", steps[-1].name],
                kind=f"finetune to {count} steps",
                minutes=count * 0.15,
            )
            steps.append(training)
        answers = f"{{state}}/measures/{file_name(f'{run} after {count} steps of stage 2')}.parquet"
        asked = _step(
            f"ask {run} after {count} steps of stage 2",
            *("playground.mini.proof.ask", stage_2 if count else stage_1, "--scenes", test, "--output", answers),
            needs=[steps[-1].name if steps else f"train {run}", f"scenes: test-{seed}"],
            kind="ask",
            minutes=8,
        )
        steps.append(asked)
    return steps


def _step(
    name: str, module: str, *options: str, needs: list[str] | None = None, kind: str = "", minutes: float = 1
) -> Step:
    return Step(name, ("python", "-m", module, *options), tuple(needs or ()), kind or name, minutes)


def main(
    budget: Annotated[BudgetName, typer.Option(help="How much is run; see experiment.py.")] = BudgetName["short"],
    state: Annotated[
        Path | None, typer.Option(help="Folder of the run. [default: ~/.cache/patch_aligned/reproduce/BUDGET]")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Commands at a time. [default: one for each core]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each command.")] = 1,
    list_steps: Annotated[bool, typer.Option("--list", help="List the steps and their state, and stop.")] = False,
) -> None:
    """Run the experiment of the miniature: train all arms, measure them on test scenes, write the report."""
    folder = (state or Path("~/.cache/patch_aligned/reproduce", budget.value)).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    title = f"The miniature's experiment: {budget.value}"
    steps = Steps(steps_of(BUDGETS[budget.value], budget.value), folder, title, jobs or len(os.sched_getaffinity(0)))
    if list_steps:
        for name in steps.steps:
            print("to do" if name in steps.pending else "done ", name)
        return
    print(f"{len(steps.pending)} of {len(steps.steps)} steps to do; follow them at {folder / 'progress.html'}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        steps.run()
    except StepError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command continues.") from None
    print(f"Report: {folder / 'report' / 'report.md'}")


if __name__ == "__main__":
    typer.run(main)
