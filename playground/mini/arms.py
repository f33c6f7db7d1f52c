"""Training files for the controls of an experiment, from a data set that `make_scenes` made.

    python -m playground.mini.arms playground/data/mini/train tags --out playground/data/mini/tags
    python -m playground.mini.arms playground/data/mini/train deranged --seed 1 --out playground/data/mini/deranged_1
    python -m playground.mini.arms playground/data/mini/train union --out playground/data/mini/union

tags      each caption is followed by all labels of its picture: " Objects: crab, tent, sand."
deranged  labels of objects have other names, each of its own category, number of tokens and block of held-out names
union     labels of objects lie on all objects of their picture together

OUT gets train.json and pad.json; the pictures stay where they are. names.json, for `deranged`, has the name that each
name was replaced by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from llava.command import command_parser, run_command
from patch_aligned.files import written_whole
from playground.mini.make_scenes import JSON_FILES, SUMMARY
from playground.mini.scene_records import DatasetSettings
from playground.mini.sprites import HELD_OUT, held_out_names, load_sprites, names_by_kind

ARMS = ("tags", "deranged", "union")
NAMES = "names.json"

Record = dict[str, Any]


def with_tags(train: Sequence[Record], pad: Sequence[Record]) -> list[Record]:
    """Training records whose captions are followed by every label of the picture, each once."""
    tags = {record["image_id"]: dict.fromkeys(label["tag"] for label in record["labels"]) for record in pad}

    def tagged(record: Record) -> Record:
        *before, caption = record["conversations"]
        text = f"{caption['value']} Objects: {', '.join(tags[record['image']])}."
        return record | {"conversations": [*before, caption | {"value": text}]}

    return [tagged(record) for record in train]


def derange_names(seed: int, held_out_seed: int | None) -> dict[str, str]:
    """For each name of the simple set another of its category, number of tokens and block of held-out names.

    Each name replaces one name. The blocks are `HELD_OUT`, the names that `held_out_seed` adds, and all others.
    """
    rng = np.random.default_rng(seed)
    held_out = held_out_names(held_out_seed)
    everything = frozenset(sprite.name for sprite in load_sprites(simple_only=True))
    mapping: dict[str, str] = {}
    for block in (HELD_OUT, held_out - HELD_OUT, everything - held_out):
        for names in names_by_kind(block).values():
            unmoved = order = np.arange(len(names))
            while (order == unmoved).any():  # of two names every second permutation moves both, of many one in e
                order = rng.permutation(len(names))
            mapping |= {name: names[i] for name, i in zip(names, order, strict=True)}
    return mapping


def with_names(pad: Sequence[Record], mapping: dict[str, str]) -> list[Record]:
    """PAD records whose objects have the names that `mapping` gives them; captions and backgrounds stay."""
    return [_with_objects(record, lambda label: label | {"tag": mapping[label["tag"]]}) for record in pad]


def with_union_masks(pad: Sequence[Record]) -> list[Record]:
    """PAD records whose objects all lie on the union of their masks; backgrounds stay."""

    def on_union(record: Record) -> Record:
        size = record["size"][::-1]
        masks = [
            {"size": size, "counts": label["rle_mask"].encode("ascii")}
            for label in record["labels"]
            if label["kind"] == "object"
        ]
        union = coco_mask.merge(masks)
        x, y, width, height = coco_mask.toBbox(union).tolist()
        place = {"bbox": [x, y, x + width, y + height], "rle_mask": union["counts"].decode("ascii")}
        return _with_objects(record, lambda label: label | place)

    return [on_union(record) for record in pad]


def _with_objects(record: Record, change: Callable[[Record], Record]) -> Record:
    labels = [change(label) if label["kind"] == "object" else label for label in record["labels"]]
    return record | {"labels": labels}


def write_arm(data: Path, arm: str, out: Path, seed: int = 0) -> None:
    """Writes the training files of one of `ARMS` to `out`. Names can be deranged in the simple style alone."""
    settings = DatasetSettings(**json.loads((data / SUMMARY).read_text(encoding="utf-8"))["settings"])
    train, pad = (json.loads((data / JSON_FILES[key]).read_text(encoding="utf-8")) for key in ("train", "pad"))
    written: dict[str, Any] = {JSON_FILES["train"]: train, JSON_FILES["pad"]: pad}
    if arm == "tags":
        written[JSON_FILES["train"]] = with_tags(train, pad)
    elif arm == "union":
        written[JSON_FILES["pad"]] = with_union_masks(pad)
    elif settings.style != "simple":
        raise ValueError(f"{data}: found scenes of style {settings.style!r}, expected simple; next: make_scenes")
    else:
        written[NAMES] = derange_names(seed, settings.held_out_seed)
        written[JSON_FILES["pad"]] = with_names(pad, written[NAMES])
    out.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        with written_whole(out / name) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.arms", __doc__)
    parser.add_argument("data", type=Path, help="what make_scenes --out wrote")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the derangement (default: 0)")
    run_command(_write, parser, argv)


def _write(arguments: argparse.Namespace) -> None:
    write_arm(arguments.data, arguments.arm, arguments.out, arguments.seed)
    print(arguments.out)


if __name__ == "__main__":
    main()
