"""A page to look through a PAD file in a browser: one HTML file that contains its images and loads nothing.

The page draws the masks from their RLE strings. Covered tokens are computed here, by the same code as in training.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from patch_aligned.dataset.stats import TokenSettings
from patch_aligned.images import ImageFileError, thumbnail
from patch_aligned.masks import areas_px
from patch_aligned.pad import AnnotatedImage, Region, read_annotations
from patch_aligned.record_files import is_finite_number, with_progress
from patch_aligned.web import grid_edges, jpeg_address, render

MOST_IMAGES = 5000
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class ViewSelection:
    """Which records are shown."""

    start: int = 0  # index of the first record in the file
    limit: int = 100
    image_ids: frozenset[str] = frozenset()  # only these, if any are given
    tag: str | None = None  # only images with this text in a tag, ignoring case

    def __contains__(self, image: AnnotatedImage) -> bool:
        if self.image_ids and image.image_id not in self.image_ids:
            return False
        return self.tag is None or any(self.tag.lower() in region.tag.lower() for region in image.regions)


@dataclass
class Viewed:
    """What is on the pages."""

    pages: list[Path]  # in order
    images: int
    regions: int
    without_picture: int = 0  # images that are missing, broken, or of another size; the page says why
    next_record: int | None = None  # index of the first selected record beyond the limit
    not_found: tuple[str, ...] = ()  # selected ids that the file does not have


def write_view(
    pad: Path,
    image_folder: Path,
    output: Path,
    *,
    selection: ViewSelection | None = None,
    tokens: TokenSettings | None = None,
    page_size: int = 250,
    thumbnail_side: int = 640,
) -> Viewed:
    """Write the page `output`, or several (`view.html`, `view-2.html` ...) with links to each other.

    `page_size` records are on a page, with images of at most `thumbnail_side` pixels. Without a selection the first 100
    records are shown.
    """
    selection = selection or ViewSelection()
    tokens = tokens or TokenSettings()
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: found suffix {output.suffix!r}, expected .html")
    if selection.limit > MOST_IMAGES:
        raise ValueError(
            f"--limit {selection.limit}: expected at most {MOST_IMAGES}, since every image is embedded. "
            "Look at a part: --start, --limit, --tag, --ids"
        )
    chosen, next_record = _select(pad, selection)
    pages = [
        output if page == 0 else output.with_stem(f"{output.stem}-{page + 1}")
        for page in range(math.ceil(len(chosen) / page_size))
    ]
    viewed = Viewed(pages, len(chosen), sum(len(image.regions) for _, image in chosen), next_record=next_record)
    if next_record is None:
        viewed.not_found = tuple(sorted(selection.image_ids - {image.image_id for _, image in chosen}))
    output.parent.mkdir(parents=True, exist_ok=True)
    images = iter(with_progress(chosen, "Drawing"))
    for number, page in enumerate(pages):
        entries = [_entry(*entry, image_folder, tokens, thumbnail_side) for entry in islice(images, page_size)]
        viewed.without_picture += sum(entry["picture"] is None for entry in entries)
        page.write_text(_page(entries, pad, tokens, pages, number), encoding="utf-8")
    return viewed


def _select(pad: Path, selection: ViewSelection) -> tuple[list[tuple[int, AnnotatedImage]], int | None]:
    """The selected records with their indices, and the index of the next one beyond the limit."""
    chosen: list[tuple[int, AnnotatedImage]] = []
    for record, image in enumerate(read_annotations(pad)):
        if record < selection.start or image not in selection:
            continue
        if len(chosen) == selection.limit:
            return chosen, record
        chosen.append((record, image))
        if selection.image_ids and len(chosen) == len(selection.image_ids):
            break
    if not chosen:
        wanted = [*sorted(selection.image_ids)[:3], *([f"tag {selection.tag!r}"] if selection.tag else [])]
        raise ValueError(
            f"{pad}: found no record{f' of {wanted}' if wanted else ''} from record {selection.start} on; expected at "
            "least one. Choose others by --start, --ids or --tag"
        )
    return chosen, None


def _entry(
    record: int, image: AnnotatedImage, image_folder: Path, tokens: TokenSettings, thumbnail_side: int
) -> dict[str, Any]:
    """The page's data of one image."""
    width, height = image.size_wh
    picture, problem = None, None
    try:
        smaller = thumbnail(image_folder, image.image_id, image.size_wh, thumbnail_side)
        picture = jpeg_address(smaller, _JPEG_QUALITY)
    except ImageFileError as error:
        problem = str(error)
    grid = tokens.cells(image.size_wh)
    covered = tokens.covered(image)  # [R, tokens]
    regions = [
        {
            "tag": region.tag,
            "bbox": list(region.bbox_xyxy_px),
            "rle_mask": region.rle_mask,
            "area_percent": round(100 * float(area) / (width * height), 1),
            "tokens": base64.b64encode(np.packbits(of_region).tobytes()).decode(),
            "tokens_covered": int(of_region.sum()),
            **_additional(region),
        }
        for region, area, of_region in zip(image.regions, areas_px(image.coco_masks()), covered, strict=True)
    ]
    return {
        "record": record,
        "image_id": image.image_id,
        "size": [width, height],
        "caption": image.caption,
        "status": image.extra.get("status"),
        "picture": picture,
        "problem": problem,
        "grid": grid_edges(grid, digits=3),
        "regions": regions,
    }


def _additional(region: Region) -> dict[str, Any]:
    """The region's score, and its other additional values as one text."""
    score = region.extra.get("score")
    others = {key: value for key, value in region.extra.items() if key != "score" and value not in (None, region.tag)}
    found: dict[str, Any] = {"extra": "; ".join(f"{key}: {_short(value)}" for key, value in others.items())}
    if is_finite_number(score):
        found["score"] = f"{score:.2f}"
    return found


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _page(entries: list[dict[str, Any]], pad: Path, tokens: TokenSettings, pages: list[Path], number: int) -> str:
    document = {
        "grid_shape": [tokens.grid, tokens.grid],
        "image_aspect_ratio": tokens.image_aspect_ratio,
        "min_coverage": tokens.min_coverage,
        "pages": [page.name for page in pages],
        "page": number,
        "records": entries,
    }
    part = f", page {number + 1} of {len(pages)}" if len(pages) > 1 else ""
    return render(__package__, "view.html.j2", title=f"{pad.name}{part}", data=document)
