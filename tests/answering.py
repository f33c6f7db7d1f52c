"""Servers on this machine, such as one that answers JSON with JSON as a judge or a vision-language model does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves by a handler; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def json_server(answer: Callable[[str, Any, Any], tuple[int, Any]]) -> Iterator[str]:
    """Serves what `answer` gives of path, headers and document: a status and a document; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, document = answer(self.path, self.headers, asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address


def saying(content: str) -> dict[str, Any]:
    """The document of a chat completion."""
    return {"model": "m", "choices": [{"message": {"content": content}}]}
