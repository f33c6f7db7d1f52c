"""Makes the Parquet files that the `rec_*` tasks read, one row an expression.

From the published archives, unpacked into one folder (refcoco, refcoco+ and refcocog, each with its references and
`instances.json`), or from any JSON list of {"image", "expression", "bbox", "width", "height"} with "bbox" as
[x1, y1, x2, y2] pixels and "image" below the data root.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from PIL import Image

from eval.benchmarks import BENCHMARKS
from eval.rec.boxes import Row, check_row, image_path, write_rows
from patch_aligned.images import upright_size_wh

# Reads the published form of RefCOCO: `refs(unc).p` or `refs(umd).p` beside `instances.json`.
#
# The `.p` files are pickles, and a pickle from elsewhere may run any program when it is loaded. Theirs hold lists,
# dictionaries, numbers and text alone, so that nothing is lost by refusing every class and function.


class RefsError(ValueError):
    """A file of references that is missing, broken, or asks for code."""


class ReferredObject(NamedTuple):
    """One object of one picture with all expressions for it.

    Attributes:
        split: `train`, `val`, `testA`, ...
        file_name: of the picture, as `instances.json` has it.
        size_wh: of the picture, pixels.
        box_xyxy_px: of the object.
        expressions: identifier -> words, in lower case and without punctuation as the publishers cleaned them.
    """

    split: str
    file_name: str
    size_wh: tuple[int, int]
    box_xyxy_px: tuple[float, float, float, float]
    expressions: dict[str, str]


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers and text, and nothing that needs a name looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise RefsError(f"asks for {module}.{name}, which may run code and no list of references needs; do not load it")


def load_plain_pickle(path: Path) -> Any:
    """Loads a pickle (of Python 2 too) of plain containers, numbers and text.

    Raises:
        RefsError: the file is missing, is no pickle, or asks for a class or a function.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise RefsError(f"{path}: no such file; unpack the published archive (refcoco.zip, ...) there") from None
    except RefsError as error:
        raise RefsError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle may raise anything
        raise RefsError(f"{path}: cannot be read as a pickle ({error!r}); fetch the file anew") from error


def read_referred_objects(folder: Path, refs_name: str) -> Iterator[ReferredObject]:
    """The objects in the order of the file.

    Args:
        folder: holds `instances.json` and the references.
        refs_name: `refs(unc).p` or `refs(umd).p`.

    Raises:
        RefsError: a file is missing or broken, or a reference names what `instances.json` lacks.
    """
    refs_path, instances_path = folder / refs_name, folder / "instances.json"
    refs = load_plain_pickle(refs_path)
    if not isinstance(refs, list):
        raise RefsError(f"{refs_path}: found {type(refs).__name__}, expected a list of references")
    images, boxes_xywh = _read_instances(instances_path)
    for index, ref in enumerate(refs):
        try:
            file_name, size_wh = images[ref["image_id"]]
            x, y, width, height = boxes_xywh[ref["ann_id"]]
            sentences = {str(sentence["sent_id"]): str(sentence["sent"]) for sentence in ref["sentences"]}
            split = str(ref["split"])
        except (KeyError, TypeError, ValueError) as error:
            raise RefsError(
                f"{refs_path}, reference {index}: {error!r}; expected image_id and ann_id of {instances_path}, split, "
                "and sentences with sent_id and sent"
            ) from error
        yield ReferredObject(split, file_name, size_wh, (x, y, x + width, y + height), sentences)


def _read_instances(path: Path) -> tuple[dict[int, tuple[str, tuple[int, int]]], dict[int, list[float]]]:
    """File name and size by image id, and box (x, y, width, height) by annotation id."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        images = {
            image["id"]: (str(image["file_name"]), (int(image["width"]), int(image["height"])))
            for image in document["images"]
        }
        boxes = {annotation["id"]: [float(v) for v in annotation["bbox"]] for annotation in document["annotations"]}
    except FileNotFoundError:
        raise RefsError(f"{path}: no such file; it comes in the same archive as the references") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RefsError(
            f"{path}: {error!r}; expected COCO's images (id, file_name, width, height) and annotations (id, bbox)"
        ) from error
    return images, boxes


DEFAULT_DATA_ROOT = Path("playground/data")
REFS = {
    "refcoco": ("refcoco", "refs(unc).p"),
    "refcoco_plus": ("refcoco+", "refs(unc).p"),
    "refcocog": ("refcocog", "refs(umd).p"),
}
"""Name of a data set -> folder of its archive, and which split of it: those that papers report on."""
PUBLISHED_EXPRESSIONS = {name: entry.rows for name, entry in BENCHMARKS.items() if entry.group == "rec"}
"""Their sums agree with Ref-L4 (arXiv 2406.16866): 21,586, 21,373 and 14,498 for the three data sets."""
_COCO_2014 = "COCO_train2014_"
_FIELDS = {"image": str, "expression": str, "width": int, "height": int}  # of a JSON record, beside its bbox


def rows_of_objects(objects: Iterable[ReferredObject], images: Path, data_root: Path) -> list[Row]:
    """One row for each expression; the pictures' headers are read to check their sizes.

    Args:
        objects: of one split.
        images: folder of COCO's train2014 below the data root, or train2017, which has the same pictures.
        data_root: from which the rows' paths count.

    Raises:
        ValueError: `images` is not below the data root, or a row cannot be scored.
        FileNotFoundError: pictures are missing.
    """
    folder, root = _absolute(images), _absolute(data_root)
    if not folder.is_relative_to(root):
        raise ValueError(f"--images {images}: expected a folder below --data_root {data_root}; link it there")
    below_root = folder.relative_to(root)
    rows: list[Row] = []
    names: dict[str, str | None] = {}  # as published -> as found in the folder
    for item in objects:
        if item.file_name not in names:
            names[item.file_name] = _find_image(item, images)
        found = names[item.file_name]
        if found is None:
            continue
        for identifier, expression in item.expressions.items():
            width, height = item.size_wh
            row: Row = {
                "id": identifier,
                "image": (below_root / found).as_posix(),
                "expression": expression,
                "box_xyxy_px": list(item.box_xyxy_px),
                "width": width,
                "height": height,
            }
            check_row(row, f"{item.file_name}, sentence {identifier}")
            rows.append(row)
    missing = [name for name, found in names.items() if found is None]
    if missing:
        raise FileNotFoundError(
            f"--images {images}: {len(missing)} of {len(names)} pictures are missing, the first is {missing[0]}; "
            "fetch http://images.cocodataset.org/zips/train2014.zip, or name the folder of train2017"
        )
    return rows


def _absolute(path: Path) -> Path:
    """Without following links: a data root often holds links to where the pictures are."""
    return Path(os.path.normpath(Path.cwd() / path))


def _find_image(item: ReferredObject, images: Path) -> str | None:
    for name in (item.file_name, item.file_name.removeprefix(_COCO_2014)):
        path = image_path(name, images)
        if path.is_file():
            _check_size(path, item.size_wh)
            return name
    return None


def _check_size(path: Path, size_wh: tuple[int, int]) -> None:
    with Image.open(path) as image:  # reads the header only
        width, height = upright_size_wh(image)
        if (width, height) != size_wh:
            raise ValueError(
                f"{path}: found {width} x {height} pixels, expected {size_wh[0]} x {size_wh[1]}; boxes "
                "count in pixels of the original picture"
            )


def convert_refs(archives: Path, images: Path, data_root: Path, output: Path) -> dict[str, int]:
    """Writes `<output>/<data set>_<split>.parquet` for every data set that lies in `archives`.

    Returns:
        Expressions of each file, in the order of `PUBLISHED_EXPRESSIONS`.

    Raises:
        ValueError: a broken file, or rows that cannot be scored.
        FileNotFoundError: pictures are missing, or none of the data sets is there.
    """
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
            chosen = [item for item in objects if item.split == split]
            if not chosen:
                found = sorted({item.split for item in objects})
                raise ValueError(f"{folder / refs}: found the splits {found}, expected {split!r} among them")
            rows = rows_of_objects(chosen, images, data_root)
            write_rows(rows, output / f"{full}.parquet")
            counts[full] = len(rows)
    return counts


def rows_of_json(path: Path, data_root: Path) -> list[Row]:
    """Rows of a plain JSON list.

    Raises:
        ValueError: no such list, or a record that lacks a field or cannot be scored.
        FileNotFoundError: no such file, or a picture is missing.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a list of records")
    rows = [_row_of_record(record, index, path) for index, record in enumerate(records)]
    for row in {row["image"]: row for row in rows}.values():
        image = image_path(row["image"], data_root)
        if not image.is_file():
            raise FileNotFoundError(f"{path}, record {row['id']}, field image: there is no {image}")
        _check_size(image, (row["width"], row["height"]))
    return rows


def _row_of_record(record: Any, index: int, path: Path) -> Row:
    where = f"{path}, record {index}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {record!r}, expected an object with {', '.join(_FIELDS)} and bbox")
    for name, kind in _FIELDS.items():
        if type(record.get(name)) is not kind:
            expected = {str: "a text", int: "a whole number"}[kind]
            raise ValueError(f"{where}, field {name}: found {record.get(name)!r}, expected {expected}")
    box, width, height = record.get("bbox"), record["width"], record["height"]
    if not isinstance(box, list) or len(box) != 4 or any(type(value) not in (int, float) for value in box):
        raise ValueError(f"{where}, field bbox: found {box!r}, expected four numbers [x1, y1, x2, y2]")
    x1, y1, x2, y2 = box
    if x2 <= 1 and y2 <= 1:
        raise ValueError(f"{where}, field bbox: found {box}, shares of the picture it seems, expected pixels")
    if not (x1 >= -1 and y1 >= -1 and x2 <= width + 1 and y2 <= height + 1):  # drawn boxes may end between pixels
        raise ValueError(f"{where}, field bbox: found {box}, which leaves its {width} x {height} picture")
    row: Row = {
        "id": str(record.get("id", index)),
        "image": record["image"],
        "expression": record["expression"],
        "box_xyxy_px": [float(value) for value in box],
        "width": width,
        "height": height,
    }
    check_row(row, where)
    return row


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.rec.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--refs", type=Path, help="folder with refcoco, refcoco+ and refcocog, or some of them")
    source.add_argument("--json", type=Path, help="a JSON list instead; give its --name too")
    parser.add_argument("--name", help="of the file that --json makes, as refcoco_val_cleaned")
    parser.add_argument(
        "--images", type=Path, default=DEFAULT_DATA_ROOT / "coco" / "train2014",
        help="COCO's train2014 or train2017, below --data_root (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--data_root", type=Path, default=DEFAULT_DATA_ROOT, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_DATA_ROOT / "eval" / "rec",
        help="where the files go (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if (arguments.json is None) != (arguments.name is None):
        parser.error("--json and --name go together")
    if arguments.name is not None and (not arguments.name or Path(arguments.name).name != arguments.name):
        parser.error(f"--name: found {arguments.name!r}, expected a file's name without a folder")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parse_arguments(argv)
    try:
        if arguments.json is not None:
            rows = rows_of_json(arguments.json, arguments.data_root)
            write_rows(rows, arguments.output / f"{arguments.name}.parquet")
            counts = {arguments.name: len(rows)}
        else:
            counts = convert_refs(arguments.refs, arguments.images, arguments.data_root, arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, count in counts.items():
        published = PUBLISHED_EXPRESSIONS.get(name, count)
        verdict = "" if count == published else f", but {published} are published: is the archive complete?"
        print(f"{arguments.output / name}.parquet: {count} expressions{verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
