"""Large JSON files, one record at a time: arrays and lines alike, without holding the file in memory."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

_CHARACTERS_AT_ONCE = 1 << 22
_SPACE = re.compile(r"\s*")


class InvalidJsonError(ValueError):
    """Text that is not JSON; the message names the file and the place."""


def read_json_values(source: Path) -> Iterator[tuple[str, Any]]:
    """Values of a JSON array or of JSON lines, each as its own text and parsed; `.gz` is unpacked.

    Raises:
        InvalidJsonError: at the first value that does not parse, and at the end of an array that is not closed.
    """
    with _open_text(source) as file:
        text = _Text(file)
        in_array = text.skip("[")
        number = 0
        while not (in_array and text.skip("]")):
            if text.at_end():
                if in_array:
                    raise InvalidJsonError(
                        f"{source}: found the end after {number} records, expected ']'; fetch it anew"
                    )
                return
            try:
                value = text.decode()
            except json.JSONDecodeError as error:
                raise InvalidJsonError(
                    f"{source}, record {number}: found invalid JSON ({error}), expected an object; correct the file or "
                    "fetch it anew"
                ) from None
            yield value
            if in_array and not text.skip(",") and not text.follows("]"):
                raise InvalidJsonError(
                    f"{source}, after record {number}: found {text.ahead()!r}, expected ',' or ']'; correct it or "
                    "fetch it anew"
                )
            number += 1
        if not text.at_end():
            raise InvalidJsonError(
                f"{source}: found {text.ahead()!r} after the closing ']', expected the end; correct it"
            )


def _open_text(source: Path) -> IO[str]:
    if source.suffix == ".gz":
        return cast("IO[str]", gzip.open(source, "rt", encoding="utf-8-sig", newline=""))
    return source.open(encoding="utf-8-sig", newline="")


class _Text:
    """A text file read piece by piece; whitespace between JSON values is skipped."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.buffer = ""
        self.position = 0
        self.exhausted = False
        self.decoder = json.JSONDecoder()

    def at_end(self) -> bool:
        return not self.ahead()

    def follows(self, mark: str) -> bool:
        return self.ahead().startswith(mark)

    def skip(self, mark: str) -> bool:
        """Passes over `mark` if it comes next, and says whether it did."""
        if found := self.follows(mark):
            self.position += len(mark)
        return found

    def ahead(self) -> str:
        """The next few characters that are not whitespace; empty at the end of the file."""
        while True:
            self.position = _SPACE.match(self.buffer, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.buffer) or self.exhausted:
                return self.buffer[self.position : self.position + 20]
            self._read()

    def decode(self) -> tuple[str, Any]:
        """The next value, as text and parsed."""
        while True:
            start = self.position
            try:
                value, end = self.decoder.raw_decode(self.buffer, start)
            except json.JSONDecodeError:
                if self.exhausted:
                    raise
            else:
                if end < len(self.buffer) or self.exhausted:
                    self.position = end
                    return self.buffer[start:end], value
            self._read()

    def _read(self) -> None:
        kept = self.buffer[self.position :]
        # A long record is met with ever larger pieces, so that it is not decoded in vain too often.
        piece = self.file.read(max(_CHARACTERS_AT_ONCE, len(kept)))
        self.exhausted = not piece
        self.buffer, self.position = kept + piece, 0
