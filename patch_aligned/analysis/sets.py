"""The images that are measured, and the readers of annotated images behind them: PAD, COCO's instances, and GranD-f.

Whatever the format, a set yields `AnnotatedImage`s, and every mask passes the same checks. Annotations that a set
leaves out, such as COCO's crowds, are counted by reason.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from llava.mm_utils import UnreadableImageError, load_rgb_image
from patch_aligned.analysis.regions import permute_labels, region_frame
from patch_aligned.images import image_path, stored_size_wh
from patch_aligned.masks import areas_px
from patch_aligned.pad import AnnotatedImage, Region, parse_annotation, read_annotations
from patch_aligned.record_files import beginning_of, is_side, iter_records, quoted, read_document
from patch_aligned.segmentation import has_mask, union_rle

FORMATS = ("auto", "pad", "coco", "grandf")
_ODD_VALUE = (AttributeError, IndexError, KeyError, TypeError)
"""What Python raises for a value of another type than expected, such as null in place of an object."""


@dataclass(frozen=True)
class AnnotatedSet:
    """Annotated images of a file; each iteration reads them from the start.

    Attributes:
        path: the file.
        format: one of `FORMATS`, not `auto`.
        images: starts an iteration.
        skipped: annotations of the whole file that are no regions, counted by reason.
    """

    path: Path
    format: str
    images: Callable[[], Iterator[AnnotatedImage]]
    skipped: Mapping[str, int] = field(default_factory=dict)

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
        return AnnotatedSet(path, "pad", lambda: read_annotations(path))
    document = read_document(path)
    if format == "auto":
        format = "grandf" if _is_grandf(document) else "coco"
    images, skipped = _read_coco(document, path, crowds) if format == "coco" else _read_grandf(document, path)
    return AnnotatedSet(path, format, lambda: (image.annotated(path, image_folder) for image in images), skipped)


def _is_one_document(path: Path) -> bool:
    """Whether a file is COCO's or GranD-f's, judged by its first record."""
    if not path.name.lower().endswith((".json", ".json.gz")):
        return False
    if beginning_of(path).startswith("{"):
        return True
    first = next(iter_records(path), None)
    return first is not None and _is_grandf([first])


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
            labels.append(
                {"tag": mask.label, "bbox": _box_xyxy_px(rle_mask, size_wh), "rle_mask": rle_mask, **mask.extra}
            )
        record = {"image_id": self.name, "size": list(size_wh), "caption": self.caption, "labels": labels}
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
            if _required(annotation, key, f"{path}: an annotation", int | str) not in known:
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
        key = _required(annotation, "image_id", f"{path}: an annotation", int | str)
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
    except _ODD_VALUE as error:
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


def _box_xyxy_px(rle_mask: str, size_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    """The mask's bounding box; all 0 for an empty mask."""
    x, y, width, height = coco_mask.toBbox({"size": list(size_wh[::-1]), "counts": rle_mask.encode()}).tolist()
    return x, y, x + width, y + height


def _required(record: Any, key: str, place: str, kind: Any) -> Any:
    found = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(found, kind):
        value = "none" if found is None else quoted(found)
        raise ValueError(f"{place}, field '{key}': found {value}, expected one as in COCO's files; correct the record.")
    return found


def _by_unique(entries: Sequence[Mapping[str, Any]], key: str, place: str) -> dict[Any, Any]:
    """Index entries by a field. Raises ValueError if two share it: one would silently take the other's annotations."""
    found: dict[Any, Any] = {}
    for entry in entries:
        value = _required(entry, key, place, int | str)
        if found.setdefault(value, entry) is not entry:
            raise ValueError(f"{place}, field '{key}': found {value!r} a second time, expected each once.")
    return found


@dataclass(frozen=True)
class MeasureSettings:
    """What decides the numbers, beside the weights.

    Attributes:
        data: file of annotated images, in any of `sets.FORMATS`.
        image_folder: folder that its image ids are relative to.
        threshold_rule: name of a rule of `alignment.THRESHOLD_RULES`.
        positive_threshold: whether thresholds below 0 are raised to 0.
        min_coverage: share of a token's cell from which on it counts as covered.
        limit: only so many images; None for all.
        region_kind: only regions whose extra key `kind` has this value; None for all.
        region_unit: an annotated `instance` is a region, or all instances of a `label` in an image together.
        seed: of the shuffled labels, and of a random subset.
        batch_size: images in a forward pass; no number depends on it.
        picture_rows: images kept for the picture.
        data_format: of `data`.
        subset: the `first` images of the file, or a `random` choice that depends on `seed` and the images' ids.
        on_error: what to do with an image that is missing, broken, or of another size than its record's: `fail`, or
            `skip` it and list it, with the same numbers as if it had not been in the file.
    """

    data: Path
    image_folder: Path
    threshold_rule: str = "mid_range"
    positive_threshold: bool = False
    min_coverage: float = 0.5
    limit: int | None = None
    region_kind: str | None = None
    region_unit: Literal["instance", "label"] = "instance"
    seed: int = 0
    batch_size: int = 8
    picture_rows: int = 4
    data_format: str = "auto"
    subset: Literal["first", "random"] = "first"
    on_error: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class MeasuredSet:
    """The images that are measured. Their records are kept, their pixels are not: each pass opens the images again.

    Attributes:
        images: records with the regions that count.
        format, skipped: see `AnnotatedSet`.
        broken: images left out, by id, each with the reason.
        labels: all different labels, in the order in which they come.
        regions: see `regions.region_frame`.
        shuffled: `[regions]`, index of the label that each region is compared with as a control, -1 if there is none.
        pictured: region that the picture shows, by the position of its image.
    """

    images: list[AnnotatedImage]
    format: str
    skipped: Mapping[str, int]
    broken: Mapping[str, str]
    labels: list[str]
    regions: pd.DataFrame
    shuffled: Tensor
    pictured: dict[int, int]


def read_set(settings: MeasureSettings) -> MeasuredSet:
    """Read the images that `settings` choose; with `on_error="skip"` all are decoded to find those left out.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: no region is selected, every image would be left out, or an id leads out of the image folder.
    """
    annotated = open_annotated_set(settings.data, settings.image_folder, settings.data_format)
    images = annotated.choose(settings.limit, settings.subset, settings.seed)
    broken = _broken_images(images, settings.image_folder) if settings.on_error == "skip" else {}
    images = [image for image in images if image.image_id not in broken]
    if broken and not images:
        raise ValueError(
            f"{settings.data}: none of its {len(broken):,} images can be measured. The first: "
            f"{next(iter(broken.values()))}. Is --image-folder {settings.image_folder} the right one?"
        )
    paths = [image_path(settings.image_folder, image.image_id) for image in images]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{settings.data}: {len(missing):,} of {len(images):,} images are missing, the first is {missing[0]}. Pass "
            "the --image-folder that its paths are relative to, or leave them out with --on_error skip."
        )
    kind = settings.region_kind
    if kind is not None:
        kinds = {str(region.extra["kind"]) for image in images for region in image.regions if "kind" in region.extra}
        images = [
            replace(image, regions=tuple(region for region in image.regions if region.extra.get("kind") == kind))
            for image in images
        ]
    if not any(image.regions for image in images):
        chosen = "" if kind is None else f" of kind {kind!r} (kinds in the file: {sorted(kinds) or 'none'})"
        raise ValueError(
            f"{settings.data}: no regions{chosen} in {len(images)} images, so nothing can be aligned. Pass --data a "
            "PAD file whose records have labels."
        )
    if settings.region_unit == "label":
        images = [replace(image, regions=_by_label(image)) for image in images]
    index_of_label: dict[str, int] = {}
    own = [index_of_label.setdefault(r.tag, len(index_of_label)) for image in images for r in image.regions]
    labels = list(index_of_label)
    sources = permute_labels(own, settings.seed)
    in_caption = [region.extra.get("in_caption") for image in images for region in image.regions]
    areas = [areas_px(image.coco_masks()) for image in images]
    positions = np.repeat(np.arange(len(images)), [len(image.regions) for image in images])
    with_regions = [position for position, image in enumerate(images) if image.regions]
    rows = min(settings.picture_rows, len(with_regions))
    spread = [with_regions[(2 * row + 1) * len(with_regions) // (2 * rows)] for row in range(rows)]
    return MeasuredSet(
        images=images,
        format=annotated.format,
        skipped=annotated.skipped,
        broken=broken,
        labels=labels,
        regions=region_frame(positions, len(images), own, labels, np.concatenate(areas), in_caption),
        shuffled=torch.tensor([-1 if source is None else own[source] for source in sources]),
        # The largest region in the original image: no score decides what is shown, nor does a tower's crop.
        pictured={position: int(np.argmax(areas[position])) for position in spread},
    )


def _by_label(image: AnnotatedImage) -> tuple[Region, ...]:
    """All masks of a label as one region, whose other keys are the first one's."""
    of_label: dict[str, list[tuple[Region, Any]]] = defaultdict(list)
    for region, mask in zip(image.regions, image.coco_masks(), strict=True):
        of_label[region.tag].append((region, mask))
    united = []
    for (first, *_), masks in (zip(*pairs, strict=True) for pairs in of_label.values()):
        rle_mask = coco_mask.merge(masks)["counts"].decode()
        united.append(replace(first, bbox_xyxy_px=_box_xyxy_px(rle_mask, image.size_wh), rle_mask=rle_mask))
    return tuple(united)


def _broken_images(images: Sequence[AnnotatedImage], image_folder: Path) -> dict[str, str]:
    broken = {}
    for image in images:
        path = image_path(image_folder, image.image_id)
        try:
            file_wh = load_rgb_image(path).size
        except (FileNotFoundError, UnreadableImageError) as error:
            broken[image.image_id] = str(error)
        else:
            if file_wh != image.size_wh:
                broken[image.image_id] = f"{path}: found {list(file_wh)} pixels, its record says {list(image.size_wh)}"
    return broken


def open_image(image: AnnotatedImage, settings: MeasureSettings) -> Image.Image:
    """Read the file of a record.

    Raises:
        OSError: it is missing or broken.
    """
    try:
        return load_rgb_image(image_path(settings.image_folder, image.image_id))
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error}, or leave images like it out with --on_error skip") from error
