"""What a step of stage 2 gains where questions about an image stand behind one prefix (`--independent_turns`), and
where samples are packed in place of padding (`--pack_samples`).

    python benchmarks/stage2_step.py    # the miniature, on CPU

Both sides of a pair train the same samples, with equal losses, in turn. The first ratio is of answered questions a
second; the second of samples, with images and without, as drawn and not grouped by length.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measured_models import MODELS, ROOT, keep_layers, miniature_model, ratio_and_spread, seconds_in_turn
from measuring import command_line, require_miniature

from llava.train.assemble import make_data
from playground.mini.proof.finetune import by_scene

SCENES = ROOT / "playground/data/mini/train"


def step_of(records: list[dict[str, Any]], flags: str = "", layers: int | None = None) -> Callable[[], float]:
    """A step over all records, forward and backward, of LLM and projector, that returns its loss."""
    with tempfile.TemporaryDirectory() as folder:
        data_path = Path(folder, "data.json")
        data_path.write_text(json.dumps(records), encoding="utf-8")
        flags = (
            f"--version chatml_direct --data_path {data_path} --image_folder {SCENES} --image_aspect_ratio pad "
            f"--lazy_preprocess True --model_max_length 2048 {flags}"
        )
        torch.manual_seed(0)  # both sides have the same untrained projector
        tokenizer, model, model_args, data_args, training_args = miniature_model(flags, folder)
        keep_layers(model, layers)
        data = make_data(tokenizer, model, model_args, data_args, training_args, None)
        batch = data["data_collator"]([data["train_dataset"][row] for row in range(len(records))])
    model.train()

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return step


def sides_of(scenes: int, layers: int | None = None) -> tuple[int, Callable[[], float], Callable[[], float]]:
    """Number of questions about scenes, and a step of them: behind one prefix for each scene, and one by one."""
    records = json.loads((SCENES / "choices_instruct.json").read_text(encoding="utf-8"))
    dialogues = by_scene(records)[:scenes]
    single = [record for record in records if record["image"] in {dialogue["image"] for dialogue in dialogues}]
    return len(single), step_of(dialogues, "--independent_turns True", layers), step_of(single, layers=layers)


def packed_sides(samples: int, layers: int | None = None) -> tuple[Callable[[], float], Callable[[], float]]:
    """A step of dialogues about scenes as they were drawn, every third without its image: packed, and padded."""
    records = json.loads((SCENES / "instruct.json").read_text(encoding="utf-8"))[:samples]
    for record in records[2::3]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>\n", "")
    return step_of(records, "--pack_samples True", layers), step_of(records, layers=layers)


def compare(what: str, fast: Callable[[], float], plain: Callable[[], float], repeats: int) -> None:
    """Print the ratio of two sides, then the times and losses it comes from."""
    losses: dict[str, float] = {}
    sides = {"fast": lambda: losses.update(fast=fast()), "plain": lambda: losses.update(plain=plain())}
    seconds = seconds_in_turn(sides, repeats, "cpu")
    print(f"{what:<70} {ratio_and_spread(seconds['plain'], seconds['fast'])}")
    print(f"  steps {statistics.median(seconds['fast']):.2f} and {statistics.median(seconds['plain']):.2f} s, "
          f"losses {losses['fast']:.6f} and {losses['plain']:.6f}")  # fmt: skip
    if abs(losses["fast"] - losses["plain"]) > 1e-5 * losses["plain"]:
        raise SystemExit(f"{what}: the losses differ")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print ratios, each with the times it comes from."""
    parser = command_line(__doc__)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="of the packed batch")
    parser.add_argument("--layers", type=int, help="of the LLM, for a quick look")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    require_miniature(MODELS / "smollm2-135m-instruct", SCENES / "choices_instruct.json")

    questions, together, alone = sides_of(args.scenes, args.layers)
    compare("answered questions / s, behind one prefix against one by one", together, alone, args.repeats)
    print(f"  {questions} questions about {args.scenes} scenes, forward and backward, no optimizer")
    compare("samples / s, packed against padded", *packed_sides(args.samples, args.layers), args.repeats)
    print(f"  {args.samples} samples of many lengths, forward and backward, no optimizer")


if __name__ == "__main__":
    main()
