"""Files of records (JSON objects): JSON array, JSON lines, gzip of either, Parquet. Streamed, so of any size.

In Parquet a PAD record's own keys are columns; all further keys of a record or label travel as JSON text in a column
`extra_json`, since their types may differ from record to record.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from patch_aligned.whole_files import written_whole

EXTRA_KEY = "extra_json"
"""Column of Parquet files that holds all further keys of a record or label, as JSON text of an object."""

_LABEL_TYPE = pa.struct(
    [
        ("tag", pa.string()),
        ("bbox", pa.list_(pa.float64())),
        ("rle_mask", pa.string()),
        (EXTRA_KEY, pa.string()),
    ]
)
PAD_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("size", pa.list_(pa.int32())),
        ("caption", pa.string()),
        ("labels", pa.list_(_LABEL_TYPE)),
        (EXTRA_KEY, pa.string()),
    ]
)
"""Columns of a PAD record in Parquet and Arrow files."""

_RECORD_KEYS = frozenset(PAD_SCHEMA.names)
_LABEL_KEYS = frozenset(field.name for field in _LABEL_TYPE)
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_RECORDS_PER_BATCH = 512
_BLANKS = " \t\r\n"  # of JSON; Python knows more
_CHUNK_CHARACTERS = 1 << 22
_LONGEST_RECORD_CHARACTERS = 1 << 26


class RecordFileError(ValueError):
    """A file that is missing, of an unknown kind, or broken as JSON or Parquet."""


def iter_records(path: Path) -> Iterator[Any]:
    """The records of a file in order, one at a time.

    Raises:
        RecordFileError: names the file, and the place of a syntax error.
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
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise RecordFileError(
                f"{path}: after {count} records: not a sound {kind} file: {error}. Write or copy it again."
            ) from error


def write_records(records: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes all records, whole or not at all (a temporary file beside it is renamed); returns their number.

    Raises:
        RecordFileError: for an unknown suffix.
    """
    kind = _kind_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        return _write(records, file, kind)


def records_to_batch(records: Iterable[Mapping[str, Any]]) -> pa.RecordBatch:
    """PAD records as one Arrow batch of `PAD_SCHEMA`."""
    rows = []
    for record in records:
        labels = [_fold_extra(label, _LABEL_KEYS) for label in record["labels"]]
        rows.append({**_fold_extra(record, _RECORD_KEYS), "labels": labels})
    return pa.RecordBatch.from_pylist(rows, schema=PAD_SCHEMA)


def batch_to_records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The records of an Arrow batch, with their further keys back in place."""
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
                except (ValueError, OverflowError):  # text that is no UTF-8, a time out of range, a key twice
                    raise RecordFileError(f"{path}: {_unreadable_value(batch, count)}") from None
                count += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecordFileError(
            f"{path}: after {count} records: not a sound Parquet file: {error}. Write or copy it again."
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
        except (ValueError, RecursionError) as error:  # no UTF-8, a number too long, or nested too deeply
            raise RecordFileError(f"{path}: line {number}: {error}; expected one JSON object a line") from error


def _iter_json_array(binary: IO[bytes], path: Path) -> Iterator[Any]:
    """Elements of a JSON array; only a few megabytes of text are held at a time."""
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
                raise RecordFileError(f"{path}: found {rest[:20]!r} behind the array's end; expected nothing")
            return
        try:
            if count and text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
            record, end = decode(text, _skip_blanks(text, position + (1 if count else 0)))
        except json.JSONDecodeError as error:
            # Most likely the record goes on behind the text read so far.
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


def _write(records: Iterable[Mapping[str, Any]], file: IO[bytes], kind: str) -> int:
    count = 0
    if kind == ".parquet":
        rows = iter(records)
        with pq.ParquetWriter(file, PAD_SCHEMA, compression="zstd") as writer:
            while chunk := list(islice(rows, _RECORDS_PER_BATCH)):
                writer.write_batch(records_to_batch(chunk))
                count += len(chunk)
        return count
    # A fixed time stamp and no name: the same records give the same bytes.
    stream: Any = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if kind.endswith(".gz") else file
    text = io.TextIOWrapper(stream, encoding="utf-8")
    opening, between, closing = ("", "\n", "\n") if ".jsonl" in kind else ("[\n", ",\n", "\n]\n")
    text.write(opening)
    for record in records:
        text.write(between if count else "")
        text.write(json.dumps(record, ensure_ascii=False))
        count += 1
    text.write(closing if count or ".jsonl" not in kind else "")
    text.flush()
    if stream is not file:
        text.close()
    else:
        text.detach()
    return count


def _fold_extra(mapping: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    folded = {key: value for key, value in mapping.items() if key in keys}
    if extra := {key: value for key, value in mapping.items() if key not in keys}:
        folded[EXTRA_KEY] = json.dumps(extra, ensure_ascii=False)
    return folded


def _unfold_extra(mapping: dict[str, Any]) -> None:
    """What is no JSON text of further keys stays under its own, where the check of the record finds it."""
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
