"""A token map as a drawing inside a page, which needs neither a script nor matplotlib."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping

from patch_aligned.analysis.token_map import TokenMap, map_caption

_CELL = 100
_SMALLEST = 0.4  # size of a word at cosine 0, as a share of the size at the image's largest cosine
_INK = "#212529"


def token_map_svg(
    token_map: TokenMap, round_index: int, picture: str, colours: Mapping[str, str], top_cosine: float, name: str
) -> str:
    """One round of a token map, over the paled picture.

    Args:
        token_map: the words.
        round_index: which of its rounds.
        picture: id of an `image` element of the page, of `grid` cells' size; see `picture_svg`.
        colours: of English words, see `colours_of_words`.
        top_cosine: cosine whose words are the largest.
        name: of the projector.
    """
    rows, columns = token_map.grid
    words = []
    pursuit = token_map.pursuit
    pairs = zip(pursuit.ids[:, round_index].tolist(), pursuit.cosines[:, round_index].tolist(), strict=True)
    for place, (token_id, cosine) in enumerate(pairs):
        word = token_map.words[token_id]
        share = max(cosine, 0.0) / top_cosine if top_cosine > 0 else 0.0
        size = min(0.42 * _CELL * (_SMALLEST + (1 - _SMALLEST) * share), 0.94 * _CELL / _width(word.token.text))
        x, y = (place % columns + 0.5) * _CELL, (place // columns + 0.5) * _CELL
        style = f' fill="{colours[word.token.text.lower()]}" font-weight="600"' if word.english else ""
        words.append(f'<text x="{x:g}" y="{y:g}" font-size="{size:.0f}"{style}>{html.escape(word.token.text)}</text>')
    lines = [f"M{edge * _CELL} 0v{rows * _CELL}" for edge in range(1, columns)]
    lines += [f"M0 {edge * _CELL}h{columns * _CELL}" for edge in range(1, rows)]
    label = html.escape(f"{name}, {map_caption(token_map, round_index)}")
    return (
        f'<svg class="words" viewBox="0 0 {columns * _CELL} {rows * _CELL}" role="img" aria-label="{label}" '
        f'style="min-width:{22 * columns}px">'
        f'<use href="#{picture}" transform="scale({columns * _CELL} {rows * _CELL})"/>'
        f'<path d="{"".join(lines)}" stroke="#fff" stroke-opacity=".7"/>'
        f'<g fill="{_INK}" text-anchor="middle" dominant-baseline="central">{"".join(words)}</g></svg>'
    )


def picture_svg(picture: str, data_uri: str) -> str:
    """Holds a paled picture of side 1 under an id, for all maps of an image to use."""
    return (
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
        f'<g id="{picture}"><rect width="1" height="1" fill="#fff"/>'
        f'<image href="{data_uri}" width="1" height="1" opacity=".36" preserveAspectRatio="none"/></g></defs></svg>'
    )


def _width(text: str) -> float:
    """Width of a text in bold type as a multiple of its size, rather too wide than too narrow."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    broad = sum(character in "mwMW@%" for character in text)
    narrow = sum(character in "iljtfrI.,:;'|!()[]" for character in text)
    return max(1.05 * wide + 0.95 * broad + 0.42 * narrow + 0.66 * (len(text) - wide - broad - narrow), 0.1)
