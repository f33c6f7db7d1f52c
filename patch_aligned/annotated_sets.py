"""Annotated images of any format: PAD, COCO's instances, and GranD-f, with masks as compressed RLE strings.

Every mask passes the same checks. pycocotools checks nothing that it is given: of a far coordinate it takes memory
without bound, run lengths with a wrong total let it loop for ever or write beyond its memory. Annotations that a set
leaves out, such as COCO's crowds, are counted by reason.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools import mask as coco_mask

from patch_aligned.images import stored_size_wh
from patch_aligned.masks import rle_problems
from patch_aligned.pad import AnnotatedImage, parse_annotation, read_annotations
from patch_aligned.record_files import beginning_of, is_finite_number, is_side, iter_records, quoted, read_document

FORMATS = ("auto", "pad", "coco", "grandf")


@dataclass(frozen=True)
class AnnotatedSet:
    """Annotated images of a file; each iteration reads them from the start."""

    format: str  # one of `FORMATS`, not `auto`
    images: Callable[[], Iterator[AnnotatedImage]]  # starts an iteration
    skipped: Mapping[str, int] = field(default_factory=dict)  # what is no region in the whole file, by reason

    def __iter__(self) -> Iterator[AnnotatedImage]:
        return self.images()

    def choose(self, limit: int | None, subset: str = "first", seed: int = 0) -> list[AnnotatedImage]:
        """Read all images, the `first` ones, or a `random` subset, in the order of the file.

        A random subset depends on the images' ids and the seed alone: the same images in another order or format give
        the same subset.
        """
        if limit is None or subset == "first":
            return list(islice(self, limit))

        def rank(numbered: tuple[int, AnnotatedImage]) -> bytes:
            return hashlib.sha256(f"{seed}:{numbered[1].image_id}".encode()).digest()

        chosen = heapq.nsmallest(limit, enumerate(self), key=rank)
        return [image for _, image in sorted(chosen, key=itemgetter(0))]


def open_annotated_set(path: Path, image_folder: Path, format: str = "auto", crowds: bool = False) -> AnnotatedSet:
    """Open a set of any format. COCO and GranD-f files are loaded at once; PAD is streamed.

    Args:
        path: the file of annotations.
        image_folder: folder of the images; one kind of GranD-f file has no sizes, which are then read from the images.
        format: one of `FORMATS`; `auto` tells it by the first record.
        crowds: whether COCO's crowds are regions too, with the extra key `iscrowd`, or are left out.

    Raises:
        ValueError: the format is unknown or not the file's, or a record breaks it.
        FileNotFoundError: there is no such file.
    """
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; annotations may be {', '.join(FORMATS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of annotations.")
    if format == "pad" or (format == "auto" and not _is_one_document(path)):
        return AnnotatedSet("pad", lambda: read_annotations(path))
    document = read_document(path)
    if format == "auto":
        format = "grandf" if _is_grandf(document) else "coco"
    images, skipped = _read_coco(document, path, crowds) if format == "coco" else _read_grandf(document, path)
    return AnnotatedSet(format, lambda: (image.annotated(path, image_folder) for image in images), skipped)


def _is_one_document(path: Path) -> bool:
    """Whether a file is COCO's or GranD-f's, judged by its first record."""
    if not path.name.lower().endswith((".json", ".json.gz")):
        return False
    if beginning_of(path).startswith("{"):
        return True
    return _is_grandf([next(iter_records(path), None)])


class _Mask(NamedTuple):
    label: str
    segmentation: Any
    place: str  # names the annotation in messages
    extra: Mapping[str, Any] = {}


class _Image(NamedTuple):
    """An image of a file that is loaded at once; its masks are encoded when its turn comes."""

    name: str
    size_wh: tuple[int, int] | None  # None: read from the image file
    caption: str
    masks: list[_Mask]

    def annotated(self, path: Path, image_folder: Path) -> AnnotatedImage:
        size_wh = self.size_wh or stored_size_wh(image_folder, self.name)
        labels = []
        for mask in self.masks:
            rle_mask = union_rle(mask.segmentation, size_wh, f"{path}: {mask.place}")
            box = box_of_mask_xyxy_px(rle_mask, size_wh)
            labels.append({"tag": mask.label, "bbox": box, "rle_mask": rle_mask, **mask.extra})
        record = {"image_id": self.name, "size": size_wh, "caption": self.caption, "labels": labels}
        return parse_annotation(record, path)


def _read_coco(document: Any, path: Path, crowds: bool) -> tuple[list[_Image], dict[str, int]]:
    """Read instances (`instances_val2017.json`); category names are the labels.

    Crowds (`iscrowd`) outline a group under the name of one of its members, often loosely: they are left out, as in
    COCO's own scores, unless `crowds`.
    """
    tables = ("images", "annotations", "categories")
    if not isinstance(document, Mapping) or not all(isinstance(document.get(name), list) for name in tables):
        found = ", ".join(map(str, document)) if isinstance(document, Mapping) else f"a {type(document).__name__}"
        raise ValueError(
            f"{path}: found {found[:80] or 'nothing'}; expected a file of COCO instances with the lists "
            f"{', '.join(tables)}, such as instances_val2017.json."
        )
    categories = _by_unique(document["categories"], "id", f"{path}: a category")
    names = {key: _required(category, "name", f"{path}: category {key}", str) for key, category in categories.items()}
    images = _by_unique(document["images"], "id", f"{path}: an image")
    _by_unique(document["images"], "file_name", f"{path}: an image")
    annotations_of: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for annotation in document["annotations"]:
        for key, known in (("image_id", images), ("category_id", names)):
            if _required(annotation, key, f"{path}: an annotation") not in known:
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')}, field '{key}': found {annotation[key]!r}, "
                    f"expected one of the {len(known)} ids that the file lists. Is this a file of instances?"
                )
        if annotation.get("iscrowd") and not crowds:
            skipped["crowd"] += 1
        elif not has_mask(annotation.get("segmentation")):
            skipped["no mask"] += 1
        else:
            annotations_of[annotation["image_id"]].append(annotation)
    read = []
    for key, image in images.items():
        name, size_wh = _name_and_size(image, f"{path}: image {key}")
        masks = [
            _Mask(
                names[annotation["category_id"]],
                annotation["segmentation"],
                f"annotation {annotation.get('id')} of {name}, field 'segmentation'",
                {"iscrowd": 1} if annotation.get("iscrowd") else {},
            )
            for annotation in annotations_of[key]
        ]
        read.append(_Image(name, size_wh, "", masks))
    return read, dict(skipped)


def _read_grandf(document: Any, path: Path) -> tuple[list[_Image], dict[str, int]]:
    """Read a file of GranD-f, the fine-tuning set of GLaMM; phrases of a caption are the labels.

    Its files have three shapes:

    - human annotated and Open-PSG: `[{file_name, caption, groundings: {phrase: {token_positives, rle_masks}}}]`
    - RefCOCOg: `[{key: {img_file_name, caption, refs: [{sentence, segmentation}]}}]`, with polygons and without sizes
    - Flickr30k: tables as COCO's; an annotation has `tokens_positive` (places in the image's caption) and `sam_mask`

    All masks of a phrase are one region. Phrases without a mask are left out. Several captions of an image become one
    record.
    """
    if not _is_grandf(document):
        raise ValueError(
            f"{path}: found no file of GranD-f; expected records with 'groundings' or 'refs', or tables whose "
            "annotations have a 'sam_mask'. Name another format."
        )
    if isinstance(document, Mapping):
        read = _read_entry(_flickr_images, document, str(path))
    else:
        read = [_read_entry(_grounded_image, record, f"{path}: record {i}") for i, record in enumerate(document)]
    skipped: Counter[str] = Counter()
    images: dict[str, _Image] = {}
    for name, size_wh, caption, masks in read:
        kept = [mask for mask in masks if mask.label.strip() and has_mask(mask.segmentation)]
        skipped["no phrase or no mask"] += len(masks) - len(kept)
        before = images.get(name, _Image(name, None, caption, []))
        images[name] = _Image(name, size_wh or before.size_wh, before.caption, before.masks + kept)
    return list(images.values()), dict(+skipped)


def _is_grandf(document: Any) -> bool:
    """Whether this is what a file of GranD-f holds, judged by its first record."""
    if isinstance(document, Mapping):
        annotations = document.get("annotations")
        first = annotations[0] if isinstance(annotations, list) and annotations else None
        return isinstance(first, Mapping) and "sam_mask" in first
    first = document[0] if isinstance(document, list) and document else None
    return isinstance(first, Mapping) and (isinstance(first.get("groundings"), Mapping) or _referred(first) is not None)


def _referred(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The inner record of RefCOCOg's shape, or None."""
    inner = next(iter(record.values()), None) if len(record) == 1 else None
    return inner if isinstance(inner, Mapping) and isinstance(inner.get("refs"), list) else None


def _grounded_image(record: Any, place: str) -> _Image:
    referred = _referred(record) if isinstance(record, Mapping) else None
    size_wh = None
    if referred is not None:
        name, caption = _required(referred, "img_file_name", place, str), referred.get("caption", "")
        phrases = [(ref.get("sentence", ""), ref.get("segmentation")) for ref in referred["refs"]]
    elif isinstance(record, Mapping) and isinstance(record.get("groundings"), Mapping):
        name, caption = _required(record, "file_name", place, str), record.get("caption", "")
        phrases = [(phrase, value.get("rle_masks")) for phrase, value in record["groundings"].items()]
        first = next((masks[0] for _, masks in phrases if masks), None)
        if first is not None:
            height_width = _required(first, "size", f"{place}, rle_masks", list)
            size_wh = _sides(height_width[::-1], f"{place}, rle_masks, field 'size'")
    else:
        raise ValueError(f"{place}: found neither 'groundings' nor 'refs'; expected one of them. Correct the record.")
    masks = [_Mask(str(text), mask, f"{name}, phrase {str(text)!r}") for text, mask in phrases]
    return _Image(name, size_wh, str(caption), masks)


def _flickr_images(document: Mapping[str, Any], path: str) -> list[_Image]:
    annotations_of: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in document["annotations"]:
        key = _required(annotation, "image_id", f"{path}: an annotation")
        if not annotation.get("ignore"):
            annotations_of[key].append(annotation)
    images = []
    for key, image in _by_unique(document["images"], "id", f"{path}: an image").items():
        place = f"{path}: image {key}"
        name, size_wh = _name_and_size(image, place)
        caption = str(image.get("caption", ""))

        def mask_of(annotation: Mapping[str, Any], place: str, caption: Any = caption, name: str = name) -> _Mask:
            place_of_phrase = (annotation.get("tokens_positive") or [[0, 0]])[0]
            phrase = caption[place_of_phrase[0] : place_of_phrase[1]]
            return _Mask(phrase, annotation.get("sam_mask"), f"{name}, phrase {phrase!r}")

        masks = [_read_entry(mask_of, annotation, f"{place}, an annotation") for annotation in annotations_of[key]]
        images.append(_Image(name, size_wh, caption, masks))
    return images


def _read_entry(read: Callable[[Any, str], Any], entry: Any, place: str) -> Any:
    """Call `read(entry, place)`; a value in it of a type that `read` did not expect is named as the file's fault."""
    try:
        return read(entry, place)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # such as null in place of an object
        raise ValueError(f"{place}: found a value of another kind ({error}) in {quoted(entry)}") from error


def _name_and_size(image: Mapping[str, Any], place: str) -> tuple[str, tuple[int, int]]:
    name = _required(image, "file_name", place, str)
    sides = [_required(image, key, place, int | float) for key in ("width", "height")]
    return name, _sides(sides, f"{place}, fields 'width' and 'height'")


def _sides(sides: Sequence[Any], place: str) -> tuple[int, int]:
    whole = [int(side) if isinstance(side, float) and side.is_integer() else side for side in sides]
    if len(whole) != 2 or not all(map(is_side, whole)):
        raise ValueError(f"{place}: found {quoted(sides)}, expected two whole numbers of pixels; correct them.")
    return whole[0], whole[1]


def box_of_mask_xyxy_px(rle_mask: str, size_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    """The mask's bounding box; all 0 for an empty mask."""
    x, y, width, height = coco_mask.toBbox({"size": list(size_wh[::-1]), "counts": rle_mask.encode()}).tolist()
    return x, y, x + width, y + height


def _required(record: Any, key: str, place: str, kind: Any = int | str) -> Any:
    found = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(found, kind):
        value = "none" if found is None else quoted(found)
        raise ValueError(f"{place}, field '{key}': found {value}, expected one as in COCO's files; correct the record.")
    return found


def _by_unique(entries: Sequence[Mapping[str, Any]], key: str, place: str) -> dict[Any, Any]:
    """Index entries by a field. Raises ValueError if two share it: one would silently take the other's annotations."""
    found: dict[Any, Any] = {}
    for entry in entries:
        value = _required(entry, key, place)
        if found.setdefault(value, entry) is not entry:
            raise ValueError(f"{place}, field '{key}': found {value!r} a second time, expected each once.")
    return found


# COCO's segmentations: polygons, and run lengths of any origin.

_POINTLESS = (0, 2, 4)
"""Numbers of a polygon that encloses nothing: none, one corner or two, as exports of boxes and points have them."""


def has_mask(segmentation: Any) -> bool:
    """Whether a segmentation has any part that may enclose something."""
    return bool(segmentation) and bool(_parts(segmentation))


def union_rle(segmentation: Any, size_wh: tuple[int, int], place: str) -> str:
    """Encode the union of a segmentation's parts as a COCO compressed RLE string of the image's size.

    Args:
        segmentation: a list of polygons `[x1, y1, x2, y2, ...]`, an RLE `{"size": [height, width], "counts": ...}` with
            counts as a list or as text, or a list of such RLEs. Polygons of fewer than three corners are left out.
        size_wh: width and height of the image, pixels.
        place: file, record and field, for messages.

    Raises:
        ValueError: a part is none of these, belongs to an image of another size, or lies far outside the image.
    """
    parts = _parts(segmentation)
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise ValueError(f"{place}: found {quoted(segmentation)}, expected polygons or an RLE; correct the record.")
    encoded = []
    for part in parts:
        try:
            encoded.append(_encoded(part, *size_wh))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{place}: found {quoted(part)} ({error}), expected a polygon [x1, y1, x2, y2, x3, y3, ...] or an "
                "RLE; correct the record."
            ) from error
    rle_mask = encoded[0]["counts"] if len(encoded) == 1 else coco_mask.merge(encoded)["counts"]
    return rle_mask.decode("ascii") if isinstance(rle_mask, bytes) else rle_mask


def _parts(segmentation: Any) -> Any:
    if not isinstance(segmentation, list):
        return [segmentation] if isinstance(segmentation, Mapping) else segmentation
    return [part for part in segmentation if not (isinstance(part, list) and len(part) in _POINTLESS)]


def _encoded(part: Any, width: int, height: int) -> Any:
    """Encode one part of a segmentation as pycocotools' RLE."""
    if not isinstance(part, Mapping):
        if not isinstance(part, Sequence) or isinstance(part, str) or len(part) % 2 or len(part) < 6:
            raise ValueError("a polygon has at least three corners, each of two numbers")
        reach = max(width, height)  # pycocotools draws each edge pixel by pixel, also outside the image
        if not all(is_finite_number(number) and -reach <= number <= 2 * reach for number in part):
            raise ValueError(f"a corner that is no finite number, or far outside the image of {width} x {height}")
        return coco_mask.frPyObjects([[float(number) for number in part]], height, width)[0]
    if list(part.get("size", ())) != [height, width]:
        raise ValueError(
            f"a mask of size {part.get('size')}, where the image is [height, width] = {[height, width]}: these "
            "annotations belong to other images"
        )
    counts = part.get("counts")
    if isinstance(counts, list | tuple):
        if not all(is_finite_number(run) and run >= 0 and run == int(run) for run in counts):
            raise ValueError("a run that is no number of pixels")
        if sum(counts) != width * height:
            raise ValueError(f"runs that sum to {sum(counts)} pixels, not to {width} x {height} = {width * height}")
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    problem = rle_problems([text], [width * height])[0] if isinstance(text, str) else "no counts"
    if problem:
        raise ValueError(problem)
    return {"size": [height, width], "counts": text}
