"""Makes what both checkouts are given: weights, scenes, records, masks, projectors, and runs that were killed.

    bash tests/record/inputs.sh WORKTREE INPUTS

WORKTREE is the baseline (commit 2628157). Everything is made by it, once; INPUTS must not be moved afterwards, since
runs that were killed name their files.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from product import BENCHMARKS, Product

MASKS_PER_IMAGE = 40
SIZES_WH = ((448, 336), (336, 448), (336, 336), (640, 427), (333, 500), (97, 61), (1024, 128), (120, 900), (17, 23),
            (672, 672), (500, 375), (1, 40))  # fmt: skip
FUZZED = 1500
TRAINED = ({"MAX_STEPS": "400", "LEARNING_RATE": "3e-3"}, {"MAX_STEPS": "250", "LEARNING_RATE": "2e-3", "SEED": "7"})


def main() -> int:
    """Makes the inputs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worktree", type=Path)
    parser.add_argument("inputs", type=Path)
    options = parser.parse_args()
    tree, inputs = options.worktree.resolve(), options.inputs.resolve()
    if (inputs / "made.json").exists():
        return 0
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir(parents=True)
    product = Product(tree, inputs, inputs / "work")
    product.work.mkdir()

    for name in ("tiny-vicuna", "tiny-clip"):
        shutil.copytree(tree / "tests/goldens/llava" / name, inputs / "models" / name)
    for split, count in (("train", 48), ("heldout", 24)):
        scenes = ["--style", "simple", "--split", split, "--count", str(count), "--out", inputs / "mini" / split]
        product.run("python", "-m", "playground.mini.make_scenes", *scenes)
    product.run("python", "-m", "playground.mini.reference_captions", "--data", inputs / "mini/heldout")
    product.run("python", "-m", "playground.mini.annotation_models", "--out", inputs / "annotation_models")
    write_masks(inputs / "masks.jsonl")
    write_fuzz(tree, inputs / "fuzz")
    write_coco(inputs / "mini/heldout/pad.json", inputs / "coco.json")

    for name, script in (("captions", "pretrain.sh"), ("patch_aligned", "pretrain_patchaligned.sh")):
        keep(product.train(script, name, MAX_STEPS="40"), inputs / "projectors" / name)
    checkpoints = [
        keep(product.train("finetune.sh", name, **variables), inputs / name)
        for name, variables in zip(("checkpoint_a", "checkpoint_b"), TRAINED, strict=True)
    ]
    for checkpoint in checkpoints:
        [*_, command] = product.printed(
            "eval/all.sh", str(checkpoint), PRESET="mini", OUTPUT=str(inputs / "runs" / checkpoint.name)
        )
        product.run("python", "-m", "playground.mini.evaluation_set")
        product.run(*command)
    shutil.copytree(tree / BENCHMARKS, inputs / "mini/eval")
    kill_a_training(product)
    kill_an_annotation(product)
    kill_an_evaluation(product)
    shutil.rmtree(product.work)
    (inputs / "made.json").write_text(json.dumps({"by": commit_of(tree)}) + "\n")
    return 0


def commit_of(tree: Path) -> str:
    """Of a worktree."""
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def keep(folder: Path, destination: Path) -> Path:
    """Moves what a training saved, without its intermediate checkpoints."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.copytree(folder, destination)
    shutil.rmtree(folder)
    return destination


# ---- masks and records ---------------------------------------------------------------------------------------------


def write_masks(path: Path) -> None:
    """An image a line: 40 masks each of 12 sizes, of which many cover cells by exactly half."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for width, height in SIZES_WH:
            masks = [_mask(number, height, width, rng) for number in range(MASKS_PER_IMAGE)]
            encoded = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode() for mask in masks]
            file.write(json.dumps({"size_wh": [width, height], "rle_masks": encoded}) + "\n")


def _mask(number: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    if number == 0:
        return np.zeros((height, width), dtype=bool)
    if number == 1:
        return np.ones((height, width), dtype=bool)
    if number < 8:  # stripes of whole pixels: half of every cell that holds a whole number of periods
        stripes = (x, y)[number % 2] // (1, 2, 7)[number % 3]
        return stripes % 2 == 0
    if number < 20:  # edges on halves of cells of a grid of 24, 16, 8 or 4
        cells = (24, 16, 8, 4)[number % 4]
        left, top = rng.integers(0, 2 * cells, 2)
        return (x * 2 * cells >= left * width) & (y * 2 * cells >= top * height)
    if number < 24:  # noise of blocks; of single pixels it would take most of the time
        block = max(1, max(width, height) // 32)
        noise = rng.random((height // block + 1, width // block + 1)) < rng.uniform(0.2, 0.8)
        return noise.repeat(block, axis=0).repeat(block, axis=1)[:height, :width]
    center, radii = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.05, 0.6, 2) * (width, height)
    return ((x - center[0]) / radii[0]) ** 2 + ((y - center[1]) / radii[1]) ** 2 <= 1


def write_fuzz(tree: Path, folder: Path) -> None:
    """The spoilt records of tests/patch_aligned/test_reader_fuzz.py: those that are JSON in one file, others apart."""
    from hypothesis import HealthCheck, given, settings

    folder.mkdir()
    sys.path.insert(0, str(tree))  # the test imports the reader
    spec = importlib.util.spec_from_file_location("fuzz", tree / "tests/patch_aligned/test_reader_fuzz.py")
    assert spec is not None and spec.loader is not None
    fuzz: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    lines: list[str] = []
    broken: list[str] = []

    @given(fuzz.spoilt_records())
    @settings(
        max_examples=FUZZED, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    def collect(records: list[Any]) -> None:
        for record in records:
            text = fuzz.text_of(record)
            (broken if fuzz.parsed(text) is ValueError else lines).append(text)

    collect()
    kept, names = [], set()
    for text in dict.fromkeys(lines):
        record = json.loads(text)
        name = record.get("image_id") if isinstance(record, dict) else None
        if isinstance(name, str) and name in {"0/ä.jpg", "1/ä.jpg", "2/ä.jpg", "3/ä.jpg"}:
            record["image_id"] = f"{len(kept)}/ä.jpg"  # a second record of an image is refused for that alone
            text = json.dumps(record)
        names.add(name if isinstance(name, str) else "")
        kept.append(text)
    sound = [json.dumps(record) for record in fuzz.RECORDS]
    (folder / "records.jsonl").write_text("\n".join([*kept, *sound, *sound]) + "\n", encoding="utf-8")
    (folder / "records.json.gz").write_bytes(gzip.compress(("[" + ",".join(kept) + "]").encode(), 1, mtime=0))
    for number, text in enumerate(dict.fromkeys(broken)):
        if number < 40:
            (folder / f"broken_{number:02}.jsonl").write_text("\n".join([*sound[:2], text, sound[2]]), encoding="utf-8")
    whole = "\n".join(sound).encode()
    rng = np.random.default_rng(0)
    for number in range(60):
        start, length = int(rng.integers(0, len(whole))), int(rng.integers(0, 5))
        piece = (b"", b"\xff", b"\n", b"\r", b"\0", b'"', b"]", b"}", b",", b"\xef\xbb\xbf", b"NaN")[number % 11]
        damaged = whole[:start] + piece + whole[start + length :]
        (folder / f"damaged_{number:02}.jsonl").write_bytes(damaged)
        packed = gzip.compress(whole, mtime=0)
        start = start % len(packed)
        (folder / f"damaged_{number:02}.jsonl.gz").write_bytes(packed[:start] + piece + packed[start + length :])


def write_coco(pad: Path, path: Path) -> None:
    """The held-out scenes as COCO's instances: masks by RLE, by runs in the clear, and as polygons of the boxes."""
    images, annotations, categories = [], [], {}
    for number, record in enumerate(json.loads(pad.read_text())):
        width, height = record["size"]
        images.append({"id": number, "file_name": record["image_id"], "width": width, "height": height})
        for label in record["labels"]:
            left, top, right, bottom = label["bbox"]
            category = categories.setdefault(label["tag"], len(categories) + 1)
            polygon = [[left, top, right, top, right, bottom, left, bottom]]
            rle = {"size": [height, width], "counts": label["rle_mask"]}
            annotations.append({
                "id": len(annotations), "image_id": number, "category_id": category, "iscrowd": 0,
                "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top),
                "segmentation": polygon if len(annotations) % 2 else rle,
            })  # fmt: skip
    named = [{"id": number, "name": name} for name, number in categories.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))


# ---- runs that were killed -----------------------------------------------------------------------------------------


def kill_a_training(product: Product) -> None:
    """Stage 1, stage 2 and LoRA, each killed once its checkpoint of step 10 of 20 is there."""
    for script in ("pretrain_patchaligned", "finetune", "finetune_lora"):
        output = product.inputs / "killed" / script
        [command] = product.printed(f"{script}.sh", **product.training_variables(output))
        kill_when(product, command, (output / "checkpoint-10/trainer_state.json").exists)


def annotate_command(product: Product, output: Path) -> list[str]:
    """The pipeline with tiny random models, over the held-out scenes."""
    models = product.inputs / "annotation_models"
    flags = {
        "images": product.inputs / "mini/heldout/images", "output": output, "ram": models / "ram.converted.safetensors",
        "ram_tag_list": models / "ram_tag_list.txt", "ram_thresholds": models / "ram_thresholds.txt",
        "detector": models / "grounding_dino", "sam": models / "sam", "box_threshold": 0.98, "shard_size": 4,
        "decode_workers": 2, "device": "cpu",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["python", "-m", "patch_aligned.cli", "annotate", *words]


def kill_an_annotation(product: Product) -> None:
    """Killed once its first shard is there."""
    output = product.inputs / "killed/annotation"
    kill_when(product, annotate_command(product, output), lambda: any((output / "shards").glob("*.gz")))


def kill_an_evaluation(product: Product) -> None:
    """Killed in the middle of its second benchmark."""
    output = product.inputs / "killed/evaluation"
    words = ["--model-path", str(product.inputs / "checkpoint_a"), "--benchmarks", "mini", "--output", str(output)]
    command = ["python", "-m", "eval.run", *words, "--batch-size", "2"]
    kill_when(product, command, lambda: sum(1 for file in output.glob("*/answers/*.jsonl") for _ in file.open()) > 90)


def kill_when(product: Product, command: list[str], ready: Any) -> None:
    """Starts a command and kills it as `kill -9` does."""
    words = [sys.executable if word == "python" else word for word in command]
    process = subprocess.Popen(
        words, cwd=product.tree, env=product.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not ready():
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)}: ended before it could be killed")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
