"""HTML pages of one file: Jinja2 templates with autoescape, and styles, scripts and data inlined. Nothing is loaded.

A page may have a server on this machine, which answers that page alone, and no page of another origin.
"""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources, util
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from PIL import Image
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from patch_aligned.cells import TokenGrid

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


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


def serve_page(page: str, routes: Sequence[Route], hosts: Sequence[str]) -> Starlette:
    """Return the server of a page. Browsers may call it under the names `hosts`, whatever the port, and no other."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def guard(request: Request, call_next: Callable[[Request], Any]) -> Response:
        if is_foreign(request.headers, request.url.path):
            return JSONResponse({"error": "Found a request of another page; open the address of this one."}, 403)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    def refuse(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404 if isinstance(error, FileNotFoundError) else 400)
        return JSONResponse({"error": str(getattr(error, "detail", error))}, status)

    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(BaseHTTPMiddleware, dispatch=guard),
    ]
    refused = dict.fromkeys((ValueError, OSError, HTTPException), refuse)
    return Starlette(routes=[Route("/", show_page), *routes], middleware=middleware, exception_handlers=refused)


def post(path: str, answer: Callable[[bytes], Any], most_bytes: int = 2**16) -> Route:
    """Return a route that answers content of so many bytes at most with JSON, in a thread."""
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def endpoint(request: Request) -> Response:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most_bytes:
                raise HTTPException(413, f"Found more than {most_bytes / 2**20:.3g} MiB, expected at most that.")
        return JSONResponse(await run_in_threadpool(answer, bytes(content)))

    return Route(path, endpoint, methods=["POST"])


def is_foreign(headers: Any, path: str) -> bool:
    """Whether another page sent a request. Its links may lead to the page, of which it can then read nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    is_other = origin is not None and urlsplit(origin).netloc != headers.get("host")
    return is_other or (site not in ("same-origin", "none") and path != "/")


def listen(host: str, port: int) -> socket.socket:
    """Take a port for the server of a page, before anything is loaded."""
    if missing := [name for name in ("starlette", "uvicorn") if util.find_spec(name) is None]:
        raise ImportError(f"The page needs {' and '.join(missing)}: pip install 'patch-aligned-llava[explore]'.")
    if host in ("", "0.0.0.0", "::"):  # then the Host header could be anything
        raise ValueError(f"--host {host}: expected one address or name, which browsers use. See docs/explore.md.")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        message = f"--host {host} --port {port}: cannot listen there ({error}). --port 0 takes a free port."
        raise OSError(message) from error


def run_server(application: Starlette, listener: socket.socket) -> None:
    """Answer until Ctrl-C."""
    import uvicorn

    uvicorn.Server(uvicorn.Config(application, log_level="warning", server_header=False)).run(sockets=[listener])
