"""Files of records, streamed: a JSON array, JSON lines, either of them gzipped, or Parquet.

In Parquet a PAD record's own keys are columns. All other keys of a record or label are stored as JSON text in a column
`extra_json`, since their types may differ between records.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from patch_aligned.files import written_whole

Record = TypeVar("Record")

EXTRA_KEY = "extra_json"
"""Column of Parquet files with all other keys of a record or label, as the JSON text of an object."""

_LABEL_TYPE = pa.struct(
    {"tag": pa.string(), "bbox": pa.list_(pa.float64()), "rle_mask": pa.string(), EXTRA_KEY: pa.string()}
)
PAD_SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "size": pa.list_(pa.int32()),
        "caption": pa.string(),
        "labels": pa.list_(_LABEL_TYPE),
        EXTRA_KEY: pa.string(),
    }
)
"""Columns of a PAD record in Parquet and Arrow files."""

_COLUMNS_OF_A_RECORD = frozenset(PAD_SCHEMA.names)
_COLUMNS_OF_A_LABEL = frozenset(field.name for field in _LABEL_TYPE)
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SKIPPED_SUFFIX = ".skipped.jsonl"
"""Suffix of the file that lists the images without a record, with reasons, beside a merged file."""
SETTINGS_SUFFIX = ".settings.json"
"""Suffix of the file with the settings that produced a merged file."""
_RECORDS_PER_BATCH = 512
_BLANKS = " \t\r\n"  # JSON's whitespace; Python's is a larger set
_BEGINNING_BYTES = 1 << 12
_BROKEN_FILE = (EOFError, gzip.BadGzipFile, zlib.error)
_CHUNK_CHARACTERS = 1 << 22
_LONGEST_RECORD_CHARACTERS = 1 << 26


class RecordFileError(ValueError):
    """Raised for a file that is missing, of an unknown kind, or invalid as JSON or Parquet."""


def iter_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file in order.

    Raises:
        RecordFileError: names the file and the position of a syntax error.
    """
    kind = _kind_of(path)
    if not path.is_file():
        raise RecordFileError(f"{path}: found no such file; expected a file of records ({', '.join(_SUFFIXES)})")
    if kind == ".parquet":
        yield from _iter_parquet(path)
        return
    count = 0
    with _open_bytes(path, kind) as file:
        try:
            for record in _iter_json_lines(file, path) if ".jsonl" in kind else _iter_json_array(file, path):
                yield record
                count += 1
        except (*_BROKEN_FILE, UnicodeDecodeError) as error:
            raise RecordFileError(
                f"{path}: after {count} records: not a valid {kind} file: {error}. Write or copy it again."
            ) from error


def read_document(path: Path) -> Any:
    """Return the one JSON value of a file, gzipped or not.

    Raises:
        RecordFileError: names the file.
    """
    try:
        with _open_bytes(path, _kind_of(path)) as file:
            return json.loads(file.read())
    except (*_BROKEN_FILE, ValueError, RecursionError) as error:
        raise RecordFileError(
            f"{path}: found no JSON ({error}); expected annotations. Fetch the file again."
        ) from error


def beginning_of(path: Path) -> str:
    """Return the first characters of a file of text, gzipped or not, without white space before them."""
    try:
        with _open_bytes(path, _kind_of(path)) as file:
            return file.read(_BEGINNING_BYTES).decode("utf-8-sig", "replace").lstrip(_BLANKS)
    except _BROKEN_FILE as error:
        raise RecordFileError(f"{path}: cannot be read ({error}). Write or copy it again.") from error


def write_records(records: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write records atomically; returns their number. Equal records give equal bytes.

    Raises:
        RecordFileError: for an unknown suffix.
    """
    kind = _kind_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        return (_write_parquet if kind == ".parquet" else _write_json)(records, file, kind)


def _write_parquet(records: Iterable[Mapping[str, Any]], file: IO[bytes], kind: str) -> int:
    count = 0
    rows = iter(records)
    with pq.ParquetWriter(file, PAD_SCHEMA, compression="zstd") as writer:
        while chunk := list(islice(rows, _RECORDS_PER_BATCH)):
            writer.write_batch(records_to_batch(chunk))
            count += len(chunk)
    return count


def _write_json(records: Iterable[Mapping[str, Any]], file: IO[bytes], kind: str) -> int:
    is_array = ".jsonl" not in kind
    opening, between, closing = ("[\n", ",\n", "\n]\n") if is_array else ("", "\n", "\n")
    count = 0
    # No timestamp and no file name in the gzip header.
    zipped: Any = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if kind.endswith(".gz") else None
    with zipped or nullcontext(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8")
        text.write(opening)
        for record in records:
            text.write(between if count else "")
            text.write(json.dumps(record, ensure_ascii=False))
            count += 1
        text.write(closing if count or is_array else "")
        text.detach()
    return count


def with_progress(records: Iterable[Record], doing: str) -> Iterable[Record]:
    """Pass records on one by one, and show how many on standard error while it is a terminal."""
    return tqdm(records, doing, unit=" images", disable=None, leave=False)


def records_to_batch(records: Iterable[Mapping[str, Any]]) -> pa.RecordBatch:
    """Convert PAD records to one Arrow batch of `PAD_SCHEMA`."""
    rows = []
    for record in records:
        labels = [_fold_extra(label, _COLUMNS_OF_A_LABEL) for label in record["labels"]]
        rows.append({**_fold_extra(record, _COLUMNS_OF_A_RECORD), "labels": labels})
    return pa.RecordBatch.from_pylist(rows, schema=PAD_SCHEMA)


def batch_to_records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Convert an Arrow batch to records, with their additional keys restored."""
    records = batch.to_pylist()
    for record in records:
        _unfold_extra(record)
        labels = record.get("labels")
        for label in labels if isinstance(labels, list) else ():
            if isinstance(label, dict):
                _unfold_extra(label)
    return records


def _kind_of(path: Path) -> str:
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return suffix
    raise RecordFileError(f"{path}: found suffix {path.suffix!r}; expected one of {', '.join(_SUFFIXES)}")


def _open_bytes(path: Path, kind: str) -> Any:
    return gzip.open(path) if kind.endswith(".gz") else path.open("rb")


def _iter_parquet(path: Path) -> Iterator[Any]:
    count = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_RECORDS_PER_BATCH):
                try:
                    yield from batch_to_records(batch)
                except (ValueError, OverflowError):  # invalid UTF-8, a time out of range, a duplicate key
                    raise RecordFileError(f"{path}: {_unreadable_value(batch, count)}") from None
                count += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecordFileError(
            f"{path}: after {count} records: not a valid Parquet file: {error}. Write or copy it again."
        ) from error


def _unreadable_value(batch: pa.RecordBatch, first: int) -> str:
    for row in range(len(batch)):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column[row].as_py()
            except (ValueError, OverflowError) as error:
                return f"record {first + row}, field {name!r}: found a value that cannot be read ({error})"
    return f"records {first} to {first + len(batch) - 1}: found two columns of the same name"


def _iter_json_lines(file: IO[bytes], path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield json.loads(text)
        except json.JSONDecodeError as error:
            raise RecordFileError(
                f"{path}: line {number}, column {error.colno}: {error.msg}; expected one JSON object a line"
            ) from error
        except (ValueError, RecursionError) as error:  # invalid UTF-8, a number too long, or nested too deeply
            raise RecordFileError(f"{path}: line {number}: {error}; expected one JSON object a line") from error


def _iter_json_array(binary: IO[bytes], path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON array, holding only a few megabytes of text at a time."""
    file = io.TextIOWrapper(binary, encoding="utf-8-sig")
    text = file.read(_CHUNK_CHARACTERS).lstrip(_BLANKS)
    if not text.startswith("["):
        hint = " Are these JSON lines? Then name the file .jsonl." if text.startswith("{") else ""
        raise RecordFileError(f"{path}: found {text[:20]!r} at the start; expected '[', one array of records.{hint}")
    decode = json.JSONDecoder().raw_decode
    position, count = 1, 0
    while True:
        position = _skip_blanks(text, position)
        if text[position : position + 1] == "]":
            if rest := (text[position + 1 :] + file.read(100)).strip(_BLANKS):
                raise RecordFileError(f"{path}: found {rest[:20]!r} after the end of the array; expected nothing")
            return
        try:
            if count and text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
            record, end = decode(text, _skip_blanks(text, position + (1 if count else 0)))
        except json.JSONDecodeError as error:
            # Most likely the record continues beyond the text read so far.
            more = file.read(_CHUNK_CHARACTERS) if len(text) - position < _LONGEST_RECORD_CHARACTERS else ""
            if not more:
                raise RecordFileError(
                    f"{path}: record {count}: {error.msg}, at {text[error.pos : error.pos + 20]!r}. "
                    "Is the file cut off? Write or copy it again."
                ) from error
            text, position = text[position:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
            raise RecordFileError(f"{path}: record {count}: {error}") from error
        yield record
        position, count = end, count + 1


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


def _fold_extra(mapping: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    folded = {key: value for key, value in mapping.items() if key in keys}
    if extra := {key: value for key, value in mapping.items() if key not in keys}:
        folded[EXTRA_KEY] = json.dumps(extra, ensure_ascii=False)
    return folded


def _unfold_extra(mapping: dict[str, Any]) -> None:
    """Restore additional keys. An invalid `extra_json` is kept, so that validation reports it."""
    text = mapping.pop(EXTRA_KEY, None)
    if text is None:
        return
    try:
        extra = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        extra = None
    if isinstance(extra, dict) and not extra.keys() & {*mapping, EXTRA_KEY}:
        mapping.update(extra)
    else:
        mapping[EXTRA_KEY] = text


# Values of a record.

ANSWERERS = ("gpt", "assistant")
"""Who gives the answers in LLaVA's `conversations`."""


def first_answer(record: Mapping[str, Any]) -> str | None:
    """Return the first answer of a record of LLaVA's training JSON, which is its caption; None if it has none."""
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping) and turn.get("from") in ANSWERERS and isinstance(turn.get("value"), str):
            return turn["value"].strip()
    return None


LARGEST_SIDE = 1 << 20
"""Pixels: beyond any image format, and its square is far from overflowing."""
_LONGEST_QUOTE = 80
_LARGEST_NUMBER = sys.float_info.max


def is_json(value: Any) -> bool:
    """Whether JSON can express a value, and a file hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def is_text(value: Any) -> bool:
    """Whether a value is a string without lone surrogates, which JSON can express but UTF-8 files cannot hold."""
    return isinstance(value, str) and (value.isascii() or printable(value) == value)


def printable(text: str) -> str:
    """Return text with lone surrogates written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_side(number: Any) -> bool:
    """Whether a JSON value is a width or height in pixels."""
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= LARGEST_SIDE


def is_finite_number(number: Any) -> bool:
    """Whether a JSON value is a finite number: not NaN, not a boolean, and within the range of floats."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and -_LARGEST_NUMBER <= number <= _LARGEST_NUMBER


def quoted(value: Any) -> str:
    """Return a value as messages show it."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # a number too long, or a list too deep, to be printed
        return f"a {type(value).__name__} that cannot be printed"


def shortened(text: str) -> str:
    """Return text as messages show it, cut where it is long."""
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def named(items: Iterable[str], most: int = 5) -> str:
    """Return the first items as messages list them, and the number of further ones."""
    listed = list(items)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
