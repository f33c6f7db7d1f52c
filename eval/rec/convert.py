"""Make the Parquet files that the `rec_*` tasks read, one row per expression.

From the published archives, unpacked into one folder (refcoco, refcoco+ and refcocog, each with its references and
`instances.json`), or from any JSON list of {"image", "expression", "bbox", "width", "height"} with "bbox" as
[x1, y1, x2, y2] pixels and "image" below the data root.
"""

from __future__ import annotations

import argparse
import codecs
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat

from eval.benchmarks import BENCHMARKS
from eval.rec.boxes import Row, check_row, write_rows
from llava.command import command_parser, run_command
from patch_aligned.files import validated
from patch_aligned.images import image_path, upright_size_wh

DEFAULT_DATA_ROOT = Path("playground/data")
REFS = {
    "refcoco": ("refcoco", "refs(unc).p"),
    "refcoco_plus": ("refcoco+", "refs(unc).p"),
    "refcocog": ("refcocog", "refs(umd).p"),
}
"""Data set -> folder of its archive, and the references with the splits that papers report on."""
PUBLISHED_EXPRESSIONS = {name: entry.rows for name, entry in BENCHMARKS.items() if entry.group == "rec"}
"""Their sums agree with Ref-L4 (arXiv 2406.16866): 21,586, 21,373 and 14,498 for the three data sets."""
_COCO_2014 = "COCO_train2014_"

# The published form of RefCOCO: `refs(unc).p` or `refs(umd).p` beside `instances.json`.


class _Sentence(BaseModel):
    sent_id: int
    sent: str  # in lower case and without punctuation, as the publishers cleaned it


class _Ref(BaseModel):
    image_id: int
    ann_id: int
    split: str  # `train`, `val`, `testA`, ...
    sentences: list[_Sentence]


class _Image(BaseModel):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(BaseModel):
    id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]  # x, y, width, height in pixels


class _Instances(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]


class ReferredObject(NamedTuple):
    """One object of one picture, with all expressions for it."""

    ref: _Ref
    image: _Image
    box_xyxy_px: tuple[float, float, float, float]


class _PlainUnpickler(pickle.Unpickler):
    """Refuses classes and functions, which may run any program. The published files have none."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which may run code; do not load this file")


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle (also of Python 2) of lists, dictionaries, numbers and text, and of nothing else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; unpack the published archive (refcoco.zip, ...) there")
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{path}: cannot be read as a pickle: {error}; download the file again") from error


def read_referred_objects(folder: Path, refs_name: str) -> Iterator[ReferredObject]:
    """Yield the objects of a folder with `instances.json` and references, in the order of the references."""
    refs_path, instances_path = folder / refs_name, folder / "instances.json"
    refs = validated(list[_Ref], load_plain_pickle(refs_path), refs_path)
    if not instances_path.is_file():
        raise FileNotFoundError(f"{instances_path}: no such file; it is in the same archive as the references")
    instances = validated(_Instances, instances_path.read_bytes(), instances_path)
    images = {image.id: image for image in instances.images}
    boxes_xywh = {annotation.id: annotation.bbox for annotation in instances.annotations}
    for index, ref in enumerate(refs):
        if ref.image_id not in images or ref.ann_id not in boxes_xywh:
            raise ValueError(
                f"{refs_path}, reference {index}: found image_id {ref.image_id} and ann_id {ref.ann_id}, expected some "
                f"of {instances_path}"
            )
        x, y, width, height = boxes_xywh[ref.ann_id]
        yield ReferredObject(ref, images[ref.image_id], (x, y, x + width, y + height))


def rows_of_objects(objects: Iterable[ReferredObject], images: Path, data_root: Path) -> list[Row]:
    """Return one row per expression for objects of one split. The pictures' headers are read to check their sizes.

    `images` is the folder of COCO's train2014 below the data root, or of train2017, which has the same pictures.
    """
    folder, root = _absolute(images), _absolute(data_root)
    if not folder.is_relative_to(root):
        raise ValueError(f"--images {images}: expected a folder below --data_root {data_root}; link it there")
    below_root = folder.relative_to(root)
    rows: list[Row] = []
    names: dict[str, str | None] = {}  # as published -> as found in the folder
    for ref, image, box_xyxy_px in objects:
        if image.file_name not in names:
            names[image.file_name] = _find_image(image, images)
        found = names[image.file_name]
        if found is None:
            continue
        for sentence in ref.sentences:
            row: Row = {
                "id": str(sentence.sent_id),
                "image": (below_root / found).as_posix(),
                "expression": sentence.sent,
                "box_xyxy_px": list(box_xyxy_px),
                "width": image.width,
                "height": image.height,
            }
            check_row(row, f"{image.file_name}, sentence {sentence.sent_id}")
            rows.append(row)
    missing = [name for name, found in names.items() if found is None]
    if missing:
        raise FileNotFoundError(
            f"--images {images}: {len(missing)} of {len(names)} pictures are missing, the first is {missing[0]}; "
            "download http://images.cocodataset.org/zips/train2014.zip, or name the folder of train2017"
        )
    return rows


def _absolute(path: Path) -> Path:
    """Without resolving links: a data root often contains links to the pictures."""
    return Path(os.path.normpath(Path.cwd() / path))


def _find_image(image: _Image, images: Path) -> str | None:
    for name in (image.file_name, image.file_name.removeprefix(_COCO_2014)):
        path = image_path(images, name)
        if path.is_file():
            _check_size(path, (image.width, image.height))
            return name
    return None


def _check_size(path: Path, size_wh: tuple[int, int]) -> None:
    with Image.open(path) as image:  # reads the header only
        width, height = upright_size_wh(image)
        if (width, height) != size_wh:
            raise ValueError(
                f"{path}: found {width} x {height} pixels, expected {size_wh[0]} x {size_wh[1]}; boxes "
                "are in pixels of the original picture"
            )


def convert_refs(archives: Path, images: Path, data_root: Path, output: Path) -> dict[str, int]:
    """Write `<output>/<data set>_<split>.parquet` for every data set in `archives`; return its number of rows."""
    present = {name: (archives / folder, refs) for name, (folder, refs) in REFS.items() if (archives / folder).is_dir()}
    if not present:
        folders = ", ".join(folder for folder, _ in REFS.values())
        raise FileNotFoundError(f"--refs {archives}: found none of the folders {folders}; unpack the archives there")
    counts = {}
    for name, (folder, refs) in present.items():
        objects = list(read_referred_objects(folder, refs))
        for full in PUBLISHED_EXPRESSIONS:
            data_set, _, split = full.rpartition("_")
            if data_set != name:
                continue
            chosen = [item for item in objects if item.ref.split == split]
            if not chosen:
                found = sorted({item.ref.split for item in objects})
                raise ValueError(f"{folder / refs}: found the splits {found}, expected {split!r} among them")
            rows = rows_of_objects(chosen, images, data_root)
            write_rows(rows, output / f"{full}.parquet")
            counts[full] = len(rows)
    return counts


class _Record(BaseModel):
    image: str
    expression: str
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]  # x1, y1, x2, y2 in pixels
    width: int
    height: int
    id: int | str | None = None


def rows_of_json(path: Path, data_root: Path) -> list[Row]:
    """Return the rows of a JSON list."""
    records = validated(list[_Record], path.read_bytes().removeprefix(codecs.BOM_UTF8), path)
    if not records:
        raise ValueError(f"{path}: expected a list of records")
    rows = [_row_of_record(record, index, path) for index, record in enumerate(records)]
    for row in {row["image"]: row for row in rows}.values():
        image = image_path(data_root, row["image"])
        if not image.is_file():
            raise FileNotFoundError(f"{path}, record {row['id']}, field image: there is no {image}")
        _check_size(image, (row["width"], row["height"]))
    return rows


def _row_of_record(record: _Record, index: int, path: Path) -> Row:
    where = f"{path}, record {index}"
    x1, y1, x2, y2 = record.bbox
    if x2 <= 1 and y2 <= 1:
        raise ValueError(f"{where}, field bbox: found {record.bbox}, probably shares of the picture, expected pixels")
    width, height = record.width, record.height
    if not (x1 >= -1 and y1 >= -1 and x2 <= width + 1 and y2 <= height + 1):  # drawn boxes may end between pixels
        raise ValueError(f"{where}, field bbox: found {record.bbox}, which leaves its {width} x {height} picture")
    row: Row = {
        "id": str(index if record.id is None else record.id),
        "image": record.image,
        "expression": record.expression,
        "box_xyxy_px": record.bbox,
        "width": width,
        "height": height,
    }
    check_row(row, where)
    return row


def argument_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command_parser("eval.rec.convert", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--refs", type=Path, help="folder with refcoco, refcoco+ and refcocog, or some of them")
    source.add_argument("--json", type=Path, help="a JSON list instead; give its --name too")
    parser.add_argument("--name", help="of the file that --json makes, such as refcoco_val_cleaned")
    parser.add_argument(
        "--images", type=Path, default=DEFAULT_DATA_ROOT / "coco" / "train2014",
        help="COCO's train2014 or train2017, below --data_root (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--data_root", type=Path, default=DEFAULT_DATA_ROOT, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_DATA_ROOT / "eval" / "rec", help="output folder (default: %(default)s)"
    )
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """The command."""
    if arguments.json is not None:
        rows = rows_of_json(arguments.json, arguments.data_root)
        write_rows(rows, arguments.output / f"{arguments.name}.parquet")
        counts = {arguments.name: len(rows)}
    else:
        counts = convert_refs(arguments.refs, arguments.images, arguments.data_root, arguments.output)
    for name, count in counts.items():
        published = PUBLISHED_EXPRESSIONS.get(name, count)
        verdict = "" if count == published else f", but {published} are published: is the archive complete?"
        print(f"{arguments.output / name}.parquet: {count} expressions{verdict}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    if (arguments.json is None) != (arguments.name is None):
        parser.error("--json and --name go together")
    if arguments.name is not None and (not arguments.name or Path(arguments.name).name != arguments.name):
        parser.error(f"--name: found {arguments.name!r}, expected a file's name without a folder")
    run_command(convert, parser, argv)


if __name__ == "__main__":
    main()
