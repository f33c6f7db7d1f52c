"""What a step of stage 2 gains where questions about an image stand behind one prefix (`--independent_turns`), and
where samples are packed in place of padding (`--pack_samples`).

    python benchmarks/stage2_step.py    # the miniature, on CPU

Both sides of a pair train the same samples, with equal losses, in turn. The first ratio is of answered questions a
second; the second of samples, with images and without, as drawn and not grouped by length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measured_models import MODELS, ROOT, miniature_model, ratio_and_spread, seconds_in_turn

from llava.train.assemble import make_data
from playground.mini.proof.finetune import by_scene

SCENES = ROOT / "playground/data/mini/train"


def step_of(records: list[dict[str, Any]], flags: str, layers: int | None) -> tuple[Callable[[], None], list[float]]:
    """A step over all records, forward and backward, of LLM and projector; and where it puts its losses."""
    with tempfile.TemporaryDirectory() as folder:
        data_path = Path(folder, "data.json")
        data_path.write_text(json.dumps(records), encoding="utf-8")
        flags = (
            f"--version chatml_direct --data_path {data_path} --image_folder {SCENES} --image_aspect_ratio pad "
            f"--lazy_preprocess True --model_max_length 2048 {flags}"
        )
        torch.manual_seed(0)  # both sides have the same untrained projector
        tokenizer, model, model_args, data_args, training_args = miniature_model(flags, folder, layers)
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


def mixed(samples: int) -> list[dict[str, Any]]:
    """Return dialogues about scenes as they were drawn, and every third without its image."""
    records = json.loads((SCENES / "instruct.json").read_text(encoding="utf-8"))[:samples]
    for record in records[2::3]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>\n", "")
    return records


def compare(
    what: str, plain: str, fast: str, sides: dict[str, tuple[Callable[[], None], list[float]]], repeats: int
) -> None:
    """Print the ratio of two sides, then the times and losses it comes from."""
    seconds = seconds_in_turn({name: step for name, (step, _) in sides.items()}, repeats, "cpu")
    print(f"{what}, {fast} against {plain}   {ratio_and_spread(seconds[plain], seconds[fast])}")
    for name, (_, losses) in sides.items():
        print(f"  {name}: step {statistics.median(seconds[name]):.2f} s, loss {losses[0]:.6f}")
        if abs(losses[0] - sides[plain][1][0]) > 1e-5 * losses[0]:
            raise SystemExit(f"{name}: the loss differs from that of {plain}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print ratios, each with the times it comes from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of the packed batch")
    parser.add_argument("--layers", type=int, help="of the LLM, for a quick look")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if not (MODELS / "smollm2-135m-instruct").exists() or not (SCENES / "choices_instruct.json").exists():
        raise SystemExit(f"No {MODELS} or {SCENES}; next: bash scripts/prepare_mini.sh")

    records = json.loads((SCENES / "choices_instruct.json").read_text(encoding="utf-8"))
    dialogues = by_scene(records)
    single = [
        record for record in records if record["image"] in {dialogue["image"] for dialogue in dialogues[: args.scenes]}
    ]
    sides = {
        "one by one": step_of(single, "", args.layers),
        "behind one prefix": step_of(dialogues[: args.scenes], "--independent_turns True", args.layers),
    }
    compare("answered questions / s", "one by one", "behind one prefix", sides, args.repeats)
    print(f"  {len(single)} questions about {args.scenes} scenes, forward and backward, no optimizer")
    samples = mixed(args.samples)
    sides = {
        "padded": step_of(samples, "", args.layers),
        "packed": step_of(samples, "--pack_samples True", args.layers),
    }
    compare("samples / s", "padded", "packed", sides, args.repeats)
    print(f"  {len(samples)} samples of many lengths, forward and backward, no optimizer")


if __name__ == "__main__":
    main()
