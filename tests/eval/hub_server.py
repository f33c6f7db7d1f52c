"""A hub on this machine, for tests: serves folders as data sets, as huggingface_hub and datasets ask for them."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.answering import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = ".gated"  # a file of this name in a data set closes it


class _Hub(BaseHTTPRequestHandler):
    root: Path

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _, _, repository, _ = self._parts()
        paths = [asked["paths"]] if isinstance(asked["paths"], str) else asked["paths"]
        listed = [self._entry(self.root / repository, path) for path in paths]
        self._send_json([entry for entry in listed if entry is not None])

    def _parts(self) -> tuple[str, str, str, str]:
        """Area (`api` or `files`), what is asked, name of the data set, and the rest of the path."""
        words = self.path.partition("?")[0].strip("/").split("/")
        if words[0] == "api":
            return "api", words[4] if len(words) > 4 else "", "/".join(words[2:4]), "/".join(words[6:])
        return "files", words[3], "/".join(words[1:3]), "/".join(words[5:])

    def _answer(self) -> None:
        area, asked, repository, rest = self._parts()
        folder = self.root / repository
        if area == "files" and (folder / GATED).exists():
            self._refuse(403, "GatedRepo")
        elif not folder.is_dir():
            self._refuse(404, "RepoNotFound")
        elif area == "files":
            self._send_file(folder / rest)
        elif asked == "tree":
            files = sorted(path for path in (folder / rest).rglob("*"))
            self._send_json([self._entry(folder, path.relative_to(folder).as_posix()) for path in files])
        else:
            self._send_json({"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": []})

    def _entry(self, folder: Path, name: str) -> dict[str, Any] | None:
        path = folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0", "size": 0}
        if not path.is_file():
            return None
        digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        return {"type": "file", "path": name, "oid": "0", "size": size,
                "lfs": {"oid": digest, "size": size, "pointerSize": 1}}  # fmt: skip

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self._send(content)

    def _send_json(self, document: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(document).encode())

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self._send(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


def serve(root: Path) -> AbstractContextManager[str]:
    """Serves `root/<owner>/<name>` as data sets; gives the address."""
    return serving(type("Hub", (_Hub,), {"root": root}))
