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


def step_of(records: list[dict[str, Any]], *, independent_turns: bool) -> tuple[Callable[[], None], list[float]]:
    """A step over all records, forward and backward, of LLM and projector; and where it puts its losses."""
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
    losses: list[float] = []

    def step() -> None:
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        losses.append(float(loss.detach()))

    return step, losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratio, then the times it comes from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if not (MODELS / "smollm2-135m-instruct").exists() or not (SCENES / "choices_instruct.json").exists():
        raise SystemExit(f"No {MODELS} or {SCENES}; next: bash scripts/prepare_mini.sh")

    records = json.loads((SCENES / "choices_instruct.json").read_text(encoding="utf-8"))
    dialogues = by_scene(records)[: args.scenes]
    single = [record for record in records if record["image"] in {dialogue["image"] for dialogue in dialogues}]
    alone, alone_losses = step_of(single, independent_turns=False)
    together, together_losses = step_of(dialogues, independent_turns=True)
    alone_s = median_seconds(alone, args.repeats, "cpu")
    together_s = median_seconds(together, args.repeats, "cpu")
    print(f"answered questions / s, behind one prefix against one by one   {alone_s / together_s:.2f}x")
    print(f"step {together_s:.2f} s behind one prefix, {alone_s:.2f} s one by one")
    print(f"losses {together_losses[0]:.6f} and {alone_losses[0]:.6f}")
    print(f"{len(single)} questions about {len(dialogues)} scenes, forward and backward, no optimizer")


if __name__ == "__main__":
    main()
