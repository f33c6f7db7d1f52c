"""Bytes of PAD: from the replay of finished annotations, and from the pipeline with tiny random models."""

from __future__ import annotations

from pathlib import Path

from inputs import annotate_command
from product import Facts, Product, replay_command, sha256

SUFFIXES = (".json", ".jsonl.gz", ".parquet")


def record(product: Product) -> Facts:
    """Hashes of shards and merged files, and everything beside them."""
    scenes = product.inputs / "mini/train"
    replayed, piped = product.work / "replayed", product.work / "piped"
    images = ["--images", scenes / "train.json", "--image_folder", scenes, "--shard_size", "8"]
    product.run(*replay_command(product, scenes / "pad.json"), *images, "--output", replayed)
    product.run(*annotate_command(product, piped))
    facts = {"replayed": run_folder(product, replayed), "piped": run_folder(product, piped)}
    chosen = product.work / "reselected.jsonl"
    changes = ("--nms-iou", "0.3", "--label-mode", "best_tag")
    product.expect("patch-aligned", "reselect", piped, "--output", chosen, *changes)
    facts["reselected"] = product.read(chosen)
    joined = product.work / "joined.jsonl"
    product.expect("patch-aligned", "join", scenes / "pad.json", scenes / "train.json", "--output", joined)
    facts["joined"] = product.read(joined)
    published = product.work / "published"
    product.expect("patch-aligned", "publish", scenes / "pad.json", "--output", published, "--no-plots")
    facts["published"] = {
        str(path.relative_to(published)): sha256(path.read_bytes()) for path in sorted(published.rglob("*.parquet"))
    }
    return facts


def run_folder(product: Product, folder: Path) -> Facts:
    """A run of `annotate`, and what `merge` makes of it."""
    shards = {path.name: sha256(path.read_bytes()) for path in sorted((folder / "shards").glob("*"))}
    facts: Facts = {"shards": shards, "settings": product.read(folder / "settings.json"), "merged": {}}
    facts["manifest"] = sha256((folder / "manifest.jsonl").read_bytes())
    for suffix in SUFFIXES:
        file = product.work / f"{folder.name}{suffix}"
        product.expect("patch-aligned", "merge", folder, "--output", file)
        facts["merged"][suffix] = {
            "sha256": sha256(file.read_bytes()),
            "skipped": product.read(file.with_name(f"{file.name}.skipped.jsonl")),
            "settings": product.read(file.with_name(f"{file.name}.settings.json")),
        }
    everything = product.work / f"{folder.name}_all.jsonl"
    product.expect("patch-aligned", "merge", folder, "--output", everything, "--all", "--keep-candidates")
    facts["records"] = product.read(everything)
    return facts
