"""One HTML file from a body, its style and its script: it loads nothing and runs without a network."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import Any

_FRAME = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {{scripts}}">
<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body>
{{body}}
</body>
</html>
"""
_SCRIPTED = """\
<noscript><p>This page draws with JavaScript; allow it for this file. It loads nothing from anywhere.</p></noscript>
<script id="data" type="application/json">{{data}}</script>
<script>{{script}}</script>"""


def html_page(package: str, stem: str, title: str, document: Any) -> str:
    """The page whose body is `stem.html` of a package, with `stem.css`, `stem.js`, a title and data.

    Args:
        package: where the three files lie, such as `patch_aligned.analysis`.
        stem: their name.
        title: plain text; the body may repeat it as `{{title}}`.
        document: the data, as JSON can hold it; the page finds it in its element `data`.

    Raises:
        ValueError: a number of the data is not finite.
    """
    template = _FRAME.replace("{{body}}", _text(package, f"{stem}.html") + _SCRIPTED)
    script, style = _text(package, f"{stem}.js"), _text(package, f"{stem}.css")
    data = json_for_html(document)
    return _filled(template, title=title, style=style, scripts="'unsafe-inline'", script=script, data=data)


def static_page(package: str, stem: str, title: str, body: str) -> str:
    """A page without a script, with `stem.css` of a package, a title and a body.

    Args:
        package: where the style lies.
        stem: its name.
        title: plain text.
        body: HTML.
    """
    return _filled(_FRAME, title=title, style=_text(package, f"{stem}.css"), scripts="'none'", body=body)


def json_for_html(document: Any) -> str:
    """JSON that no text of the data can end early, whatever it says: no angle bracket is left in it.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _filled(template: str, *, title: str, **parts: str) -> str:
    """All places filled in one pass, so that no text that fills one is read as a place itself."""
    parts["title"] = html.escape(title)
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
