"""Token maps as a picture, as in the paper's Figures 5 and 6: one row a round, one column a projector."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patch_aligned.analysis.figure_parts import bare, drawable, font_families
from patch_aligned.analysis.token_map import MappedImage, TokenMap, TokenMaps, colours_of_words, map_caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FADED = "#212529", "#495057"
_SMALLEST = 0.4  # size of a word at cosine 0, as a share of the size at the figure's largest cosine


def save_token_map_figures(
    maps: TokenMaps, folder: Path, on_images: Callable[[int, int], None] = lambda done, total: None, prefix: str = ""
) -> list[Path]:
    """Draws each image into a PNG of its own, `<prefix>001_<image>.png` and so on, and returns the paths."""
    written = []
    for number, image in enumerate(maps.images, start=1):
        path = folder / f"{prefix}{number:03}_{re.sub(r'[^A-Za-z0-9._-]', '_', Path(image.image_id).stem)}.png"
        save_token_map_figure(image, path, f"words found by {maps.settings.described()}", maps.word_list is not None)
        written.append(path)
        on_images(number, len(maps.images))
    return written


def save_token_map_figure(image: MappedImage, path: Path, caption: str, has_word_list: bool) -> None:
    """Draws all maps of an image and saves them as a picture of the kind that the suffix names.

    Args:
        image: with the maps of at least one projector, all of the same number of rounds.
        path: where the picture goes.
        caption: how the words were found, for the header.
        has_word_list: whether colours tell English words.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Token maps as PNG need matplotlib: pip install 'patch-aligned-llava[analysis]'.") from error

    names = list(image.maps)
    rounds = image.maps[names[0]].pursuit.ids.shape[1]
    most_columns = max(token_map.grid[1] for token_map in image.maps.values())
    panel = min(max(4.2, 0.4 * most_columns), 12.0)  # inches
    gap, title, head, margin = 0.15, 0.3, 2.0, 0.2
    width = max(len(names) * (panel + gap) - gap + 2 * margin, 7.0)
    height = head + rounds * (panel + title) + margin
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    writer = _WordWriter(image, has_word_list)

    thumbnail = figure.add_axes((margin / width, 1 - (margin + 1.25) / height, 1.25 / width, 1.25 / height))
    bare(thumbnail)
    thumbnail.imshow(image.pictures[names[0]].numpy().transpose(1, 2, 0))
    colours = (
        "English words are coloured, one colour a word; all other tokens are black."
        if has_word_list
        else "No English word list is installed, so all words have one colour."
    )
    size = f"The larger a word, the larger its cosine with what is left of the token (largest here: {writer.top:.2f})."
    figure.text(
        (margin + 1.45) / width,
        1 - (margin + 0.05) / height,
        "\n".join((drawable(image.image_id, 60), "", size, colours, *_wrapped(caption))),
        va="top",
        fontsize=8.5,
        color=FADED,
        family=font_families(),
        linespacing=1.35,
        parse_math=False,
    )
    for column, name in enumerate(names):
        token_map = image.maps[name]
        left = margin + column * (panel + gap)
        figure.text(
            (left + panel / 2) / width,
            1 - (head - 0.08) / height,
            drawable(name, 40),
            ha="center",
            fontsize=12,
            fontweight="bold",
            family=font_families(),
            parse_math=False,
        )
        for turn in range(rounds):
            bottom = height - head - title - (turn + 1) * panel - turn * title
            axes = figure.add_axes((left / width, bottom / height, panel / width, panel / height))
            _draw_map(axes, image.pictures[name], token_map, turn, panel, writer)
    figure.savefig(path)


class _WordWriter:
    """Writes words into cells: their size by cosine on one scale for the whole figure, their colour by the word."""

    def __init__(self, image: MappedImage, has_word_list: bool):
        from matplotlib.font_manager import FontProperties

        self._prop = FontProperties(family=font_families(), weight="bold")  # the widest that is written
        self._widths: dict[str, float] = {}
        self._colours = colours_of_words(image)
        self.top = image.top_cosine

    def write(self, axes: Axes, place_xy: tuple[float, float], word: Any, cosine: float, cell_points: float) -> None:
        text = drawable(word.token.text)
        share = max(cosine, 0.0) / self.top if self.top > 0 else 0.0
        size = 0.42 * cell_points * (_SMALLEST + (1 - _SMALLEST) * share)
        size = min(size, 0.95 * cell_points / self._width(text))
        colour = self._colours.get(word.token.text.lower(), INK) if word.english else INK
        axes.text(
            *place_xy, text, ha="center", va="center_baseline", fontsize=size, color=colour, family=font_families(),
            fontweight="bold" if word.english else "normal", parse_math=False, clip_on=True,
        )  # fmt: skip

    def _width(self, text: str) -> float:
        """Width of a text as a multiple of its font size."""
        if text not in self._widths:
            from matplotlib.textpath import TextPath

            outline = TextPath((0, 0), text.replace("$", r"\$"), size=100, prop=self._prop).vertices
            self._widths[text] = max(1.02 * float(outline[:, 0].max()) / 100, 0.1) if len(outline) else 0.1
        return self._widths[text]


def _draw_map(axes: Axes, picture: Tensor, token_map: TokenMap, turn: int, panel: float, writer: _WordWriter) -> None:
    rows, columns = token_map.grid
    bare(axes)
    washed = 0.36 * picture.numpy().transpose(1, 2, 0) + 0.64  # [3, side, side] -> [side, side, 3]
    axes.imshow(washed, extent=(0, columns, rows, 0), aspect="auto", interpolation="bilinear")
    for edge in range(1, columns):
        axes.axvline(edge, color="white", linewidth=0.5, alpha=0.7)
    for edge in range(1, rows):
        axes.axhline(edge, color="white", linewidth=0.5, alpha=0.7)
    cell_points = 72 * panel / columns
    pairs = zip(token_map.pursuit.ids[:, turn].tolist(), token_map.pursuit.cosines[:, turn].tolist(), strict=True)
    for place, (word, cosine) in enumerate(pairs):
        middle = (place % columns + 0.5, place // columns + 0.5)
        writer.write(axes, middle, token_map.words[word], cosine, cell_points)
    axes.set_title(map_caption(token_map, turn), fontsize=8.5, pad=3, color=FADED)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text[:1].upper() + text[1:] + ".", 90)
