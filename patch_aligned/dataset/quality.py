"""How good the labels of a PAD file are: against masks that people drew, or against another PAD file.

Both files are treated alike. Letters: R regions of an image in the first file, T regions in the second.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

from patch_aligned.dataset.view import write_view
from patch_aligned.files import validated
from patch_aligned.intervals import Resampling, ratios_of
from patch_aligned.masks import areas_px, require_size
from patch_aligned.pad import AnnotatedImage, AnnotationIndex, write_annotations
from patch_aligned.tables import Cell, Table, number
from patch_aligned.web import render

MIN_IOU = 0.5
FIGURES = ("matched", "same name", "matched by its name", "mask IoU")
"""Share of a file's regions with a partner; of these, with one of their name; of all, likewise; mean IoU of pairs."""
_SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}  # pixels, below
_COLUMNS = ["file", "image", "label", "area", "regions", "met", "named", "iou"]
_WORST, _LEAST_REGIONS, _ROWS = 12, 5, 100
Same = Callable[[str, str], bool]


def name_rule(synonyms: Path | None, words: str | None, min_cosine: float) -> tuple[str, Same]:
    """Return how names are compared, in words and as a function: by a JSON file, by the words of an LLM, or exactly."""
    rule, alike = "exact", lambda one, other: False
    if synonyms is not None:
        entries = validated(dict[str, list[str]], synonyms.read_bytes(), f"--synonyms {synonyms}")
        sets = [set(map(plain, (name, *others))) for name, others in entries.items()]
        rule, alike = f"synonyms of {synonyms}", lambda one, other: any({one, other} <= own for own in sets)
    elif words is not None:
        from patch_aligned.models.llava import load_words

        table = load_words(words)
        direction = cache(lambda name: table.directions_of_labels([name])[0])
        rule = f"embedding: cosine of words of {words} at least {min_cosine:g}"
        alike = lambda one, other: float(direction(one) @ direction(other)) >= min_cosine  # noqa: E731
    compared = cache(lambda one, other: one == other or alike(one, other))
    return rule, lambda one, other: compared(plain(one), plain(other))


@cache
def plain(name: str) -> str:
    """Return a name without case and superfluous white space, in which names are compared."""
    return " ".join(name.casefold().split())


def pair_regions(ious: np.ndarray, same: np.ndarray) -> list[tuple[int, int]]:
    """Pair rows with columns, `[R, T]`: as many pairs of `MIN_IOU` as can be; of such choices the largest sum of IoU.

    Of equal sums the one with most pairs whose names are the same, which decide nothing else.
    """
    graph = networkx.Graph()
    for one, other in np.argwhere(ious >= MIN_IOU).tolist():
        weight = round(1e9 * ious[one, other]) * (1 + min(ious.shape)) + int(same[one, other])  # whole numbers: exact
        graph.add_edge((0, one), (1, other), weight=weight)
    matching = networkx.max_weight_matching(graph, maxcardinality=True)
    return sorted((one, other) for (_, one), (_, other) in map(sorted, matching))


def judge_image(images: Sequence[AnnotatedImage], same: Same) -> Iterator[tuple[int, int, float, bool]]:
    """Yield the places of each pair in both records, its IoU, and whether names are the same; -1 for no partner.

    Crowds are no regions. A region without partner is left out if half of it is in a crowd of the other file.
    """
    masks = [image.coco_masks() for image in images]
    crowds = [np.array([bool(region.extra.get("iscrowd")) for region in image.regions], bool) for image in images]
    ious = _overlaps(masks[0], masks[1], False) * ~crowds[0][:, None] * ~crowds[1]  # [R, T]
    names = [[same(one.tag, other.tag) for other in images[1].regions] for one in images[0].regions]
    pairs = pair_regions(ious, np.reshape(names, ious.shape))
    yield from ((one, other, float(ious[one, other]), names[one][other]) for one, other in pairs)
    for side in (0, 1):
        around = [masks[1 - side][place] for place in np.flatnonzero(crowds[1 - side])]
        inside = (_overlaps(masks[side], around, True) >= MIN_IOU).any(axis=1)
        for place in sorted(set(np.flatnonzero(~crowds[side] & ~inside).tolist()) - {pair[side] for pair in pairs}):
            yield (place, -1, 0.0, False) if side == 0 else (-1, place, 0.0, False)


def _overlaps(masks: list[Any], others: list[Any], are_crowds: bool) -> np.ndarray:
    """IoU of masks `[R, T]`; with crowds the part of each mask's own area, as COCO scores them."""
    return np.reshape(coco_mask.iou(masks, others, [are_crowds] * len(others)), (len(masks), len(others)))


def compare(
    indices: Sequence[AnnotationIndex], files: Sequence[str], same: Same, watch: Callable[..., Any] = iter
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare the images that two files share: a row for each region, and one for each image with labelled pixels."""
    first, second = indices
    shared = [(one, row) for row in range(len(second)) if (one := first.find(second[row].image_id)) is not None]
    if not shared:
        raise ValueError(
            f"{first.source} and {second.source}: found no image in both; expected paths below one folder. Strip or "
            "add the leading folders in one of them."
        )
    image_ids, rows, pixels = [], [], []
    for places in watch(shared):
        images = [index[place] for index, place in zip(indices, places, strict=True)]
        require_size(images[0].size_wh, images[1].size_wh, f"{first.source}: {images[0].image_id}")
        areas = [areas_px(image.coco_masks()).tolist() for image in images]
        for *pair, iou, named in judge_image(images, same):
            for side, place in enumerate(pair):
                if place >= 0:
                    own = plain(images[side].regions[place].tag), areas[side][place]
                    rows.append((files[side], len(image_ids), *own, 1, min(pair) >= 0, named, iou))
        unions = [coco_mask.area(coco_mask.merge(image.coco_masks())) if image.regions else 0 for image in images]
        pixels.append((*map(int, unions), math.prod(images[0].size_wh)))
        image_ids.append(images[0].image_id)
    regions = pd.DataFrame(rows, columns=_COLUMNS).assign(overall="all")
    regions["size"] = pd.cut(regions["area"], [-1, *_SIZES.values()], right=False, labels=list(_SIZES)).astype(str)
    return regions, pd.DataFrame(pixels, columns=[*files, "all"], index=image_ids, dtype=float)


def figures(regions: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return value, low, high, images and of how many, by file, kind and name of a group, and figure."""
    frames = {}
    for kind in ("overall", "size", "label"):
        for (file, name), own in regions.groupby(["file", kind]):
            sums = own.groupby("image")[["regions", "met", "named", "iou"]].sum().to_numpy(float)  # [images, 4]
            above, below = sums[:, [1, 2, 2, 3]], sums[:, [0, 1, 0, 1]]
            frames[file, kind, name] = ratios_of(above, below, Resampling(), FIGURES).assign(of=below.sum(axis=0))
    for file in images.columns[:2]:
        share = ratios_of(images[[file]].to_numpy(), images[["all"]].to_numpy(), Resampling(), ["pixels labelled"])
        frames[file, "overall", "all"] = pd.concat([frames.get((file, "overall", "all")), share])
    return pd.concat(frames, names=["file", "by", "name", "figure"])


def worst_images(
    indices: Sequence[AnnotationIndex], files: Sequence[str], images: pd.DataFrame, regions: pd.DataFrame, same: Same
) -> list[AnnotatedImage]:
    """Return the worst images, and one for each of the worst labels. Captions say which, tags what differs."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for by, least in (("image", 1), ("label", _LEAST_REGIONS)):
        shares = (
            regions.groupby(by)["named"].agg(["mean", "size"]).sort_values(["mean", "size"], ascending=[True, False])
        )
        for key in shares[(shares["mean"] < 1) & (shares["size"] >= least)].index[:_WORST]:
            own = regions[regions[by] == key]
            of = f"{own['named'].sum()} of {len(own)} regions {'here' if by == 'image' else f'with the label {key}'}"
            reasons[images.index[own[~own["named"]]["image"].mode()[0]]].append(f"{of} have a partner of their name")
    worst = []
    for image_id, texts in reasons.items():
        pair, tagged = [index[index.find(image_id) or 0] for index in indices], []
        for *places, iou, named in judge_image(pair, same):
            own = {file: of.regions[at] for file, of, at in zip(files, pair, places, strict=True) if at >= 0}
            tag = ", ".join(f"{file}: {region.tag}" for file, region in own.items())
            tag = f"both: {tag}" if named else tag if iou else f"only {tag}"
            tagged.append(replace([*own.values()][-1], tag=tag, extra={"iou": iou} if iou else {}))
        worst.append(replace(pair[0], caption="; ".join(texts), regions=tuple(tagged), extra={}))
    return worst


def as_table(numbers: pd.DataFrame, by: str) -> Table:
    """Return a row for each group and file; groups whose regions match by name most rarely come first."""
    own = numbers.xs(by, level="by")
    shares = own["value"].xs("matched by its name", level="figure")
    judged = shares.loc[["truth"]] if "truth" in shares.index else shares  # nobody labels everything
    rows = []
    for name, file in product(
        judged.groupby("name").min().sort_values(kind="stable").index[:_ROWS], own.index.unique(0)
    ):
        if (file, name) in shares.index:
            found = own.loc[(file, name)]
            spans = [
                "" if math.isnan(row.low) else f"{number(row.low)} … {number(row.high)}" for row in found.itertuples()
            ]
            cells = [Cell(*texts) for texts in zip(found["value"].map(number), spans, strict=True)]
            rows.append([Cell(name), Cell(file), Cell(f"{found['of'].iloc[0]:,.0f}"), *cells])
    return Table(by, (by, "file", "regions", *own.index.unique("figure")), rows, text_columns=2)


def write_report(
    numbers: pd.DataFrame, about: dict[str, Any], worst: list[AnnotatedImage], image_folder: Path, output: Path
) -> Table:
    """Write `quality.json`, `quality.html` and, with the worst images, `worst.html`; return the table of the whole."""
    output.mkdir(parents=True, exist_ok=True)
    records = json.loads(numbers.reset_index().to_json(orient="records"))  # null where there is no value
    document = json.dumps({**about, "figures": records}, indent=1, ensure_ascii=False)
    (output / "quality.json").write_text(document + "\n", encoding="utf-8")
    if worst:
        write_annotations(worst, output / "worst.jsonl")
        write_view(output / "worst.jsonl", image_folder, output / "worst.html")
    tables = [as_table(numbers, by) for by in ("overall", "size", "label")]
    values = {
        "title": "Quality of labels",
        "about": about,
        "tables": tables,
        "rule": pair_regions.__doc__,
        "worst": len(worst),
    }
    (output / "quality.html").write_text(render(__package__, "quality.html.j2", **values), encoding="utf-8")
    return tables[0]
