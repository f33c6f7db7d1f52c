"""What a PAD file holds, in numbers: images, tags, masks, and how many tokens regions cover.

One pass, in constant memory but for one number a region and the tags' counts.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as coco_mask

from patch_aligned.cells import TokenGrid, Treatment, square_grid
from patch_aligned.masks import areas_px, covered_tokens_of_regions
from patch_aligned.pad import SKIPPED_SUFFIX, AnnotatedImage, iter_records, read_annotations

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# The statistics as a picture: tags, regions an image, sizes of masks, covered tokens.

_BLUE, _RED, _INK = "#3b6fb6", "#d9480f", "#202124"
_LONGEST_TAG = 24
_MOST_REGIONS = 20


def save_statistics_figure(statistics: Statistics, path: Path) -> None:
    """Draws four panels and saves them as an image of the kind that the suffix names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_tags(axes[0, 0], statistics)
    _draw_regions_per_image(axes[0, 1], statistics)
    _draw_mask_shares(axes[1, 0], statistics)
    _draw_tokens(axes[1, 1], statistics)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{statistics.file.name}: {statistics.images:,} images, {statistics.regions:,} regions, "
    figure.suptitle(_plain(f"{title}{len(statistics.tags):,} tags"), color=_INK)
    figure.savefig(path, dpi=120)


def _draw_tags(axis: Axes, statistics: Statistics) -> None:
    top = statistics.tags.most_common(TAGS_SHOWN)[::-1]
    names = [tag if len(tag) <= _LONGEST_TAG else f"{tag[: _LONGEST_TAG - 1]}…" for tag, _ in top]
    places = range(len(top))
    axis.barh(places, [count for _, count in top], color=_BLUE)
    axis.set_yticks(places, [_plain(name) for name in names], fontsize=8)
    axis.set_xlabel("regions")
    axis.set_title("The most frequent tags", loc="left", fontsize=11)


def _draw_regions_per_image(axis: Axes, statistics: Statistics) -> None:
    numbers = range(_MOST_REGIONS + 1)
    heights = [statistics.regions_per_image[number] for number in numbers]
    heights[-1] = sum(count for number, count in statistics.regions_per_image.items() if number >= _MOST_REGIONS)
    last = max((number for number in numbers if heights[number]), default=0)
    axis.bar(numbers[: last + 1], heights[: last + 1], color=_BLUE)
    if last == _MOST_REGIONS:
        axis.set_xticks([*range(0, _MOST_REGIONS, 5), _MOST_REGIONS], ["0", "5", "10", "15", f"{_MOST_REGIONS}+"])
    else:
        axis.set_xticks(numbers[: last + 1])
    axis.set_xlabel("regions of an image")
    axis.set_ylabel("images")
    axis.set_title("Regions per image", loc="left", fontsize=11)


def _draw_mask_shares(axis: Axes, statistics: Statistics) -> None:
    shares = np.asarray(statistics.area_shares, dtype=np.float64)
    axis.hist(100 * shares, bins=list(np.linspace(0, max(100 * shares.max(initial=0.0), 1.0), 41)), color=_BLUE)
    axis.set_xlabel("mask, per cent of the image")
    axis.set_ylabel("regions")
    axis.set_title("Sizes of masks", loc="left", fontsize=11)


def _draw_tokens(axis: Axes, statistics: Statistics) -> None:
    covered = np.asarray(statistics.covered_tokens)
    grid = statistics.tokens.grid
    edges = np.concatenate(([0], np.unique(np.geomspace(1, grid * grid + 1, 25).round())))
    counts, _ = np.histogram(covered, bins=edges)
    places = np.arange(len(counts))
    axis.bar(places, counts, color=[_RED, *[_BLUE] * (len(counts) - 1)])
    shown = [0, *range(1, len(counts), 4)]
    axis.set_xticks(shown, [f"{int(edges[place])}" for place in shown])
    share = statistics.regions_without_token / max(statistics.regions, 1)
    aspect = statistics.tokens.image_aspect_ratio
    axis.set_xlabel(f"covered tokens, from, of {grid} × {grid} ({aspect}); red: none")
    axis.set_ylabel("regions")
    axis.set_title(f"Tokens that regions cover; {share:.1%} cover none", loc="left", fontsize=11)


def _plain(text: str) -> str:
    """Any text without a meaning to matplotlib's mathtext."""
    return text.replace("$", r"\$")


_TREATMENTS: dict[str, Treatment] = {"square": "crop", "pad": "pad", "anyres": "squeeze"}
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TAGS_SHOWN = 20


@dataclass(frozen=True)
class TokenSettings:
    """How LLaVA makes an image square and lays a grid of tokens over it.

    Attributes:
        grid: rows and columns of visual tokens.
        side: width and height of the model image, pixels.
        image_aspect_ratio: `square` (stage 1) or `pad` (stage 2).
        min_coverage: share of a token's cell from which on it counts as covered.
    """

    grid: int = 24
    side: int = 336
    image_aspect_ratio: str = "square"
    min_coverage: float = 0.5

    def cells(self, size_wh: tuple[int, int]) -> TokenGrid:
        """The cells of an image of this size.

        Raises:
            ValueError: `image_aspect_ratio` is none of LLaVA's.
        """
        if self.image_aspect_ratio not in _TREATMENTS:
            raise ValueError(f"image_aspect_ratio: found {self.image_aspect_ratio!r}, expected 'square' or 'pad'")
        return square_grid(size_wh, _TREATMENTS[self.image_aspect_ratio], (self.grid, self.grid), self.side)

    def covered(self, image: AnnotatedImage) -> np.ndarray:
        """Tokens that each region covers: bool `[R, grid * grid]`."""
        masks = [region.rle_mask for region in image.regions]
        grid = self.cells(image.size_wh)
        return covered_tokens_of_regions(masks, image.size_wh, grid, self.min_coverage, image.image_id)


@dataclass
class Statistics:
    """Counts of a PAD file, gathered image by image.

    Attributes:
        file: the PAD file.
        tokens: the grid on which regions cover tokens.
        statuses: images by status, of a merged annotation run; also those that are not in the file.
        area_shares: of each region, its mask's share of the image.
        covered_tokens: of each region, the number of tokens that it covers.
        coverage_shares: of each image with regions, the share of the image that its masks cover together.
    """

    file: Path
    tokens: TokenSettings
    images: int = 0
    captions: int = 0
    caption_words: int = 0
    images_without_usable_region: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    sizes_wh: Counter[tuple[int, int]] = field(default_factory=Counter)
    regions_per_image: Counter[int] = field(default_factory=Counter)
    area_shares: array[float] = field(default_factory=lambda: array("f"))
    coverage_shares: array[float] = field(default_factory=lambda: array("f"))
    covered_tokens: array[int] = field(default_factory=lambda: array("i"))

    @property
    def regions(self) -> int:
        """Number of regions."""
        return len(self.area_shares)

    @property
    def regions_without_token(self) -> int:
        """Regions that cover no token, and so are no part of the patch loss."""
        return int((np.asarray(self.covered_tokens) == 0).sum())

    def add(self, image: AnnotatedImage) -> None:
        """Counts one image.

        Raises:
            ValueError: see `patch_masks.covered_tokens_of_regions`.
        """
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


def gather_statistics(
    path: Path,
    tokens: TokenSettings | None = None,
    limit: int | None = None,
    watch: Callable[[Iterator[AnnotatedImage]], Iterable[AnnotatedImage]] = iter,
) -> Statistics:
    """Reads a PAD file once.

    Args:
        path: PAD file. Where `<path>.skipped.jsonl` lies beside it, as merging leaves it, its statuses count too.
        tokens: the grid; None means LLaVA-1.5's in stage 1.
        limit: only the first so many images.
        watch: passes the images on, one by one; it may show the progress.

    Raises:
        AnnotationError: a record breaks the format.
        RecordFileError: the file is missing or broken.
    """
    statistics = Statistics(path, tokens or TokenSettings())
    for image in watch(islice(read_annotations(path), limit)):
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


def table_rows(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The main numbers of `as_json`, as name and text."""
    tokens = numbers["tokens"]
    rows, cols = tokens["grid"]
    captions = f"{numbers['images_with_caption']:,} ({numbers['words_per_caption']:.1f} words each)"
    without = f"{tokens['regions_without_token']:,} ({tokens['share_of_regions_without_token']:.1%})"
    return [
        ("images", f"{numbers['images']:,}"),
        ("images without regions", f"{numbers['images_without_regions']:,}"),
        ("images with a caption", captions),
        ("regions", f"{numbers['regions']:,}"),
        ("regions per image", _spread(numbers["regions_per_image"], "{:.3g}")),
        ("unique tags", f"{numbers['unique_tags']:,} ({numbers['tags_seen_once']:,} seen once)"),
        ("mask, share of image", _spread(numbers["mask_share_of_image"], "{:.1%}")),
        ("image under masks", _spread(numbers["image_share_under_masks"], "{:.1%}")),
        (f"tokens per region, {rows} x {cols}, {tokens['image_aspect_ratio']}",
         _spread(tokens["tokens_per_region"], "{:.3g}")),
        ("regions that cover no token", without),
        ("images whose regions all cover no token", f"{tokens['images_with_regions_but_none_covers_a_token']:,}"),
        *((f"status {status}", f"{count:,}") for status, count in numbers["statuses"].items()),
    ]  # fmt: skip


def _spread(values: dict[str, float], form: str) -> str:
    if not values:
        return "–"
    mean, low, middle, high = (form.format(values[name]) for name in ("mean", "p5", "p50", "p95"))
    return f"mean {mean}, median {middle}, 5–95 %: {low}–{high}"


def as_markdown(numbers: dict[str, Any]) -> str:
    """The main numbers and the most frequent tags as tables."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in table_rows(numbers)), ""]
    if tags := list(islice(numbers["tags"].items(), TAGS_SHOWN)):
        lines += ["| most frequent tags | regions |", "|---|--:|"]
        lines += [f"| {_cell(tag)} | {count:,} |" for tag, count in tags]
    return "\n".join([*lines, ""])


def _cell(tag: str) -> str:
    """A tag, which may be any text, as the text of a cell of a table."""
    escaped = tag.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return " ".join("".join(f"\\{letter}" if letter in "|*_`[]#" else letter for letter in escaped).split())


def write_statistics(statistics: Statistics, output: Path, plots: bool = True) -> dict[str, Any]:
    """Writes `stats.json`, `stats.md`, `tags.tsv` and, with `plots`, `stats.png` into the folder `output`.

    Returns:
        What `as_json` says.

    Raises:
        ImportError: `plots` without matplotlib.
    """
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
