"""A page that a command serves on this machine. Only the page itself gets answers, no page of another origin."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

_MOST_JSON_BYTES = 2**16
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


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

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
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


def post(path: str, kind: Any, answer: Callable[[Any], dict[str, Any]]) -> Route:
    """Return a route that answers JSON of a type, such as a dataclass, with JSON."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from patch_aligned.files import validated

    async def endpoint(request: Request) -> Response:
        question = validated(kind, await read_body(request, _MOST_JSON_BYTES), "request")
        return JSONResponse(await run_in_threadpool(answer, question))

    return Route(path, endpoint, methods=["POST"])


async def read_body(request: Request, most: int) -> bytes:
    """Return a request's body, of at most so many bytes."""
    from starlette.exceptions import HTTPException

    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise HTTPException(413, f"Found more than {most / 2**20:.3g} MiB, expected at most that; send less.")
    return bytes(content)


def is_foreign(headers: Any, path: str) -> bool:
    """Whether another page sent a request. Its links may lead to the page, of which it can then read nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    is_other = origin is not None and urlsplit(origin).netloc != headers.get("host")
    return is_other or (site not in ("same-origin", "none") and path != "/")


def require_server() -> None:
    """Raise `ImportError` where the packages that serve pages are not installed."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"The page needs {' and '.join(missing)}: pip install 'patch-aligned-llava[explore]'.")


def listen(host: str, port: int) -> socket.socket:
    """Take a port, before anything is loaded."""
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
