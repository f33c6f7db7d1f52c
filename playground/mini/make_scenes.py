"""Makes a data set of synthetic scenes: pictures, LLaVA's training files, PAD, questions and referring expressions."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.command import command_parser, run_command
from patch_aligned.files import written_whole
from playground.mini.scene_records import DatasetSettings, write_scene
from playground.mini.scenes import SPLITS, STYLES

logger = logging.getLogger(__name__)

JSON_FILES = {key: f"{key}.json" for key in ("train", "pad", "instruct", "referring", "choices", "choices_instruct")}
JSONL_FILES = {"questions": "questions.jsonl", "answers": "answers.jsonl"}
SUMMARY = "dataset.json"
PARTS = ".parts"
SCENES_PER_PART = 50


def make_dataset(settings: DatasetSettings, out: Path, *, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Writes the data set to `out` and returns its summary.

    Scenes are made in parts of `SCENES_PER_PART`; an interrupted run resumes after its last complete part. The data
    files appear only when all parts are there. A finished data set of the same settings is left as it is.

    Raises:
        ValueError: `out` holds a data set of other settings, or other files in its place.
    """
    if settings.count < 1 or settings.seed < 0 or (settings.held_out_seed or 0) < 0:
        raise ValueError(
            f"count {settings.count}, seed {settings.seed}, held-out seed {settings.held_out_seed}: expected a count "
            "from 1 and seeds from 0."
        )
    finished = _finished_summary(settings, out)
    if finished is not None:
        return finished
    parts = out / PARTS
    _open_parts(settings, out, parts)

    start = time.monotonic()
    missing = [first for first in range(0, settings.count, SCENES_PER_PART) if not _part_path(parts, first).exists()]
    jobs = [(settings, first, out) for first in missing]
    made_now = sum(min(SCENES_PER_PART, settings.count - first) for first in missing)
    with tqdm(total=settings.count, unit="scene", disable=not progress) as bar, _mapper(workers) as mapper:
        bar.update(settings.count - made_now)
        for made in mapper(_make_part, jobs):
            bar.update(made)
    seconds = time.monotonic() - start

    counts = _join_parts(parts, settings, out)
    summary = {"settings": settings.to_json(), "counts": counts}
    _write(out / SUMMARY, [json.dumps(summary, indent=2)])
    shutil.rmtree(parts)
    if made_now:
        rate = made_now / seconds
        logger.info("%d scenes in %.1f s: %.0f scenes/s with %d worker(s)", made_now, seconds, rate, workers)
    return summary


def _finished_summary(settings: DatasetSettings, out: Path) -> dict[str, Any] | None:
    path = out / SUMMARY
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("settings") != settings.to_json():
        raise ValueError(
            f"{out} holds another data set: {summary.get('settings')}, asked for is {settings.to_json()}. "
            "Choose another --out, or delete that folder."
        )
    absent = [name for name in (*JSON_FILES.values(), *JSONL_FILES.values()) if not (out / name).is_file()]
    if absent:
        raise ValueError(
            f"{path} says that the data set is complete, but {', '.join(absent)} is missing. Delete {out}."
        )
    return summary


def _open_parts(settings: DatasetSettings, out: Path, parts: Path) -> None:
    """Prepares the folder of parts, or checks that the one an interrupted run left was made with the same settings."""
    marker = parts / "settings.json"
    if marker.is_file():
        begun = json.loads(marker.read_text(encoding="utf-8"))
        if begun != settings.to_json():
            raise ValueError(
                f"{out} holds the beginnings of another data set: {begun}, asked for is {settings.to_json()}. "
                "Choose another --out, or delete that folder."
            )
        return
    foreign = [name for name in ("images", *JSON_FILES.values(), *JSONL_FILES.values()) if (out / name).exists()]
    if foreign:
        raise ValueError(f"{out} already holds {', '.join(foreign)} of unknown origin. Choose another --out.")
    parts.mkdir(parents=True, exist_ok=True)
    _write(marker, [json.dumps(settings.to_json())])


def _part_path(parts: Path, first: int) -> Path:
    return parts / f"{first:08d}.jsonl"


def _make_part(job: tuple[DatasetSettings, int, Path]) -> int:
    """Makes the scenes of one part and returns their number. Runs in worker processes."""
    settings, first, out = job
    indices = range(first, min(first + SCENES_PER_PART, settings.count))
    lines = [json.dumps(write_scene(settings, index, out)) for index in indices]
    _write(_part_path(out / PARTS, first), lines)
    return len(indices)


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """`map`, in this process or over several."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map


def _join_parts(parts: Path, settings: DatasetSettings, out: Path) -> dict[str, int]:
    """Writes the data files from all parts, a record a line, and returns the number of records in each."""
    lines: dict[str, list[str]] = {key: [] for key in (*JSON_FILES, *JSONL_FILES)}
    for first in range(0, settings.count, SCENES_PER_PART):
        for scene in map(json.loads, _part_path(parts, first).read_text(encoding="utf-8").splitlines()):
            for key, records in scene.items():
                lines[key] += map(json.dumps, records)
    for key, name in JSONL_FILES.items():
        _write(out / name, lines[key])
    for key, name in JSON_FILES.items():
        _write(out / name, ["[", *(f"{line}," for line in lines[key][:-1]), *lines[key][-1:], "]"])
    return {key: len(records) for key, records in lines.items()}


def _write(path: Path, lines: Iterable[str]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _size_wh(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, as 224x224") from None
    if min(width, height) < 64:
        raise argparse.ArgumentTypeError(f"{text!r}: sprites need at least 64 pixels on each side")
    return width, height


_HELP = """
files written to OUT:
  images/          JPEG pictures
  train.json       stage 1: LLaVA's format, one caption a scene
  pad.json         Patch-Aligned Dataset: the caption and every region with label, box and mask
  instruct.json    stage 2: conversations about scenes, and a few without a picture
  choices.json     questions with a few given answers, to score by likelihood; choices_instruct.json has them as
                   conversations of one round
  questions.jsonl  questions to a trained model; answers.jsonl holds the truth
  referring.json   referring expressions with their boxes
  dataset.json     the settings and counts

Scene i depends on seed, split and style alone: --count 100 is the beginning of --count 1000. The splits train and
heldout draw from different streams, so they share no scene even with the same seed. Ten names stand in labels and, with
--split heldout, in choices.json, but in no other text; --held-out-seed draws another ten.

examples:
  python -m playground.mini.make_scenes --count 400 --out playground/data/mini/train
  python -m playground.mini.make_scenes --count 50 --split heldout --out playground/data/mini/heldout
  python -m playground.mini.make_scenes --count 5000 --style full --workers 4 --out playground/data/mini/full
  python -m playground.mini.show_scenes playground/data/mini/full
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.make_scenes", __doc__)
    parser.epilog = _HELP
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the random streams (default: 0)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which stream to draw from (default: train)")
    parser.add_argument(
        "--style", choices=STYLES, default="simple",
        help="simple: two to four things of the smaller set on one surface, none hidden; full: more things out of all "
        "names, partly hidden, on several surfaces (default: simple)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=_size_wh, dest="size_wh", metavar="WxH", help="size of all pictures (default: the style's own)"
    )
    parser.add_argument(
        "--held-out-seed", type=int, metavar="N", help="hold ten more names out of texts (default: only the fixed ten)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    run_command(_make, parser, argv)


def _make(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    out, workers = given.pop("out"), max(1, given.pop("workers"))
    summary = make_dataset(DatasetSettings(**given), out, workers=workers)
    print(f"{out}: " + ", ".join(f"{count} {key}" for key, count in summary["counts"].items()))


if __name__ == "__main__":
    main()
