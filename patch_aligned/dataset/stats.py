"""Statistics of a PAD file: images, tags, masks, and how many tokens regions cover.

One pass. Memory is constant except for a few numbers per region and the counts of tags.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as coco_mask

from patch_aligned.cells import TokenGrid, Treatment, square_grid
from patch_aligned.masks import areas_px, covered_tokens_of_regions
from patch_aligned.pad import AnnotatedImage, read_annotations
from patch_aligned.record_files import SKIPPED_SUFFIX, iter_records, with_progress
from patch_aligned.tables import Cell, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_TREATMENTS: dict[str, Treatment] = {"square": "crop", "pad": "pad"}
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TAGS_SHOWN = 20


@dataclass(frozen=True)
class TokenSettings:
    """How LLaVA makes an image square and lays a grid of tokens over it."""

    grid: int = 24  # rows and columns of visual tokens
    side: int = 336  # width and height of the model's image, pixels
    image_aspect_ratio: str = "square"  # `square` (stage 1) or `pad` (stage 2)
    min_coverage: float = 0.5  # share of a token's cell from which it counts as covered

    def cells(self, size_wh: tuple[int, int]) -> TokenGrid:
        """The cells over an image of this size."""
        return square_grid(size_wh, _TREATMENTS[self.image_aspect_ratio], (self.grid, self.grid), self.side)

    def covered(self, image: AnnotatedImage) -> np.ndarray:
        """The tokens that each region covers: bool `[R, grid * grid]`."""
        masks = [region.rle_mask for region in image.regions]
        grid = self.cells(image.size_wh)
        return covered_tokens_of_regions(masks, image.size_wh, grid, self.min_coverage, image.image_id)


@dataclass
class Statistics:
    """Counts of a PAD file, collected image by image."""

    file: Path
    tokens: TokenSettings
    images: int = 0
    captions: int = 0
    caption_words: int = 0
    images_without_usable_region: int = 0  # with regions, none of which covers a token
    statuses: Counter[str] = field(default_factory=Counter)  # of a merged annotation run, with images not in the file
    tags: Counter[str] = field(default_factory=Counter)
    sizes_wh: Counter[tuple[int, int]] = field(default_factory=Counter)
    regions_per_image: Counter[int] = field(default_factory=Counter)
    area_shares: array[float] = field(default_factory=lambda: array("f"))  # of each region, of the image
    coverage_shares: array[float] = field(default_factory=lambda: array("f"))  # of each image with regions, their union
    covered_tokens: array[int] = field(default_factory=lambda: array("i"))  # of each region, how many it covers

    @property
    def regions(self) -> int:
        """Number of regions."""
        return len(self.area_shares)

    @property
    def regions_without_token(self) -> int:
        """Number of regions that cover no token, and so are not in the patch loss."""
        return int((np.asarray(self.covered_tokens) == 0).sum())

    def add(self, image: AnnotatedImage) -> None:
        """Count one image."""
        width, height = image.size_wh
        self.images += 1
        self.captions += bool(image.caption.strip())
        self.caption_words += len(image.caption.split())
        self.sizes_wh[image.size_wh] += 1
        self.regions_per_image[len(image.regions)] += 1
        if isinstance(status := image.extra.get("status"), str):
            self.statuses[status] += 1
        if not image.regions:
            return
        self.tags.update(region.tag for region in image.regions)
        encoded = image.coco_masks()
        self.area_shares.extend((areas_px(encoded) / (width * height)).tolist())
        self.coverage_shares.append(float(coco_mask.area(coco_mask.merge(encoded))) / (width * height))
        covered = self.tokens.covered(image).sum(axis=1).tolist()  # [R]
        self.covered_tokens.extend(covered)
        self.images_without_usable_region += not any(covered)


def gather_statistics(path: Path, tokens: TokenSettings | None = None, limit: int | None = None) -> Statistics:
    """Read a PAD file, or its first `limit` images, once.

    Of a whole file the statuses in `<path>.skipped.jsonl`, which merging writes, count too.
    """
    statistics = Statistics(path, tokens or TokenSettings())
    for image in with_progress(islice(read_annotations(path), limit), "Counting"):
        statistics.add(image)
    skipped = path.with_name(path.name + SKIPPED_SUFFIX)
    if skipped.is_file() and limit is None:
        statistics.statuses.update(str(entry["status"]) for entry in iter_records(skipped))
    return statistics


def distribution(values: Iterable[float]) -> dict[str, float]:
    """Mean, extremes and quantiles; empty for no values."""
    array_ = np.asarray(values, dtype=np.float64)
    if not array_.size:
        return {}
    named = {f"p{round(100 * q)}": float(np.quantile(array_, q)) for q in _QUANTILES}
    return {"mean": float(array_.mean()), "min": float(array_.min()), **named, "max": float(array_.max())}


def as_json(statistics: Statistics) -> dict[str, Any]:
    """All numbers; per-tag counts too, most frequent first."""
    regions, images = statistics.regions, statistics.images
    per_image = np.repeat(*np.array(list(zip(*statistics.regions_per_image.items(), strict=True)))) if images else ()
    without = statistics.regions_without_token
    return {
        "file": statistics.file.as_posix(),
        "images": images,
        "images_without_regions": statistics.regions_per_image[0],
        "images_with_caption": statistics.captions,
        "words_per_caption": statistics.caption_words / statistics.captions if statistics.captions else 0.0,
        "regions": regions,
        "unique_tags": len(statistics.tags),
        "tags_seen_once": sum(count == 1 for count in statistics.tags.values()),
        "regions_per_image": distribution(per_image),
        "mask_share_of_image": distribution(statistics.area_shares),
        "image_share_under_masks": distribution(statistics.coverage_shares),
        "tokens": {
            "grid": [statistics.tokens.grid, statistics.tokens.grid],
            "side_px": statistics.tokens.side,
            "image_aspect_ratio": statistics.tokens.image_aspect_ratio,
            "min_coverage": statistics.tokens.min_coverage,
            "regions_without_token": without,
            "share_of_regions_without_token": without / regions if regions else 0.0,
            "images_with_regions_but_none_covers_a_token": statistics.images_without_usable_region,
            "tokens_per_region": distribution(statistics.covered_tokens),
        },
        "statuses": dict(statistics.statuses.most_common()),
        "sizes_wh": [{"size": list(size), "images": n} for size, n in statistics.sizes_wh.most_common(TAGS_SHOWN)],
        "regions_of_images": {str(n): count for n, count in sorted(statistics.regions_per_image.items())},
        "tags": dict(statistics.tags.most_common()),
    }


def as_table(numbers: dict[str, Any]) -> Table:
    """The main numbers of `as_json`."""
    tokens = numbers["tokens"]
    rows, cols = tokens["grid"]
    captions = f"{numbers['images_with_caption']:,} ({numbers['words_per_caption']:.1f} words each)"
    without = f"{tokens['regions_without_token']:,} ({tokens['share_of_regions_without_token']:.1%})"
    shown = {
        "images": f"{numbers['images']:,}",
        "images without regions": f"{numbers['images_without_regions']:,}",
        "images with a caption": captions,
        "regions": f"{numbers['regions']:,}",
        "regions per image": _spread(numbers["regions_per_image"], "{:.3g}"),
        "unique tags": f"{numbers['unique_tags']:,} ({numbers['tags_seen_once']:,} seen once)",
        "mask, share of image": _spread(numbers["mask_share_of_image"], "{:.1%}"),
        "image under masks": _spread(numbers["image_share_under_masks"], "{:.1%}"),
        f"tokens per region, {rows} x {cols}, {tokens['image_aspect_ratio']}": _spread(
            tokens["tokens_per_region"], "{:.3g}"
        ),
        "regions that cover no token": without,
        "images whose regions all cover no token": f"{tokens['images_with_regions_but_none_covers_a_token']:,}",
        **{f"status {status}": f"{count:,}" for status, count in numbers["statuses"].items()},
    }
    return Table("Statistics", ("", ""), [(Cell(name), Cell(text)) for name, text in shown.items()], text_columns=2)


def _spread(values: dict[str, float], form: str) -> str:
    if not values:
        return "–"
    mean, low, middle, high = (form.format(values[name]) for name in ("mean", "p5", "p50", "p95"))
    return f"mean {mean}, median {middle}, 5–95 %: {low}–{high}"


def as_markdown(numbers: dict[str, Any]) -> str:
    """The main numbers and the most frequent tags as tables."""
    tags = [(Cell(_escaped(tag)), Cell(f"{count:,}")) for tag, count in islice(numbers["tags"].items(), TAGS_SHOWN)]
    tables = [as_table(numbers), *([Table("Tags", ("most frequent tags", "regions"), tags)] if tags else [])]
    return "\n\n".join(table.markdown() for table in tables) + "\n"


def _escaped(tag: str) -> str:
    """A tag, which may be any text, as one line without a meaning to Markdown. Tables escape `|` themselves."""
    escaped = tag.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return " ".join("".join(f"\\{letter}" if letter in "*_`[]#" else letter for letter in escaped).split())


def write_statistics(statistics: Statistics, output: Path, plots: bool = True) -> dict[str, Any]:
    """Write `stats.json`, `stats.md`, `tags.tsv` and, with `plots`, `stats.png`; return what `as_json` does."""
    numbers = as_json(statistics)
    output.mkdir(parents=True, exist_ok=True)
    (output / "stats.json").write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    title = f"# Statistics of {statistics.file.name}\n\n"
    (output / "stats.md").write_text(title + as_markdown(numbers), encoding="utf-8")
    rows = "".join(f"{' '.join(tag.split())}\t{count}\n" for tag, count in statistics.tags.most_common())
    (output / "tags.tsv").write_text("tag\tregions\n" + rows, encoding="utf-8")
    if plots:
        save_statistics_figure(statistics, output / "stats.png")
    return numbers


# The figure: tags, regions per image, sizes of masks, covered tokens.

_BLUE, _RED, _INK = "#3b6fb6", "#d9480f", "#202124"
_LONGEST_TAG = 24
_MOST_REGIONS = 20


def save_statistics_figure(statistics: Statistics, path: Path) -> None:
    """Draw four panels and save them as an image of the kind that the suffix names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    without_token = statistics.regions_without_token / max(statistics.regions, 1)
    panels = {
        "The most frequent tags": _draw_tags,
        "Regions per image": _draw_regions_per_image,
        "Sizes of masks": _draw_mask_shares,
        f"Tokens that regions cover; {without_token:.1%} cover none": _draw_tokens,
    }
    for axis, (title, draw) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        draw(axis, statistics)
        axis.set_title(title, loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{statistics.file.name}: {statistics.images:,} images, {statistics.regions:,} regions, "
    figure.suptitle(_plain(f"{title}{len(statistics.tags):,} tags"), color=_INK)
    figure.savefig(path, dpi=120)


def _draw_tags(axis: Axes, statistics: Statistics) -> None:
    top = statistics.tags.most_common(TAGS_SHOWN)[::-1]
    names = [tag if len(tag) <= _LONGEST_TAG else f"{tag[: _LONGEST_TAG - 1]}…" for tag, _ in top]
    axis.barh(range(len(top)), [count for _, count in top], color=_BLUE)
    axis.set_yticks(range(len(top)), [_plain(name) for name in names], fontsize=8)
    axis.set_xlabel("regions")


def _draw_regions_per_image(axis: Axes, statistics: Statistics) -> None:
    heights: Counter[int] = Counter()
    for number, count in statistics.regions_per_image.items():
        heights[min(number, _MOST_REGIONS)] += count
    numbers = range(max(heights, default=0) + 1)
    axis.bar(numbers, [heights[number] for number in numbers], color=_BLUE)
    if len(numbers) > _MOST_REGIONS:
        axis.set_xticks([*range(0, _MOST_REGIONS, 5), _MOST_REGIONS], ["0", "5", "10", "15", f"{_MOST_REGIONS}+"])
    else:
        axis.set_xticks(numbers)
    axis.set_xlabel("regions of an image")
    axis.set_ylabel("images")


def _draw_mask_shares(axis: Axes, statistics: Statistics) -> None:
    percent = 100 * np.asarray(statistics.area_shares, dtype=np.float64)
    axis.hist(percent, bins=list(np.linspace(0, max(percent.max(initial=0.0), 1.0), 41)), color=_BLUE)
    axis.set_xlabel("mask, per cent of the image")
    axis.set_ylabel("regions")


def _draw_tokens(axis: Axes, statistics: Statistics) -> None:
    grid, aspect = statistics.tokens.grid, statistics.tokens.image_aspect_ratio
    edges = np.concatenate(([0], np.unique(np.geomspace(1, grid * grid + 1, 25).round())))
    counts, _ = np.histogram(np.asarray(statistics.covered_tokens), bins=edges)
    axis.bar(range(len(counts)), counts, color=[_RED, *[_BLUE] * (len(counts) - 1)])
    shown = [0, *range(1, len(counts), 4)]
    axis.set_xticks(shown, [f"{int(edges[index])}" for index in shown])
    axis.set_xlabel(f"covered tokens, from, of {grid} × {grid} ({aspect}); red: none")
    axis.set_ylabel("regions")


def _plain(text: str) -> str:
    """Escape text that has a meaning to matplotlib's mathtext."""
    return text.replace("$", r"\$")
