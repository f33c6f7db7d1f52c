"""Makes the miniature's benchmarks: questions about held-out scenes, one kind a Parquet file, with the pictures inside.

The questions are those of stage 2, in its words, about the first scenes of the held-out streams: those that
`make_scenes --split heldout` makes from the same seed are among them. Which are taken is another matter: answers are
balanced, so that no constant answer scores well.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.command import command_parser
from patch_aligned.files import written_whole
from playground.mini.scene_records import JPEG_QUALITY, DatasetSettings, compose, scene_records
from playground.mini.scenes import STYLES

logger = logging.getLogger(__name__)

OUT = Path(__file__).parents[1] / "data" / "mini" / "eval"
"""Where the tasks under `eval/lmms_tasks/mini` look."""
SUMMARY = "dataset.json"
VERSION = 2
SPLIT = "heldout"
REFERRING = "rec"
# Square, 4:3, 3:4 and 16:9: on the last three, a box read in the wrong frame is another box.
REFERRING_SIZES_WH = ((224, 224), (320, 240), (240, 320), (384, 216))

Row = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """Which questions make a benchmark."""

    name: str  # of the benchmark and its file
    category: str  # of the questions, as `playground.mini.questions` calls it
    style: str  # of the scenes
    rows: int  # number of questions
    per_answer: int  # at most so many have the same answer


SELECTIONS = (
    Selection("existence", "existence", "simple", rows=80, per_answer=40),
    Selection("colour", "colour", "simple", rows=64, per_answer=8),
    Selection("position", "position", "simple", rows=60, per_answer=20),
    Selection("counting", "count", "simple", rows=48, per_answer=12),
)
REFERRING_ROWS = 80


def make_evaluation_set(
    out: Path = OUT,
    *,
    seed: int = 0,
    selections: Sequence[Selection] = SELECTIONS,
    referring_rows: int = REFERRING_ROWS,
) -> dict[str, Any]:
    """Writes `<out>/<name>.parquet` for each selection and `<out>/rec.parquet`, and returns the summary.

    All files have the columns `id`, `scene` (rows of the same picture share it), `image` (JPEG), `width` and `height`
    (pixels) and `question`; the selections have `answer`, and `rec` has `expression` and `box_xyxy_px`.

    A finished set of the same settings is left as it is. Each file appears whole, the summary last.
    """
    settings = {
        "version": VERSION,
        "seed": seed,
        "selections": [asdict(selection) for selection in selections],
        "referring_rows": referring_rows,
        "referring_sizes_wh": [list(size) for size in REFERRING_SIZES_WH],
    }
    finished = _finished_summary(out, settings)
    if finished is not None:
        return finished
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY).unlink(missing_ok=True)
    counts = {}
    for style in STYLES:
        for name, rows in select_questions(seed, style, selections).items():
            _write_parquet(out / f"{name}.parquet", rows)
            counts[name] = len(rows)
    _write_parquet(out / f"{REFERRING}.parquet", select_referring(seed, referring_rows))
    counts[REFERRING] = referring_rows
    summary = {"settings": settings, "counts": counts}
    with written_whole(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _finished_summary(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(summary, dict) or summary.get("settings") != settings:
        return None
    return summary if all((out / f"{name}.parquet").is_file() for name in summary["counts"]) else None


def select_questions(seed: int, style: str, selections: Sequence[Selection]) -> dict[str, list[Row]]:
    """Rows of all selections of one style, each filled from the held-out stream's first scenes on."""
    found: dict[str, list[Row]] = {selection.name: [] for selection in selections if selection.style == style}
    taken: Counter[tuple[str, str]] = Counter()
    open_selections = [selection for selection in selections if selection.style == style]
    for index in itertools.count():
        if not open_selections:
            break
        records, picture = _scene(seed, style, index)
        for selection in open_selections:
            for question, answer in zip(records["questions"], records["answers"], strict=True):
                key = (selection.name, answer["answer"])
                full = len(found[selection.name]) == selection.rows or taken[key] == selection.per_answer
                if question["category"] == selection.category and not full:
                    taken[key] += 1
                    row = {"id": question["question_id"], **picture, "question": question["text"]}
                    found[selection.name].append({**row, "answer": answer["answer"]})
        open_selections = [wanted for wanted in open_selections if len(found[wanted.name]) < wanted.rows]
    return found


def select_referring(seed: int, count: int) -> list[Row]:
    """Rows of `rec`: all expressions of the held-out stream's first scenes, on canvases of several shapes in turn."""
    return list(itertools.islice(_referring(seed), count))


def _referring(seed: int) -> Iterator[Row]:
    for index in itertools.count():
        size_wh = REFERRING_SIZES_WH[index % len(REFERRING_SIZES_WH)]
        records, picture = _scene(seed, "simple", index, size_wh)
        shape = f"{size_wh[0]}x{size_wh[1]}"
        for record in records["referring"]:
            yield {
                "id": f"{record['id']}-{shape}",
                **picture,
                "scene": f"{picture['scene']}-{shape}",
                "question": record["question"],
                "expression": record["expression"],
                "box_xyxy_px": record["bbox_xyxy_px"],
            }


def _scene(
    seed: int, style: str, index: int, size_wh: tuple[int, int] | None = None
) -> tuple[dict[str, list[dict[str, Any]]], Row]:
    """All records of a held-out scene, and the columns that its rows share."""
    settings = DatasetSettings(count=index + 1, seed=seed, split=SPLIT, style=style, size_wh=size_wh)
    scene, rng = compose(settings, index)
    jpeg = io.BytesIO()
    Image.fromarray(scene.picture).save(jpeg, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    records = scene_records(settings, scene, rng, path="")
    width, height = scene.size_wh
    image = {"bytes": jpeg.getvalue(), "path": None}
    return records, {"scene": records["train"][0]["id"], "image": image, "width": width, "height": height}


def _write_parquet(path: Path, rows: list[Row]) -> None:
    """Writes rows as the hub's data sets are: the column `image` is marked as one of pictures."""
    import datasets
    from pyarrow import Table, parquet

    strings = ("id", "scene", "question", "expression", "answer")
    features = {name: datasets.Value("string") for name in strings if name in rows[0]}
    features |= {"image": datasets.Image(), "width": datasets.Value("int32"), "height": datasets.Value("int32")}
    if "box_xyxy_px" in rows[0]:
        features["box_xyxy_px"] = datasets.List(datasets.Value("float64"))
    with written_whole(path) as temporary:
        parquet.write_table(Table.from_pylist(rows, schema=datasets.Features(features).arrow_schema), temporary)


_HELP = f"""
files written to OUT: {", ".join(f"{item.name}.parquet ({item.rows} rows)" for item in SELECTIONS)},
rec.parquet ({REFERRING_ROWS} rows) and dataset.json, the settings and counts. The tasks under eval/lmms_tasks/mini
look in the default folder.

Scores of chance, of constant answers and of questions alone: python -m eval.mini.baselines
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.evaluation_set", __doc__)
    parser.epilog = _HELP
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: playground/data/mini/eval)")
    parser.add_argument("--seed", type=int, default=0, help="of the random streams (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: expected a number from 0")
    summary = make_evaluation_set(arguments.out, seed=arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{count} {name}" for name, count in summary["counts"].items()))


if __name__ == "__main__":
    main()
