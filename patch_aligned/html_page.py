"""One HTML file from a template and its style: it loads nothing and runs without a network."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import Any


def html_page(package: str, stem: str, title: str, document: Any) -> str:
    """The page `stem.html` of a package, with `stem.css`, `stem.js`, a title and data put into their places.

    Args:
        package: where the three files lie, such as `patch_aligned.analysis`.
        stem: their name.
        title: plain text.
        document: the data, as JSON can hold it; the page finds it in its element `data`.

    Raises:
        ValueError: a number of the data is not finite.
    """
    script = resources.files(package).joinpath(f"{stem}.js").read_text(encoding="utf-8")
    return _filled(package, stem, title, {"script": script, "data": json_for_html(document)})


def static_page(package: str, stem: str, title: str, body: str) -> str:
    """The page `stem.html` of a package, with `stem.css`, a title and its body put into their places: no script.

    Args:
        package: where the two files lie.
        stem: their name.
        title: plain text.
        body: HTML.
    """
    return _filled(package, stem, title, {"body": body})


def json_for_html(document: Any) -> str:
    """JSON that no text of the data can end early, whatever it says: no angle bracket is left in it.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _filled(package: str, stem: str, title: str, contents: dict[str, str]) -> str:
    folder = resources.files(package)
    style = folder.joinpath(f"{stem}.css").read_text(encoding="utf-8")
    parts = {"title": html.escape(title), "style": style, **contents}
    template = folder.joinpath(f"{stem}.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
