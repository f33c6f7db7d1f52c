"""Runs that the baseline began and was killed in (see inputs.py), finished by this checkout.

Where this checkout's own uninterrupted run ends is recorded beside: a run that is finished must not differ from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from inputs import annotate_command
from product import Facts, Product

from parts.annotation import run_folder
from parts.evaluation import run_files


def record(product: Product) -> Facts:
    """Training in stage 1, stage 2 and LoRA; annotation; evaluation."""
    scripts = ("pretrain_patchaligned", "finetune", "finetune_lora")
    facts: Facts = {script: _training(product, script) for script in scripts}
    for name, read in {"annotation": run_folder, "evaluation": run_files}.items():
        pair = {}
        for end in ("finished", "uninterrupted"):
            output = product.work / end / name
            if end == "finished":
                shutil.copytree(product.inputs / "killed" / name, output)
            product.run(*_command(product, name, output))
            pair[end] = read(product, output)
            for file in product.work.glob(f"{name}*.*"):
                file.unlink()
        facts[name] = {"equal": pair["finished"] == pair["uninterrupted"], **pair}
    return facts


def _command(product: Product, name: str, output: Path) -> list[str]:
    if name == "annotation":
        return annotate_command(product, output)
    words = ["--model-path", str(product.inputs / "checkpoint_a"), "--benchmarks", "mini", "--output", str(output)]
    return ["python", "-m", "eval.run", *words, "--batch-size", "2"]


def _training(product: Product, script: str) -> Facts:
    pair = {}
    for end in ("finished", "uninterrupted"):
        if end == "finished":
            shutil.copytree(product.inputs / "killed" / script, product.work / script)
        output = product.train(f"{script}.sh", script)
        pair[end] = product.folder(output)
        # transformers gives the mean since the resumption: another number, and no sign of other weights.
        pair[end]["json"]["trainer_state.json"]["log_history"][-1].pop("train_loss")
        shutil.rmtree(output)
    return {"equal": pair["finished"] == pair["uninterrupted"], **pair}
