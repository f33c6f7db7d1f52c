"""The page's questions over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patch_aligned.explore.session import MIN_COVERAGE, RULE, Session
from patch_aligned.files import validated
from patch_aligned.models.load import sources_of
from patch_aligned.web import post, render, serve_page

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MOST_BYTES = 20 * 2**20
"""Of an uploaded file."""


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
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
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

    async def list_images(request: Request) -> Response:
        text, start = request.query_params.get("text", ""), request.query_params.get("start", "0")
        if not start.isdecimal():
            raise ValueError(f"start: found {start[:20]!r}, expected the number of a record.")
        return JSONResponse(await run_in_threadpool(session.images, text, int(start)))

    def ask(path: str, answer: Callable[[Question], dict[str, Any]]) -> Route:
        return post(path, lambda content: answer(validated(Question, content, "request")))

    routes = [
        Route("/images", list_images),
        post("/upload", session.upload, MOST_BYTES),
        ask("/image", lambda asked: session.picture(asked.image)),
        ask("/words", lambda asked: session.words(asked.image)),
        ask("/region", lambda asked: session.region(asked.image, asked.point, asked.polygon)),
        ask("/heat", lambda asked: session.heat(asked.image, asked.word, asked.less)),
    ]
    return serve_page(page, routes, hosts)
