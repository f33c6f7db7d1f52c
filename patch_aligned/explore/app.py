"""The page and its questions over HTTP. Only the page itself gets an answer, no page of another origin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from patch_aligned.explore.session import MIN_COVERAGE, RULE, Session
from patch_aligned.files import validated
from patch_aligned.models.load import sources_of
from patch_aligned.web import render

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_BYTES = 20 * 2**20
"""Of an uploaded file."""
_MOST_JSON_BYTES = 2**16
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Question:
    """What a request may say, see the methods of `Session`."""

    image: str
    word: str = ""
    less: list[str] | None = None
    point: tuple[float, float] | None = None
    polygon: list[float] | None = None


def create_app(session: Session, hosts: Sequence[str]) -> Starlette:
    """Return the page's server. Browsers may call it under the names `hosts`, whatever the port, and no other."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    settings = {
        "projectors": sources_of(session.models),
        "images": 0 if session.index is None else len(session.index),
        "method": session.settings.described(),
        "word_list": session.word_list.name if session.word_list else None,
        "rule": RULE,
        "min_coverage": MIN_COVERAGE,
    }
    page = render(__package__, "explore.html.j2", title="Explore visual tokens", data=settings)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def list_images(request: Request) -> Response:
        text, start = request.query_params.get("text", ""), request.query_params.get("start", "0")
        if not start.isdecimal():
            raise ValueError(f"start: found {start[:20]!r}, expected the number of a record.")
        return JSONResponse(await run_in_threadpool(session.images, text, int(start)))

    async def upload(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.upload, await read_body(request, MOST_BYTES)))

    def post(path: str, answer: Callable[[Question], dict[str, Any]]) -> Route:
        async def endpoint(request: Request) -> Response:
            question = validated(Question, await read_body(request, _MOST_JSON_BYTES), "request")
            return JSONResponse(await run_in_threadpool(answer, question))

        return Route(path, endpoint, methods=["POST"])

    async def read_body(request: Request, most: int) -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise HTTPException(413, f"Found more than {most / 2**20:.3g} MiB, expected at most that; send less.")
        return bytes(content)

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if is_foreign(request.headers, request.url.path):
            return JSONResponse({"error": "Found a request of another page; open the address of this one."}, 403)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    def refuse(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404 if isinstance(error, FileNotFoundError) else 400)
        return JSONResponse({"error": str(getattr(error, "detail", error))}, status)

    routes = [
        Route("/", show_page),
        Route("/images", list_images),
        Route("/upload", upload, methods=["POST"]),
        post("/image", lambda asked: session.picture(asked.image)),
        post("/words", lambda asked: session.words(asked.image)),
        post("/region", lambda asked: session.region(asked.image, asked.point, asked.polygon)),
        post("/heat", lambda asked: session.heat(asked.image, asked.word, asked.less)),
    ]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(BaseHTTPMiddleware, dispatch=guard),
    ]
    refused = dict.fromkeys((ValueError, OSError, HTTPException), refuse)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=refused)


def is_foreign(headers: Any, path: str) -> bool:
    """Whether another page sent a request. Its links may lead to the page, of which it can then read nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    is_other = origin is not None and urlsplit(origin).netloc != headers.get("host")
    return is_other or (site not in ("same-origin", "none") and path != "/")
