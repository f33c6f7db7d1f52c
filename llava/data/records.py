"""Training records, cached as memory-mapped Arrow and checked before training starts.

A data file is a JSON array, JSON lines (both optionally gzipped) or Parquet. Two kinds of records are supported:

- LLaVA's: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, ...], ...}`. `image` is a path
  in the image folder, a list of paths, or absent. The key `images` of other trainers is read likewise.
- annotated images, for stage 1: `{"image_id", "caption", ...}` without `conversations`. They are read as an image and
  its caption.

An image without conversation, or without any answer, is of use only to a plugin whose losses need no text.

Other keys are preserved, and available to plugins.

A file is converted once to an Arrow table in Hugging Face's cache folder. The cache key is the file's path, size and
modification time. Rows store each record's JSON as text. So records use no Python heap, workers share the table's
pages, and half a million records open almost instantly.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from llava.constants import DEFAULT_IMAGE_TOKEN

_CHARACTERS_AT_ONCE = 1 << 16
_DECODER = json.JSONDecoder()
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # what is left of an emoji that was cut in two


class RecordError(ValueError):
    """Raised for a record that cannot be used. The message names file, record, field, found and expected."""


def read_json_values(source: Path) -> Iterator[tuple[str, Any]]:
    """Stream the values of a JSON array or JSON lines, optionally gzipped, as (text, parsed value)."""
    with _open_text(source) as file:
        text = _Text(file)
        in_array = text.skip("[")
        number = 0
        while not (in_array and text.skip("]")):
            if not text.ahead():
                if in_array:
                    raise RecordError(
                        f"{source}: found the end after {number} records, expected ']'; download it again"
                    )
                return
            try:
                value = text.decode()
            except json.JSONDecodeError as error:
                raise RecordError(
                    f"{source}, record {number}: found invalid JSON ({error}), expected an object; correct the file or "
                    "download it again"
                ) from None
            yield value
            if in_array and not text.skip(",") and not text.ahead().startswith("]"):
                raise RecordError(
                    f"{source}, after record {number}: found {text.ahead()!r}, expected ',' or ']'; correct it or "
                    "download it again"
                )
            number += 1
        if text.ahead():
            raise RecordError(f"{source}: found {text.ahead()!r} after the closing ']', expected the end; correct it")


def _open_text(source: Path) -> IO[str]:
    if source.suffix.lower() == ".gz":
        return cast("IO[str]", gzip.open(source, "rt", encoding="utf-8-sig", newline=""))
    return source.open(encoding="utf-8-sig", newline="")


class _Text:
    """A text file read in pieces, without the white space between JSON values."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.buffer = ""
        self.exhausted = False

    def ahead(self) -> str:
        """Peek at the next few characters; empty at the end of the file."""
        while not (self.buffer or self.exhausted):
            self._read()
        return self.buffer[:20]

    def skip(self, mark: str) -> bool:
        """Consume `mark` if it comes next. Returns whether it did."""
        if found := self.ahead().startswith(mark):
            self.buffer = self.buffer[len(mark) :].lstrip()
        return found

    def decode(self) -> tuple[str, Any]:
        """Consume the next value. Returns its text and the parsed value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer)
            except json.JSONDecodeError:
                if self.exhausted:
                    raise
            else:
                if end < len(self.buffer) or self.exhausted:
                    text, self.buffer = self.buffer[:end], self.buffer[end:].lstrip()
                    return text, value
            self._read()

    def _read(self) -> None:
        # Read ever larger pieces for a long record, so that it is not decoded too often.
        piece = self.file.read(max(_CHARACTERS_AT_ONCE, len(self.buffer)))
        self.exhausted = not piece
        self.buffer = (self.buffer + piece).lstrip()


logger = logging.getLogger(__name__)

_FORMAT = 4
"""Part of the cache key; increase it when the content of the tables changes."""

_SCHEMA = pa.schema(
    [
        ("record", pa.large_string()),  # JSON text
        ("sample_id", pa.large_string()),
        ("words", pa.int32()),  # of all turns, separated by whitespace
        ("has_image", pa.bool_()),
        ("images", pa.list_(pa.large_string())),  # paths in the image folder
        ("pattern", pa.string()),  # a letter a turn, `h` or `g`, for who speaks; a capital has an `<image>`
        ("problem", pa.large_string()),  # why the record cannot be trained on, or null
        ("is_textless", pa.bool_()),  # an image without any answer, which a plugin's losses may train
    ]
)
_ROWS_AT_ONCE = 4096


def as_conversation(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record to LLaVA's form, preserving its keys. An annotated image becomes `<image>` and its caption.

    The list `images` of other trainers is read as `image`.
    """
    images = record.get("images")
    if images and "image" not in record:
        record = {**record, "image": images[0] if isinstance(images, list) and len(images) == 1 else images}
    if "conversations" in record or "image_id" not in record or "caption" not in record:
        return dict(record)
    turns = [{"from": "human", "value": DEFAULT_IMAGE_TOKEN}, {"from": "gpt", "value": record["caption"]}]
    return {"id": record["image_id"], "image": record["image_id"], **record, "conversations": turns}


def image_names(record: Mapping[str, Any]) -> list[str]:
    """Return the paths of a record's images inside the image folder; empty for a text record."""
    images = record.get("image")
    if images is None:
        return []
    return [images] if isinstance(images, str) else list(images)


def find_problem(record: Any) -> str | None:
    """Return why a record cannot be trained on in any template, or None.

    A text record may contain `<image>` (a web page's source does). It lacks an image only if the first question begins
    or ends with `<image>`, as LLaVA's do.
    """
    if not isinstance(record, Mapping):
        return f"found {type(record).__name__}, expected an object"
    images = record.get("image")
    if images is not None and not (isinstance(images, str) and images) and not _is_list_of(images, str):
        return (
            f"field image: found {_shortened(images)}, expected a path or a list of paths below --image_folder; "
            "save images that stand in the data file as files there"
        )
    for name in image_names(record):
        if ".." in Path(name).parts:
            return f"field image: found {name!r}, expected a path inside --image_folder, without '..'"
    turns: Any = record.get("conversations")
    if not _is_list_of(turns, Mapping):
        return f"field conversations: found {_shortened(turns)}, expected a list of turns"
    for number, turn in enumerate(turns):
        if turn.get("from") not in ("human", "gpt"):
            return f"field conversations[{number}].from: found {turn.get('from')!r}, expected 'human' or 'gpt'"
        if not isinstance(turn.get("value"), str):
            return f"field conversations[{number}].value: found {_shortened(turn.get('value'))}, expected text"
    for text in (*image_names(record), *(turn["value"] for turn in turns)):
        if not text.isascii() and (half := _LONE_SURROGATE.search(text)):
            return (
                f"found half a character ({half.group()!r}) in {_shortened(text)}, expected text in Unicode; correct it"
            )
    expected = len(image_names(record))
    found = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    first = turns[0]["value"].strip()
    if not expected and not (first.startswith(DEFAULT_IMAGE_TOKEN) or first.endswith(DEFAULT_IMAGE_TOKEN)):
        return None
    if found != expected:
        key = "images" if "images" in record else "image"
        wanted = f"{expected}, as field {key} names images"
        return f"field conversations: found {found} {DEFAULT_IMAGE_TOKEN}, expected {wanted}"
    return None


class RecordTable:
    """Memory-mapped sequence of a data file's records, as dicts in LLaVA's form, in the Arrow file `path`.

    Cheap to pickle: each worker opens the table itself.
    """

    def __init__(self, source: Path, path: Path) -> None:
        self.source = source
        self.path = path
        self._table: pa.Table | None = None

    @property
    def table(self) -> pa.Table:
        """The memory-mapped Arrow table."""
        if self._table is None:
            self._table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "path": self.path, "_table": None}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return as_conversation(json.loads(self.table["record"][row].as_py()))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def sample_id(self, row: int) -> str:
        """Return the record's `id`, else its image, else its number."""
        return self.table["sample_id"][row].as_py()

    def where(self, row: int) -> str:
        """Describe a record by file, zero-based number and id, for error messages."""
        return f"{self.source}, record {row} (id {self.sample_id(row)!r})"

    def problems(self) -> dict[int, str]:
        """Return the problems found by `find_problem`, by row."""
        column = self.table["problem"]
        rows = np.flatnonzero(np.asarray(column.is_valid()))
        return {int(row): column[int(row)].as_py() for row in rows}

    def is_textless(self) -> np.ndarray:
        """Return which records are an image without any answer: bool `[rows]`."""
        return self.table["is_textless"].to_numpy()

    def words(self) -> np.ndarray:
        """Return the number of words of each record: int32 `[rows]`."""
        return self.table["words"].to_numpy()

    def has_image(self) -> np.ndarray:
        """Return which records have an image: bool `[rows]`."""
        return self.table["has_image"].to_numpy()


def open_records(data_path: str | Path, cache_dir: str | Path | None = None) -> RecordTable:
    """Open a data file, and convert it first if `cache_dir` (default: `llava_records` in `HF_HOME`) has no table of it.

    If several ranks or jobs start at the same time, one converts and the others wait. Raises `RecordError` for a file
    that cannot be parsed or has no records; `RecordTable.problems` lists those that parse but cannot be trained on.
    """
    source = Path(data_path)
    if not source.is_file():
        raise FileNotFoundError(
            f"{source}: no such data file, expected JSON, JSON lines (also .gz) or Parquet; check --data_path"
        )
    folder = Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "llava_records"
    folder.mkdir(parents=True, exist_ok=True)
    status = source.stat()
    key = f"{_FORMAT}|{source.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    path = folder / f"{source.name.split('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    if not path.exists():
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _convert(source, path)
    return RecordTable(source, path)


def _convert(source: Path, path: Path) -> None:
    logger.info("%s: converting to %s (done once)", source, path)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    rows = 0
    try:
        texts = _parquet_texts(source) if source.suffix.lower() == ".parquet" else read_json_values(source)
        described = (_describe(text, record, number) for number, (text, record) in enumerate(texts))
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            while batch := list(islice(described, _ROWS_AT_ONCE)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
                rows += len(batch)
        if not rows:
            raise RecordError(f"{source}: found no records, expected at least one; check --data_path")
        unfinished.replace(path)
    except (pa.ArrowException, UnicodeError, EOFError, OverflowError, gzip.BadGzipFile, zlib.error) as error:
        raise RecordError(f"{source}, after record {rows}: cannot be read ({error}); download it again") from error
    finally:
        unfinished.unlink(missing_ok=True)
    logger.info("%s: %d records", source, rows)


def _describe(text: str, parsed: Any, number: int) -> dict[str, Any]:
    record = as_conversation(parsed) if isinstance(parsed, Mapping) else {}
    problem = find_problem(record if isinstance(parsed, Mapping) else parsed)
    names = image_names(record) if problem is None else []
    identity = record.get("id", record.get("image"))
    return {
        "record": text,
        "sample_id": f"record-{number}" if identity is None else _printable(str(identity)),
        "words": 0 if problem else sum(len(turn["value"].split()) for turn in record["conversations"]),
        "has_image": bool(names),
        "images": names,
        "pattern": None if problem else "".join(_letter(turn) for turn in record["conversations"]),
        "problem": problem,
        "is_textless": isinstance(parsed, Mapping) and _is_textless(record),
    }


def _letter(turn: Mapping[str, Any]) -> str:
    letter = turn["from"][0]
    return letter.upper() if DEFAULT_IMAGE_TOKEN in turn["value"] else letter


def turns_of_pattern(pattern: str) -> list[dict[str, str]]:
    """Return turns that a value of the column `pattern` describes, with a word for their text."""
    speakers = {"h": "human", "g": "gpt"}
    return [
        {"from": speakers[letter.lower()], "value": DEFAULT_IMAGE_TOKEN if letter.isupper() else "text"}
        for letter in pattern
    ]


def _is_textless(record: Mapping[str, Any]) -> bool:
    if not record.get("conversations"):
        record = {**record, "conversations": [{"from": "human", "value": DEFAULT_IMAGE_TOKEN}]}
    if find_problem(record) is not None or not image_names(record):
        return False
    return not any(turn["from"] == "gpt" and turn["value"].strip() for turn in record["conversations"])


def _parquet_texts(source: Path) -> Iterator[tuple[str, Any]]:
    for batch in pq.ParquetFile(source).iter_batches(batch_size=_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            record = {key: value for key, value in row.items() if value is not None}
            yield json.dumps(record, ensure_ascii=False, default=_text_of), record


def _text_of(value: Any) -> str:
    """Text for what JSON has no value for: dates, decimals; of bytes, which may be a picture, the number alone."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
