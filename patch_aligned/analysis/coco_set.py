"""COCO's instances (`instances_val2017.json`): category names are the labels.

Crowds (`iscrowd`) outline a group under the name of one of its members, often loosely: they are left out and counted,
as in COCO's own scores.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from patch_aligned.analysis.coco_masks import box_of, one_rle, required

Record = Callable[[], dict[str, Any]]
"""Makes a PAD record when it is called: masks are encoded only when their image's turn has come."""

TABLES = ("images", "annotations", "categories")


def read_coco(document: Any, path: Path) -> tuple[list[Record], dict[str, int]]:
    """The images of a file of instances, in order, as PAD records; and how many annotations were left out, by reason.

    Args:
        document: what the file holds.
        path: the file, for messages.

    Raises:
        ValueError: a table or a field is missing, or an annotation names an image or a category that there is not.
    """
    tables = _tables(document, path, TABLES)
    categories = {required(category, "id", f"{path}: a category"): category for category in tables["categories"]}
    names = {key: required(category, "name", f"{path}: category {key}") for key, category in categories.items()}
    images = {required(image, "id", f"{path}: an image"): image for image in tables["images"]}
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for annotation in tables["annotations"]:
        for key, known in (("image_id", images), ("category_id", names)):
            if annotation.get(key) not in known:
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')}, field '{key}': found {annotation.get(key)!r}, "
                    f"expected one of the {len(known)} ids that the file lists. Is this a file of instances?"
                )
        if annotation.get("iscrowd"):
            skipped["crowd"] += 1
        elif not annotation.get("segmentation"):
            skipped["no mask"] += 1
        else:
            of_image[annotation["image_id"]].append(annotation)
    return [partial(_record, image, of_image[key], names, path) for key, image in images.items()], dict(skipped)


def _record(
    image: Mapping[str, Any], annotations: list[dict[str, Any]], names: Mapping[Any, str], path: Path
) -> dict[str, Any]:
    file_name, width, height = (
        required(image, key, f"{path}: image {image['id']}") for key in ("file_name", "width", "height")
    )
    size = (width, height)
    labels = []
    for annotation in annotations:
        place = f"{path}: annotation {annotation.get('id')} of {file_name}, field 'segmentation'"
        rle_mask = one_rle(annotation["segmentation"], size, place)
        labels.append({"tag": names[annotation["category_id"]], "bbox": box_of(rle_mask, size), "rle_mask": rle_mask})
    return {"image_id": file_name, "size": list(size), "caption": "", "labels": labels}


def _tables(document: Any, path: Path, expected: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    if not isinstance(document, Mapping) or not all(isinstance(document.get(name), list) for name in expected):
        found = ", ".join(map(str, document)) if isinstance(document, Mapping) else f"a {type(document).__name__}"
        raise ValueError(
            f"{path}: found {found[:80] or 'nothing'}; expected a file of COCO instances with the lists "
            f"{', '.join(expected)}, such as instances_val2017.json."
        )
    return {name: document[name] for name in expected}
