"""What a step of stage 2 gains where the questions about an image stand behind one prefix (`--independent_turns`).

    python benchmarks/stage2_step.py    # the miniature, on CPU

Both sides train the same questions of the same scenes, with equal losses. The ratio is of answered questions a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measured_models import MODELS, ROOT, median_seconds, miniature_model

from llava.train.assemble import make_data
from playground.mini.proof.finetune import by_scene

SCENES = ROOT / "playground/data/mini/train"


def step_of(records: list[dict[str, Any]], *, independent_turns: bool) -> Callable[[], float]:
    """A step over all records, forward and backward, of LLM and projector, that returns its loss."""
    with tempfile.TemporaryDirectory() as folder:
        data_path = Path(folder, "data.json")
        data_path.write_text(json.dumps(records), encoding="utf-8")
        flags = (
            f"--version chatml_direct --data_path {data_path} --image_folder {SCENES} --image_aspect_ratio pad "
            f"--lazy_preprocess True --model_max_length 2048 --independent_turns {independent_turns}"
        )
        torch.manual_seed(0)  # both sides have the same untrained projector
        tokenizer, model, model_args, data_args, training_args = miniature_model(flags, folder)
        data = make_data(tokenizer, model, model_args, data_args, training_args, None)
        batch = data["data_collator"]([data["train_dataset"][row] for row in range(len(records))])
    model.train()

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return step


def sides_of(scenes: int) -> tuple[int, Callable[[], float], Callable[[], float]]:
    """Number of questions about scenes, and a step of them: behind one prefix for each scene, and one by one."""
    records = json.loads((SCENES / "choices_instruct.json").read_text(encoding="utf-8"))
    dialogues = by_scene(records)[:scenes]
    single = [record for record in records if record["image"] in {dialogue["image"] for dialogue in dialogues}]
    return len(single), step_of(dialogues, independent_turns=True), step_of(single, independent_turns=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratio, then the times it comes from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if not (MODELS / "smollm2-135m-instruct").exists() or not (SCENES / "choices_instruct.json").exists():
        raise SystemExit(f"No {MODELS} or {SCENES}; next: bash scripts/prepare_mini.sh")

    questions, together, alone = sides_of(args.scenes)
    losses = together(), alone()
    alone_s = median_seconds(alone, args.repeats, "cpu")
    together_s = median_seconds(together, args.repeats, "cpu")
    print(f"answered questions / s, behind one prefix against one by one   {alone_s / together_s:.2f}x")
    print(f"step {together_s:.2f} s behind one prefix, {alone_s:.2f} s one by one")
    print("losses {:.6f} and {:.6f}".format(*losses))
    print(f"{questions} questions about {args.scenes} scenes, forward and backward, no optimizer")


if __name__ == "__main__":
    main()
