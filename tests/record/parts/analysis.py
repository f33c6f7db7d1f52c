"""`analysis.json` key by key, and the words of token maps. Pages and pictures are left out: their look may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from product import RUN_RECORD, Facts, Product


def record(product: Product) -> Facts:
    """By data set and settings."""
    scenes = product.inputs / "mini/heldout"
    runs: dict[str, tuple[Path, tuple[str, ...]]] = {
        "pad": (scenes / "pad.json", ("--random-init", "2", "--resamples", "200")),
        "coco": (product.inputs / "coco.json", ("--limit", "10", "--threshold-rule", "otsu", "--resamples", "0")),
        "padded": (scenes / "pad.json", ("--image-aspect-ratio", "pad", "--random-init", "0", "--min-coverage", "0.25",
                                         "--subset", "first", "--limit", "7", "--resamples", "50")),
    }  # fmt: skip
    if product.whole:
        rules = ("mean_std", "top_area")
        runs |= {rule: (scenes / "pad.json", ("--threshold-rule", rule, "--seed", "3")) for rule in rules}
    facts: Facts = {}
    for name, (data, flags) in runs.items():
        output = product.work / name
        words = ["analyze", *_models(product), "--data", data, "--image-folder", scenes, "--output", output, *flags]
        if "--image-aspect-ratio" not in flags:
            words += ["--image-aspect-ratio", "square"]
        product.expect("patch-aligned", *words)
        facts[name] = {"analysis": product.read(output / "analysis.json"), "files": _names(output)}
        if (output / "token_map.json").exists():
            facts[name]["token_map"] = product.read(output / "token_map.json")
    for name, flags in {"signed": (), "absolute": ("--choice", "absolute", "--orthogonal", "--unscaled")}.items():
        output = product.work / f"words_{name}"
        images = ["--data", scenes / "pad.json", "--image-folder", scenes, "--limit", "3"]
        words = ["token-map", *_models(product), *images, "--image-aspect-ratio", "square", "--no-png", *flags]
        product.expect("patch-aligned", *words, "--output", output)
        facts[f"words, {name}"] = product.read(output / "token_map.json")
    return facts


def _models(product: Product) -> list[Any]:
    projectors = {
        "random": "random:0",
        "captions": product.inputs / "projectors/captions",
        "aligned": product.inputs / "projectors/patch_aligned",
        "stage2": product.inputs / "checkpoint_a",
    }
    base = ["--base", product.inputs / "models/tiny-vicuna", "--vision-tower", product.inputs / "models/tiny-clip"]
    return [word for name, path in projectors.items() for word in ("--projector", f"{name}={path}")] + base


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != RUN_RECORD)
