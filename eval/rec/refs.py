"""Reads the published form of RefCOCO: `refs(unc).p` or `refs(umd).p` beside `instances.json`.

The `.p` files are pickles, and a pickle from elsewhere may run any program when it is loaded. Theirs hold lists,
dictionaries, numbers and text alone, so that nothing is lost by refusing every class and function.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


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
        document = json.loads(path.read_text(encoding="utf-8"))
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
