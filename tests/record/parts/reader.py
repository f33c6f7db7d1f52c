"""Which records of PAD files are accepted and which refused: by `verify`, by `stats`, and by training.

Of a refusal its place is recorded (record, field, check), not its words.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from product import Facts, Product

PLACE = re.compile(r"\b(line|record|row) (\d+)")


def record(product: Product) -> Facts:
    """By file of the fuzz set; and what training does with the large one."""
    files = sorted((product.inputs / "fuzz").iterdir())
    return {
        "files": {path.name: _verified(product, path) for path in files},
        "scenes": _verified(product, product.inputs / "mini/heldout/pad.json"),
        "stats": _statistics(product),
        "training": _trained(product),
    }


def _verified(product: Product, path: Path) -> Facts:
    output = product.work / "verify" / path.name
    status, printed = product.call("patch-aligned", "verify", path, "--output", output, "--min-mask-box-iou", "0.3")
    if not (output / "verify.json").exists():
        place = PLACE.search(printed)
        return {"status": status, "place": place.groups() if place else None}
    problems = product.read(output / "problems.jsonl")
    places = [[problem[key] for key in ("record", "field", "check", "severity")] for problem in problems]
    numbers = product.read(output / "verify.json")
    return {"status": status, "problems": places, **{key: numbers[key] for key in numbers if key != "examples"}}


def _statistics(product: Product) -> Facts:
    facts: Facts = {}
    pad = product.inputs / "mini/train/pad.json"
    for ratio in ("square", "pad"):
        output = product.work / f"stats_{ratio}"
        product.expect("patch-aligned", "stats", pad, "--output", output, "--image-aspect-ratio", ratio, "--no-plots")
        facts[ratio] = {"numbers": product.read(output / "stats.json"), "tags": (output / "tags.tsv").read_text()}
    return facts


def _trained(product: Product) -> Facts:
    """A training that is told to skip what is broken lists what it skipped."""
    pad = product.work / "pad.jsonl"
    scenes = json.loads((product.inputs / "mini/train/pad.json").read_text())
    fuzz = (product.inputs / "fuzz/records.jsonl").read_text(encoding="utf-8")
    pad.write_text("\n".join([*map(json.dumps, scenes), fuzz]), encoding="utf-8")
    flags = ("--patch_on_error", "skip")
    output = product.train("pretrain_patchaligned.sh", "skipping", *flags, PAD_PATH=str(pad), MAX_STEPS="2")
    skipped = product.read(output / "patch_skipped.jsonl")
    losses = product.read(output / "trainer_state.json")["log_history"]
    return {"losses": losses, "skipped": [{key: line[key] for key in line if key != "message"} for line in skipped]}
