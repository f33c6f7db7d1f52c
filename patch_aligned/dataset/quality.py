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
from patch_aligned.record_files import with_progress
from patch_aligned.tables import Cell, Table, number
from patch_aligned.web import render

MIN_IOU = 0.5
FIGURES = {
    "truth": ("recall", "named right", "recall by name", "mask IoU"),
    "PAD": ("on an instance", "precision of labels", "on an instance of its name", "mask IoU"),
}
ALIKE = ("in the other file", "of these, same name", "in the other file by name", "mask IoU")
"""Share of a file's regions with a partner; of these, with one of their name; of all, likewise; mean over pairs."""
_SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}  # pixels, below
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


def plain(name: str) -> str:
    """Return a name as names are compared: without case and superfluous white space."""
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


def compare(indices: Sequence[AnnotationIndex], files: Sequence[str], same: Same) -> pd.DataFrame:
    """Return the terms of all figures, of the images that two files share: a row for each region and group of it.

    A group is all regions, those of a size, or those of a label; pixels are a group of each image.
    """
    if broken := [index.rejection_message() for index in indices if index.rejected]:
        raise ValueError("\n".join(broken))
    first, second = indices
    shared = [(one, row) for row in range(len(second)) if (one := first.find(second[row].image_id)) is not None]
    if not shared:
        message = "found no image in both; expected paths below one folder. Strip or add the leading folders in one"
        raise ValueError(f"{first.source} and {second.source}: {message}")
    rows: list[Any] = []
    for places in with_progress(shared, "Comparing"):
        pair = [index[place] for index, place in zip(indices, places, strict=True)]
        image_id, masks = pair[0].image_id, [image.coco_masks() for image in pair]
        require_size(pair[0].size_wh, pair[1].size_wh, f"{first.source}: {image_id}")
        for file, own in zip(files, masks, strict=True):
            labelled = int(coco_mask.area(coco_mask.merge(own))) if own else 0
            rows.append((file, "pixels", "all", image_id, math.prod(pair[0].size_wh), labelled, 0, 0.0))
        areas = [areas_px(own) for own in masks]
        for *regions, iou, named in judge_image(pair, same):
            for side, place in enumerate(regions):
                if place >= 0:
                    size = next(size for size, most in _SIZES.items() if areas[side][place] < most)
                    groups = (("overall", "all"), ("size", size), ("label", plain(pair[side].regions[place].tag)))
                    rows += [(files[side], *group, image_id, 1, min(regions) >= 0, named, iou) for group in groups]
    return pd.DataFrame(rows, columns=["file", "by", "name", "image", "of", "met", "named", "iou"])


def figures(terms: pd.DataFrame) -> pd.DataFrame:
    """Return value, low, high, images and of how many, by file, kind and name of a group, and figure."""
    frames = {}
    for (file, by, name), own in terms.groupby(["file", "by", "name"]):
        sums = own.groupby("image")[["of", "met", "named", "iou"]].sum().to_numpy(float)  # [images, 4]
        names = ("share labelled",) if by == "pixels" else FIGURES.get(file, ALIKE)
        above, below = sums[:, [1, 2, 2, 3][: len(names)]], sums[:, [0, 1, 0, 1][: len(names)]]
        frames[file, by, name] = ratios_of(above, below, Resampling(), names).assign(of=below.sum(axis=0).astype(int))
    return pd.concat(frames, names=["file", "by", "name", "figure"])


def worst_images(
    indices: Sequence[AnnotationIndex], files: Sequence[str], terms: pd.DataFrame, same: Same
) -> list[AnnotatedImage]:
    """Return the worst images, and one for each of the worst labels. Captions say which, tags what differs."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for by, key, least in (("overall", "image", 1), ("label", "name", _LEAST_REGIONS)):
        groups = terms[terms["by"] == by].groupby(key)
        shares = groups["named"].mean()[groups.size() >= least].sort_values(kind="stable")
        for name in shares[shares < 1].index[:_WORST]:
            own = groups.get_group(name)
            text = f"{name}: {own['named'].sum()} of {len(own)} regions have a partner of their name"
            reasons[own[~own["named"].astype(bool)]["image"].mode()[0]].append(text)
    worst = []
    for image_id, texts in reasons.items():
        pair, tagged = [index[index.find(image_id) or 0] for index in indices], []
        for *places, iou, named in judge_image(pair, same):
            own = {file: image.regions[at] for file, image, at in zip(files, pair, places, strict=True) if at >= 0}
            tag = ", ".join(f"{file}: {region.tag}" for file, region in own.items())
            names = " = ".join(dict.fromkeys(region.tag for region in own.values()))
            tag = f"both: {names}" if named else tag if iou else f"only {tag}"
            tagged.append(replace([*own.values()][-1], tag=tag, extra={"iou": iou} if iou else {}))
        worst.append(replace(pair[0], caption="; ".join(texts), regions=tuple(tagged), extra={}))
    return worst


def as_table(numbers: pd.DataFrame, file: str, by: str) -> Table:
    """Return a row for each group of a file, the worst first; PAD goes by its names, for no truth labels everything."""
    own, rows = numbers.xs((file, by), level=("file", "by")), []
    judged = own.groupby("name").nth(0 if by == "pixels" else 1 if file == "PAD" else 2)
    for name in judged.sort_values(["value", "of"], ascending=[True, False]).index.get_level_values("name")[:_ROWS]:
        found = own.xs(name)
        spans = zip(found["value"], found["low"], found["high"], strict=True)
        cells = [
            Cell(number(v), "" if math.isnan(low) else f"{number(low)} … {number(high)}") for v, low, high in spans
        ]
        rows.append([Cell(name), Cell(f"{found['of'].iloc[0]:,}"), *cells])
    return Table(f"{file}: {by}", (by, "pixels" if by == "pixels" else "regions", *found.index), rows)


def write_report(
    numbers: pd.DataFrame, about: dict[str, Any], worst: list[AnnotatedImage], image_folder: Path, output: Path
) -> list[Table]:
    """Write `quality.json`, `quality.html` and, with the worst images, `worst.html`; return the tables."""
    output.mkdir(parents=True, exist_ok=True)
    records = json.loads(numbers.reset_index().to_json(orient="records"))  # null where there is no value
    document = json.dumps({**about, "figures": records}, indent=1, ensure_ascii=False)
    (output / "quality.json").write_text(document + "\n", encoding="utf-8")
    if worst:
        write_annotations(worst, output / "worst.jsonl")
        write_view(output / "worst.jsonl", image_folder, output / "worst.html")
    tables = [as_table(numbers, *pair) for pair in numbers.index.droplevel(["name", "figure"]).unique()]
    page = render(
        __package__, "quality.html.j2", about=about, tables=tables, rule=pair_regions.__doc__, worst=len(worst)
    )
    (output / "quality.html").write_text(page, encoding="utf-8")
    return tables
