"""Token maps as a page of one file, as JSON, and as pictures (the paper's Figures 5 and 6)."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from patch_aligned.analysis.localisation import HEAT_MAP, bare, drawable, font_families, panel_jpeg, require_matplotlib
from patch_aligned.analysis.words import MappedImage, TokenMap, TokenMaps, TokenText, colours_of_words
from patch_aligned.web import grid_edges, jpeg_address, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIGITS = 4


def token_map_document(maps: TokenMaps) -> dict[str, Any]:
    """Everything that the page shows, except pictures and places of cells."""
    entries: list[dict[str, Any]] = []
    marks = False
    for image in maps.images:
        colours = colours_of_words(image)
        of_image = [map_entry(name, token_map, colours) for name, token_map in image.maps.items()]
        marks |= any(word["starts_word"] for entry in of_image for word in entry["words"].values())
        entries.append({"image_id": image.image_id, "top_cosine": round(image.top_cosine, _DIGITS), "maps": of_image})
    return {
        "method": maps.settings.described(),
        "word_list": maps.word_list.name if maps.word_list else None,
        "marks_words": marks,
        "projectors": maps.sources,
        "images": entries,
    }


def write_token_map_page(maps: TokenMaps, folder: Path) -> list[Path]:
    """Write `token_map.html` and `token_map.json` into a folder, which is made if missing; return their paths."""
    document = token_map_document(maps)
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "token_map.html", folder / "token_map.json"
    numbers.write_text(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    images = []
    for entry, image in zip(document["images"], maps.images, strict=True):
        edges = [grid_edges(token_map.grid) for token_map in image.maps.values()]
        placed = [{**of_map, "grid": grid} for of_map, grid in zip(entry["maps"], edges, strict=True)]
        height, width = image.image.shape[:2]
        picture = jpeg_address(Image.fromarray(image.image))
        images.append({**entry, "maps": placed, "size": [width, height], "picture": picture})
    page.write_text(
        render(__package__, "token_map.html.j2", title="Token maps", data={**document, "images": images}),
        encoding="utf-8",
    )
    return [page, numbers]


def map_entry(name: str, token_map: TokenMap, colours: Mapping[str, str]) -> dict[str, Any]:
    """Return the words of one model's tokens as JSON; `colours` are by the text in lower case."""
    pursuit = token_map.pursuit
    words: dict[str, dict[str, Any]] = {}
    for token_id, word in token_map.words.items():
        words[str(token_id)] = asdict(word)
        if word.english and (colour := colours.get(word.text.lower())):
            words[str(token_id)]["colour"] = colour
    return {
        "projector": name,
        "grid": list(token_map.grid.shape),
        "captions": [token_map.caption(turn) for turn in range(pursuit.ids.shape[1])],
        "ids": pursuit.ids.tolist(),
        "coefficients": _rounded(pursuit.coefficients),
        "cosines": _rounded(pursuit.cosines),
        "residual_norms": _rounded(pursuit.residual_norms),
        "words": words,
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in row] for row in values.tolist()]


INK, FADED = "#212529", "#495057"
_SMALLEST = 0.4  # size of a word at cosine 0, as a share of the size at the image's largest cosine


class MapPanels(NamedTuple):
    """The maps of one model for the report: captions and `data:` addresses, and how they are laid out."""

    pictures: list[tuple[str, str]]
    width_px: int
    print_columns: int


def map_panels(image: MappedImage) -> dict[str, MapPanels]:
    """The maps of an image round by round, as JPEGs, by the model's name."""
    writer = _WordWriter(image)
    found = {}
    for name, token_map in image.maps.items():
        _, _, width, height = _box_around(token_map)
        across = width / _cell_wh(token_map)[0]  # cells that fit beside each other
        inches = max(2.6, 0.25 * across)
        draw = partial(_draw_map, image=image.image, token_map=token_map, points=72 * inches / width, writer=writer)
        pictures = []
        for turn in range(token_map.pursuit.ids.shape[1]):
            jpeg = panel_jpeg(partial(draw, turn=turn), (inches, inches * height / width))
            pictures.append((token_map.caption(turn), jpeg_address(jpeg)))
        found[name] = MapPanels(pictures, round(22 * across), 3 if across <= 12 else 2)
    return found


def save_token_map_figures(
    maps: TokenMaps,
    folder: Path,
    on_images: Callable[[int, int], None] = lambda done, total: None,
    prefix: str = "",
    cosine_maps: bool = False,
) -> list[Path]:
    """Save each image as a PNG, `<prefix>001_<image>.png` and so on, and return the paths."""
    written = []
    for number, image in enumerate(maps.images, start=1):
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(image.image_id).stem)[:100]  # file names have at most 255 bytes
        path = folder / f"{prefix}{number:03}_{stem}.png"
        found_by = f"words found by {maps.settings.described()}"
        save_token_map_figure(image, path, found_by, maps.word_list is not None, cosine_maps)
        written.append(path)
        on_images(number, len(maps.images))
    return written


def save_token_map_figure(
    image: MappedImage, path: Path, caption: str, has_word_list: bool, cosine_maps: bool = False
) -> None:
    """Save all maps of an image as a picture: a row a round, a column a model; the caption says how words were found.

    With `cosine_maps` the cosines of each round stand beside its words, on one scale for the image.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    names = list(image.maps)
    rounds = image.maps[names[0]].pursuit.ids.shape[1]
    boxes_wh = {name: _box_around(token_map)[2:] for name, token_map in image.maps.items()}
    most_across = max(boxes_wh[name][0] / _cell_wh(token_map)[0] for name, token_map in image.maps.items())
    panel = min(max(4.2, 0.4 * most_across), 12.0)  # width, inches
    panel_height = panel * max(height / width for width, height in boxes_wh.values())
    gap, title, head, margin = 0.15, 0.3, 2.0, 0.2
    panels = 2 if cosine_maps else 1  # of a model in a row
    width = max(panels * len(names) * (panel + gap) - gap + 2 * margin, 7.0)
    height = head + rounds * (panel_height + title) + margin
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    writer = _WordWriter(image)

    thumbnail = figure.add_axes((margin / width, 1 - (margin + 1.25) / height, 1.25 / width, 1.25 / height))
    bare(thumbnail)
    thumbnail.imshow(image.image)
    colours = (
        "English words are coloured, one colour a word; all other tokens are black."
        if has_word_list
        else "No English word list is installed, so all words have one colour."
    )
    size = f"The larger a word, the larger its cosine with what is left of the token (largest here: {writer.top:.2f})."
    method = textwrap.wrap(caption[:1].upper() + caption[1:] + ".", 90)
    write = partial(figure.text, family=font_families(), parse_math=False)
    write(
        (margin + 1.45) / width,
        1 - (margin + 0.05) / height,
        "\n".join((drawable(image.image_id, 60), "", size, colours, *method)),
        va="top",
        fontsize=8.5,
        color=FADED,
        linespacing=1.35,
    )
    for column, (name, token_map) in enumerate(image.maps.items()):
        left = margin + panels * column * (panel + gap)
        middle, top = (left + panel / 2) / width, 1 - (head - 0.08) / height
        write(middle, top, drawable(name, 40), ha="center", fontsize=12, fontweight="bold")
        points = 72 * panel / boxes_wh[name][0]
        for turn in range(rounds):
            bottom = height - head - title - (turn + 1) * panel_height - turn * title
            axes = figure.add_axes((left / width, bottom / height, panel / width, panel_height / height))
            _draw_map(axes, image.image, token_map, turn, points, writer)
            if cosine_maps:
                left_of_map = (left + panel + gap) / width
                beside = figure.add_axes((left_of_map, bottom / height, panel / width, panel_height / height))
                _draw_cosines(beside, token_map, turn, writer.top)
    figure.savefig(path)


class _WordWriter:
    """Write words into cells: their size by cosine on one scale for the whole image, their colour by the word."""

    def __init__(self, image: MappedImage):
        from matplotlib.font_manager import FontProperties

        self._prop = FontProperties(family=font_families(), weight="bold")  # the widest that is written
        self._widths: dict[str, float] = {}
        self._colours = colours_of_words(image)
        self.top = image.top_cosine

    def write(
        self, axes: Axes, centre_xy: tuple[float, float], word: TokenText, cosine: float, cell_points: float
    ) -> None:
        text = drawable(word.text)
        share = max(cosine, 0.0) / self.top if self.top > 0 else 0.0
        size = 0.42 * cell_points * (_SMALLEST + (1 - _SMALLEST) * share)
        size = min(size, 0.95 * cell_points / self._width(text))
        colour = self._colours[word.text.lower()] if word.english else INK
        axes.text(
            *centre_xy, text, ha="center", va="center_baseline", fontsize=size, color=colour, family=font_families(),
            fontweight="bold" if word.english else "normal", parse_math=False, clip_on=True,
        )  # fmt: skip

    def _width(self, text: str) -> float:
        """Width of a text as a multiple of its font size."""
        if text not in self._widths:
            from matplotlib.textpath import TextPath

            outline = TextPath((0, 0), text.replace("$", r"\$"), size=100, prop=self._prop).vertices
            self._widths[text] = max(1.02 * float(outline[:, 0].max()) / 100, 0.1) if len(outline) else 0.1
        return self._widths[text]


def _draw_map(
    axes: Axes, image: np.ndarray, token_map: TokenMap, turn: int, points: float, writer: _WordWriter
) -> None:
    """Draw one round over the whole image; `points` is the size of an image's pixel."""
    grid = token_map.grid
    axes.imshow(0.36 * image / 255 + 0.64, extent=(0, image.shape[1], image.shape[0], 0), interpolation="bilinear")
    axes.vlines(grid.x_edges, grid.y_edges[0], grid.y_edges[-1], color="white", linewidth=0.5, alpha=0.7)
    axes.hlines(grid.y_edges, grid.x_edges[0], grid.x_edges[-1], color="white", linewidth=0.5, alpha=0.7)
    cell_width, cell_height = _cell_wh(token_map)
    ids, cosines = (part[:, turn].tolist() for part in (token_map.pursuit.ids, token_map.pursuit.cosines))
    for cell, (word, cosine) in enumerate(zip(ids, cosines, strict=True)):
        row, column = divmod(cell, grid.cols)
        centre_xy = (grid.x_edges[column] + cell_width / 2, grid.y_edges[row] + cell_height / 2)
        writer.write(axes, centre_xy, token_map.words[word], cosine, points * min(cell_width, cell_height))
    _frame(axes, token_map, token_map.caption(turn))


def _draw_cosines(axes: Axes, token_map: TokenMap, turn: int, top: float) -> None:
    """Draw the cosines of one round, from 0 to the image's largest, as the paper's Figure 6 has them."""
    grid = token_map.grid
    cosines = token_map.pursuit.cosines[:, turn].reshape(grid.shape).numpy()
    axes.pcolormesh(grid.x_edges, grid.y_edges, cosines, cmap=HEAT_MAP, vmin=0, vmax=max(top, 1e-9))
    _frame(axes, token_map, f"cosine {cosines.min():.2f} … {cosines.max():.2f}")


def _frame(axes: Axes, token_map: TokenMap, title: str) -> None:
    """Show the image and all cells, under a title."""
    left, top, width, height = _box_around(token_map)
    bare(axes)
    axes.set(xlim=(left, left + width), ylim=(top + height, top), aspect="equal")
    axes.set_title(title, fontsize=8.5, pad=3, color=FADED)


def _box_around(token_map: TokenMap) -> tuple[float, float, float, float]:
    """Left, top, width and height of the image and all cells, which may reach beyond it, in pixels of the image."""
    (image_width, image_height), box = token_map.grid.image_wh, token_map.grid.box_xyxy_px
    left, top = min(0.0, box[0]), min(0.0, box[1])
    return left, top, max(image_width, box[2]) - left, max(image_height, box[3]) - top


def _cell_wh(token_map: TokenMap) -> tuple[float, float]:
    left, top, right, bottom = token_map.grid.box_xyxy_px
    return (right - left) / token_map.grid.cols, (bottom - top) / token_map.grid.rows
