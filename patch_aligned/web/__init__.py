"""HTML pages of one file: Jinja2 templates with autoescape, and styles, scripts and data inlined. Nothing is loaded."""

from __future__ import annotations

import base64
import io
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from PIL import Image

    from patch_aligned.cells import TokenGrid


def render(package: str, template: str, **values: Any) -> str:
    """Render a template of a package. It may extend `page.html.j2` or `app.html.j2`, and include what lies beside them.

    In a template, `inline("x.css")` is the text of a file of the package or of this one, and `breakable` a filter for
    long names and paths.

    Raises:
        ValueError: a number of the data is not finite.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader(__name__, "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}  # keys keep their order
    environment.filters["breakable"] = breakable

    def inline(name: str) -> Markup:
        files = [resources.files(place).joinpath(name) for place in (package, __name__)]
        return Markup(next(file for file in files if file.is_file()).read_text(encoding="utf-8"))

    environment.globals["inline"] = inline
    return environment


def breakable(text: str) -> Markup:
    """Text for HTML in which lines may break after underscores and slashes of long names and paths."""
    return Markup(escape(text).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>")))


def jpeg_address(picture: bytes | Image.Image, quality: int = 85) -> str:
    """Return the `data:` address of a JPEG, or of an image that is saved as one."""
    if not isinstance(picture, bytes):
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality)
        picture = content.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def grid_edges(grid: TokenGrid, digits: int = 4) -> dict[str, list[float]]:
    """Return a grid as `grid.js` takes it: the edges of its columns and rows, in pixels of the image."""
    return {name: [round(edge, digits) for edge in getattr(grid, name)] for name in ("x_edges", "y_edges")}
