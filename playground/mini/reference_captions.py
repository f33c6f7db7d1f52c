"""Several captions of each scene of a data set, in different words, to judge a model's captions by.

    python -m playground.mini.reference_captions                      # playground/data/mini/heldout/captions.json
    python -m playground.mini.reference_captions --data DIR

The first caption of a scene is the one in its PAD record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava.command import command_parser, run_command
from patch_aligned.files import written_whole
from playground.mini.captions import write_caption
from playground.mini.make_scenes import JSON_FILES, SUMMARY
from playground.mini.scene_records import DatasetSettings, compose
from playground.mini.scenes import SPLITS, STYLES, Scene

ROOT = Path(__file__).parents[2]
HELDOUT = ROOT / "playground/data/mini/heldout"
FILE = "captions.json"
CAPTIONS = 5
"""As many as COCO has."""

_ATTEMPTS = 50
_STREAM = 1  # a scene's own stream has no fifth number; this one is apart from it


def reference_captions(scene: Scene, first: str, rng: np.random.Generator, count: int = CAPTIONS) -> list[str]:
    """`first` and further captions, all different; fewer than `count` where a scene has not as many wordings."""
    captions = [first]
    for _ in range(_ATTEMPTS):
        caption = write_caption(scene, rng)
        if len(captions) < count and caption not in captions:
            captions.append(caption)
    return captions


def caption_dataset(folder: Path, progress: bool = True) -> Path:
    """Writes `captions.json` of a data set that `make_scenes` made: records of `image` and `captions`."""
    summary, pad = folder / SUMMARY, folder / JSON_FILES["pad"]
    if not summary.is_file() or not pad.is_file():
        raise FileNotFoundError(f"{folder}: found no {summary.name} and {pad.name}; next: bash scripts/prepare_mini.sh")
    settings = DatasetSettings(**json.loads(summary.read_text(encoding="utf-8"))["settings"])
    records: list[dict[str, Any]] = []
    for index, record in enumerate(tqdm(json.loads(pad.read_text(encoding="utf-8")), disable=not progress)):
        scene, _ = compose(settings, index)
        stream = [SPLITS.index(settings.split), STYLES.index(settings.style), index, _STREAM]
        rng = np.random.default_rng([settings.seed, *stream])
        records.append({"image": record["image_id"], "captions": reference_captions(scene, record["caption"], rng)})
    with written_whole(folder / FILE) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return folder / FILE


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.reference_captions", __doc__)
    parser.add_argument("--data", type=Path, default=HELDOUT, help="folder of the data set; default: the held-out one")
    run_command(lambda arguments: print(caption_dataset(arguments.data)), parser, argv)


if __name__ == "__main__":
    main()
