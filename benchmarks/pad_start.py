"""How soon training starts on a PAD file of LLaVA's pretraining set's size, and what a data worker's memory is.

    python benchmarks/pad_start.py                      558K images, 2.3M regions, 1.7 GB of JSON in --dir
    python benchmarks/pad_start.py --images 5580        a hundredth of it

The file is synthetic and holds a few thousand different masks. Prints the cost of the one-time conversion, the time of
a later start from launching Python to the first batch of annotations (without decoding images or loading a model), and
the private memory (USS) of each worker after `--batches` random batches. File pages that several workers map count for
none of them; with `--workers 1` they are all that worker's.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import command_line
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

SIZE_WH = (448, 336)
REGIONS_PER_IMAGE = 2_300_000 / 558_128
MASKS = 4000
TAGS = 33_500
SAMPLES_PER_BATCH = 32


def random_rle_mask(rng: random.Random) -> str:
    """A ragged blob like a segmenter's: a polygon of many corners, 200 to 500 characters."""
    width, height = SIZE_WH
    x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(40, 150)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    corners = [
        (x + radius * rng.uniform(0.7, 1.2) * np.cos(a), y + radius * rng.uniform(0.7, 1.2) * np.sin(a)) for a in angles
    ]
    canvas = Image.new("L", SIZE_WH)
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    return coco_mask.encode(np.asfortranarray(np.asarray(canvas)))["counts"].decode()


def write_pad_file(path: Path, images: int) -> None:
    """Writes the synthetic file, unless it is there."""
    if path.exists():
        return
    rng = random.Random(0)
    masks = [json.dumps(random_rle_mask(rng)) for _ in range(MASKS)]
    box = "[10.123456789, 20.5, 300.25, 200.0625]"
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for number in range(images):
            count = int((number + 1) * REGIONS_PER_IMAGE) - int(number * REGIONS_PER_IMAGE)
            labels = ", ".join(
                f'{{"tag": "thing {rng.randrange(TAGS)}", "bbox": {box}, "rle_mask": {rng.choice(masks)}}}'
                for _ in range(count)
            )
            file.write("[\n" if number == 0 else ",\n")
            file.write(
                f'{{"image_id": "{number // 1000:05d}/{number:09d}.jpg", "size": {list(SIZE_WH)}, '
                f'"caption": "a photograph of thing {number} on a sunny day in utah.", "labels": [{labels}]}}'
            )
        file.write("\n]\n")
    partial.replace(path)


class WordTokenizer:
    """One id a word: all that the plugin asks of a tokenizer."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Ids of the words of `text`."""
        return {"input_ids": [sum(word.encode()) for word in text.split()]}


class AnnotatedSamples:
    """What the plugin adds to each sample, by training record; a map-style data set."""

    def __init__(self, records: Any, plugin: Any) -> None:
        self.records, self.plugin = records, plugin

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        from llava.plugin import ImageView

        view = ImageView(SIZE_WH, "crop", 336, 336, 336, (24, 24))
        return self.plugin.transform_sample(self.records[row], view)


class CollateWithMemory:
    """The plugin's collation, with the worker's memory beside it."""

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def __call__(self, extras: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
        """A batch, and the worker's private and anonymous bytes."""
        return self.plugin.collate(extras), private_memory()


def private_memory() -> dict[str, int]:
    """Bytes of this process that no other shares (USS), and those of them that are not file pages."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name.rstrip(":")] = 1024 * int(value)
    return {"uss": fields["Private_Clean"] + fields["Private_Dirty"], "dirty": fields["Private_Dirty"]}


def start(path: Path, cache: Path, workers: int, batches: int) -> None:
    """One start of training's data side, as `train` does it; prints figures as JSON."""
    from torch.utils.data import DataLoader

    from llava.data.records import open_records
    from patch_aligned.train.arguments import PatchArguments
    from patch_aligned.train.plugin import PatchAlignedPlugin

    imported = time.time()
    plugin = PatchAlignedPlugin()
    plugin.setup(PatchArguments(patch_cache_dir=str(cache)), WordTokenizer(), data_path=str(path))
    annotations = time.time()
    records = open_records(path, cache)
    opened = time.time()
    samples: Any = AnnotatedSamples(records, plugin)
    loader = DataLoader(
        samples, batch_size=SAMPLES_PER_BATCH, shuffle=True, num_workers=workers, collate_fn=CollateWithMemory(plugin)
    )
    uss, dirty, first, began = 0, 0, 0.0, time.time()
    for number, (_, memory) in enumerate(loader):
        first = first or time.time()
        uss, dirty = max(uss, memory["uss"]), max(dirty, memory["dirty"])
        if number + 1 >= batches:
            break
    print(
        json.dumps(
            {
                "annotations": annotations - imported,
                "records": opened - annotations,
                "first_batch_at": first,
                "samples_per_second": batches * SAMPLES_PER_BATCH / (time.time() - began),
                "uss": uss,
                "dirty": dirty,
            }
        )
    )


def launch(arguments: argparse.Namespace, path: Path) -> dict[str, float]:
    """Runs `start` in a fresh interpreter; adds the time from the launch to the first batch."""
    launched = time.time()
    command = [sys.executable, __file__, "--start", "--dir", str(arguments.dir), "--images", str(arguments.images)]
    command += ["--workers", str(arguments.workers), "--batches", str(arguments.batches)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    return {**figures, "to_first_batch": figures["first_batch_at"] - launched}


def main() -> None:
    """Writes the file, starts twice, prints."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=558_128)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "pad_start")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.dir / f"pad_{arguments.images}.json"
    if arguments.start:
        start(path, arguments.dir / "cache", arguments.workers, arguments.batches)
        return
    arguments.dir.mkdir(parents=True, exist_ok=True)
    write_pad_file(path, arguments.images)
    print(f"{arguments.images} images, {path.stat().st_size / 1e9:.2f} GB of JSON")
    first = launch(arguments, path)
    later = launch(arguments, path)
    print(f"one-time conversion: annotations {first['annotations']:.0f} s, training records {first['records']:.0f} s")
    print(f"later start: first batch {later['to_first_batch']:.1f} s after launching Python (goal: 10)")
    print(
        f"each of {arguments.workers} workers after {arguments.batches} batches of {SAMPLES_PER_BATCH}: "
        f"USS {later['uss'] / 1e9:.2f} GB (goal: 1), of which {later['dirty'] / 1e9:.2f} GB are no file pages"
    )
    print(f"annotations alone: {later['samples_per_second']:.0f} samples a second")


if __name__ == "__main__":
    main()
