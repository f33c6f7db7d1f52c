"""Answers and scores of PRESET=mini evaluation, and of LLaVA's own question files."""

from __future__ import annotations

from pathlib import Path

from product import RUN_RECORD, Facts, Product

UNSTABLE = "answer_id"  # a random id a line


def record(product: Product) -> Facts:
    """Run files of the miniature's benchmarks and captions, and answers of `model_vqa_loader` in both ways to batch."""
    checkpoint, output = product.inputs / "checkpoint_a", product.work / "runs"
    scenes = product.inputs / "mini/heldout"
    variables = {"PRESET": "mini", "OUTPUT": str(output)}
    captions = ("--references", str(scenes / "captions.json"), "--image-folder", str(scenes))
    commands = product.printed("eval/all.sh", str(checkpoint), SKIP_CAPTIONS="1", **variables)
    commands += product.printed("eval/captions.sh", str(checkpoint), *captions, **variables)
    for command in commands:
        if not any(word.startswith("playground.mini.") for word in command):
            product.run(*command)  # scenes and benchmarks are there
    return {"runs": run_files(product, output), "vqa": _question_file(product, checkpoint)}


def run_files(product: Product, folder: Path) -> Facts:
    """Result and samples of each benchmark, key by key."""
    files = [path for path in sorted(folder.glob("*/*.json*")) if path.name != RUN_RECORD]
    return {str(path.relative_to(folder)): product.read(path) for path in files}


def _question_file(product: Product, checkpoint: Path) -> Facts:
    scenes = product.inputs / "mini/heldout"
    facts: Facts = {}
    for batch in ("1", "8") if product.whole else ("8",):
        answers = product.work / f"answers_{batch}.jsonl"
        product.run(
            "python", "-m", "llava.eval.model_vqa_loader", "--model-path", checkpoint, "--image-folder", scenes,
            "--question-file", scenes / "questions.jsonl", "--answers-file", answers, "--temperature", "0",
            "--max_new_tokens", "12", "--batch-size", batch, "--device", "cpu",
        )  # fmt: skip
        lines = product.read(answers)
        facts[f"batch {batch}"] = [{key: line[key] for key in line if key != UNSTABLE} for line in lines]
    return facts
