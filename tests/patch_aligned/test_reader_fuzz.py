"""The PAD reader against records and files that were spoilt at random.

Each record is either read as a plain reading of the format has it, or refused by an error that names file, record and
field; a file that is no JSON or Parquet any more is refused as a whole. Nothing else may be raised. The default run is
short and always the same; `PATCH_ALIGNED_FUZZ=10000` asks for so many new examples.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import tempfile
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from patch_aligned.pad import (
    AnnotationError,
    open_annotation_index,
    parse_annotation,
    read_annotations,
    write_annotations,
)
from patch_aligned.record_files import PAD_SCHEMA, RecordFileError
from tests.pads import rle_of

CHOSEN = os.environ.get("PATCH_ALIGNED_FUZZ")
EXAMPLES = int(CHOSEN or 300)
HANGS = timedelta(seconds=10)


def fuzzed(share: float) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    examples = round(EXAMPLES * share)
    return settings(max_examples=examples, derandomize=not CHOSEN, deadline=HANGS, suppress_health_check=slow)


# ---- what a record has to be, read plainly -----------------------------------------------------------------------


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not any(0xD800 <= ord(character) <= 0xDFFF for character in value)


def is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_storable(value: Any) -> bool:
    """Whether JSON in UTF-8 can express a value."""
    if isinstance(value, dict):
        return all(is_text(key) and is_storable(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(is_storable, value))
    return value is None or is_text(value) or isinstance(value, bool | int | float)


def runs_of(text: str) -> list[int] | None:
    """Run lengths, number by number; None if they are misspelt. No number has more than eight characters."""
    runs: list[int] = []
    numbers: list[list[int]] = [[]]
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        numbers[-1].append(code)
        if code < 32:
            numbers.append([])
    if numbers.pop():
        return None
    for codes in numbers:
        value = sum((code & 31) << (5 * place) for place, code in enumerate(codes))
        value -= (1 << (5 * len(codes))) if codes[-1] & 16 else 0
        value += runs[-2] if len(runs) > 2 else 0
        runs.append(value if len(codes) <= 8 else -1)
    return runs


def is_mask(text: Any, pixels: int | None) -> bool:
    runs = runs_of(text) if is_text(text) else None
    return runs is not None and len(runs) > 0 and min(runs) >= 0 and (pixels is None or sum(runs) == pixels)


def is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(edge, (int, float)) for edge in box):
        return False
    return all(abs(edge) <= 1.7976931348623157e308 for edge in box) and box[0] <= box[2] and box[1] <= box[3]


def is_image_id(value: Any) -> bool:
    return is_text(value) and value != "" and value[0] != "/" and ".." not in value.split("/") and "\0" not in value


def bad_extras(mapping: dict[str, Any], known: tuple[str, ...]) -> set[str]:
    extra = {key: value for key, value in mapping.items() if key not in known}
    bad = {key for key, value in extra.items() if not is_storable({key: value}) or key == "extra_json"}
    return {key.encode("utf-8", "backslashreplace").decode() for key in bad}


def bad_fields(record: Any) -> set[str]:
    """Names of all fields that are wrong."""
    keys, label_keys = ("image_id", "size", "caption", "labels"), ("tag", "bbox", "rle_mask")
    if not isinstance(record, dict) or any(key not in record for key in keys):
        return {"record"}
    image_id, size, caption, labels = (record[key] for key in keys)
    has_size = isinstance(size, list) and len(size) == 2
    has_size = has_size and all(is_number(side, (int,)) and 1 <= side <= 2**20 for side in size)
    bad = bad_extras(record, keys)
    bad |= {
        name
        for name, is_right in {
            "image_id": is_image_id(image_id),
            "size": has_size,
            "caption": is_text(caption),
            "labels": isinstance(labels, list),
        }.items()
        if not is_right
    }
    for place, label in enumerate(labels if isinstance(labels, list) else []):
        where = f"labels[{place}]"
        if not isinstance(label, dict) or any(key not in label for key in label_keys):
            bad.add(where)
            continue
        bad |= {f"{where}.{name}" for name in bad_extras(label, label_keys)}
        bad |= {f"{where}.tag"} if not is_text(label["tag"]) or not label["tag"].strip() else set()
        bad |= {f"{where}.bbox"} if not is_box(label["bbox"]) else set()
        pixels = size[0] * size[1] if has_size else None
        bad |= {f"{where}.rle_mask"} if not is_mask(label["rle_mask"], pixels) else set()
    return bad


def as_text(record: dict[str, Any]) -> str:
    """A record with its numbers in the reader's types, so that NaN equals NaN."""
    labels = [{**label, "bbox": list(map(float, label["bbox"]))} for label in record["labels"]]
    return json.dumps({**record, "labels": labels}, sort_keys=True)


def check_reading(path: Path, records: list[Any]) -> None:
    """Compares the reader, and the index that training reads, with the plain reading of the same records."""
    expected: dict[int, str] = {}
    broken: dict[int, set[str]] = {}
    for place, record in enumerate(records):
        bad = bad_fields(record)
        if not bad and record["image_id"] in {records[earlier]["image_id"] for earlier in expected}:
            bad = {"image_id"}
        if bad:
            broken[place] = bad
        else:
            expected[place] = as_text(record)

    errors: list[AnnotationError] = []
    images = list(read_annotations(path, errors.append))
    assert [as_text(image.to_record()) for image in images] == list(expected.values())
    assert [error.record_index for error in errors] == list(broken)
    for error in errors:
        assert error.field in broken[error.record_index], (error.field, broken[error.record_index])
        message = str(error)
        assert f"{path}: record {error.record_index} " in message and f"field {error.field!r}: found " in message
        assert "expected" in message and len(message) < 1500
        message.encode()
    if errors:
        with pytest.raises(AnnotationError) as caught:
            list(read_annotations(path))
        assert str(caught.value) == str(errors[0])

    index = open_annotation_index(path, path.parent / "cache")
    assert [as_text(index[row].to_record()) for row in range(len(index))] == list(expected.values())
    assert index.rejected == len(errors) and len(index.rejections(len(errors))) == len(errors)
    for row, image in enumerate(images):
        assert index.find(image.image_id) == row


# ---- spoilt records ----------------------------------------------------------------------------------------------


def make_records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number, (width, height) in enumerate([(8, 6), (6, 8), (40, 50), (1, 1)]):
        labels: list[dict[str, Any]] = []
        for place in range(number % 3):
            mask = rng.random((height, width)) < 0.4
            box = [-0.25, 1, width + 0.5, height]
            labels.append({"tag": ("water", "traffic light")[place], "bbox": box, "rle_mask": rle_of(mask)})
        image_id = f"{number}/ä.jpg"
        records.append({"image_id": image_id, "size": [width, height], "caption": "a cliff", "labels": labels})
    records[2]["labels"][0]["score"] = 0.75
    records[1]["source"] = {"urls": ["x", None], "rank": 3}
    return records


RECORDS = make_records()
# Values that no Python object stands for; they are put into the text.
TEXT_OF_MARK = {
    "@deep": "[" * 200 + "]" * 200,
    "@too deep": "[" * 100_000 + "]" * 100_000,
    "@digits": "1" * 400,
    "@too many digits": "1" * 5000,
    "@half": '"\\ud800"',
    "@cut": '{"a": ',
}
numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**400, -1, 0, 1, 2**31, 2**63, 1e400])
texts = st.text(max_size=8) | st.sampled_from(["", " ", "\0", "\u2028", "NaN", "😀", "é\u0301", *TEXT_OF_MARK])
scalars = st.none() | st.booleans() | numbers | texts
junk = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(texts | st.sampled_from(["tag", "size"]), inner, max_size=3)
    ),
    max_leaves=6,
)
rle_characters = st.text(st.characters(min_codepoint=46, max_codepoint=113), max_size=12)
odd: dict[str, Any] = {
    "image_id": st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", "a/..b.jpg", "a\0.jpg", "0/ä.jpg", "./0.jpg", "a/."]
    ),
    "size": st.lists(numbers | st.booleans(), max_size=3) | st.sampled_from([[8, 6], [6, 8], [1, 48], [2**40, 2**40]]),
    "caption": texts,
    "labels": st.lists(junk, max_size=2),
    "tag": texts,
    "bbox": st.lists(numbers, min_size=3, max_size=5) | st.sampled_from([[4, 4, 2, 2], [0, 0, 10**400, 1]]),
    "rle_mask": rle_characters | st.sampled_from(["o" * 60 + "0", "5" + "N" * 30, "P" * 9 + "0", "on" * 200]),
    "extra_json": junk | st.sampled_from(['{"a": 1}', '{"image_id": "x.jpg"}', "[1]", '{"a": ', '{"extra_json": 1}']),
}


@st.composite
def spoilt_records(draw: Any) -> list[Any]:
    records: list[Any] = copy.deepcopy(draw(st.lists(st.sampled_from(RECORDS), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(records) - 1))
        record = records[place]
        labels = record.get("labels") if isinstance(record, dict) else None
        labels = [label for label in labels if isinstance(label, dict)] if isinstance(labels, list) else []
        target = draw(st.sampled_from([record, *labels]))
        if not isinstance(target, dict) or draw(st.integers(0, 19)) == 0:
            records[place] = draw(junk)
            continue
        spoil(draw, target)
    return records


def spoil(draw: Any, mapping: dict[str, Any]) -> None:
    key = draw(st.sampled_from([*mapping, "extra_json", "more"]))
    how = draw(st.sampled_from(["odd", "junk", "remove", "edit", "swap", "nest"]))
    value = mapping.get(key)
    if how == "remove":
        mapping.pop(key, None)
    elif how == "junk" or (how == "odd" and key not in odd):
        mapping[key] = draw(junk)
    elif how == "odd":
        mapping[key] = draw(odd[key])
    elif how == "nest":
        mapping[key] = {"size": [1, 2], "counts": value}
    elif isinstance(value, str):
        start = draw(st.integers(0, len(value)))
        mapping[key] = value[:start] + draw(rle_characters) + value[start + draw(st.integers(0, 3)) :]
    elif isinstance(value, list):
        mapping[key] = value[::-1] if how == "swap" else [*value, *value][: draw(st.integers(0, 2 * len(value)))]


def text_of(record: Any) -> str:
    text = json.dumps(record)
    for mark, meant in TEXT_OF_MARK.items():
        text = text.replace(json.dumps(mark), meant)
    return text


def parsed(text: str) -> Any:
    """The value, or the exception class where Python's own reader refuses it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ValueError


@given(spoilt_records(), st.sampled_from([".json", ".jsonl", ".json.gz", ".jsonl.gz"]))
@fuzzed(0.5)
def test_a_spoilt_json_record_is_read_plainly_or_refused_by_name(records: list[Any], suffix: str) -> None:
    texts = [text_of(record) for record in records]
    values = [parsed(text) for text in texts]
    whole = "\n".join(texts) + "\n" if "jsonl" in suffix else "[" + ",\n".join(texts) + "]"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pad{suffix}"
        path.write_bytes(gzip.compress(whole.encode(), 1) if suffix.endswith("gz") else whole.encode())
        if ValueError not in values:
            check_reading(path, values)
            return
        place = values.index(ValueError)
        for read in (lambda: list(read_annotations(path)), lambda: open_annotation_index(path, Path(folder) / "cache")):
            with pytest.raises(RecordFileError) as caught:
                read()
            where = f"line {place + 1}" if "jsonl" in suffix else f"record {place}"
            assert str(caught.value).startswith(f"{path}: {where}")


def unfolded(mapping: Any) -> Any:
    """A row of a Parquet file with its further keys in place."""
    if not isinstance(mapping, dict) or "extra_json" not in mapping:
        return mapping
    rest = {key: value for key, value in mapping.items() if key != "extra_json"}
    if mapping["extra_json"] is None:
        return rest
    extra = parsed(mapping["extra_json"]) if isinstance(mapping["extra_json"], str) else None
    if not isinstance(extra, dict) or "extra_json" in extra or any(key in rest for key in extra):
        return mapping
    return {**rest, **extra}


@given(spoilt_records(), st.booleans())
@fuzzed(0.2)
def test_a_spoilt_parquet_record_is_read_plainly_or_refused_by_name(records: list[Any], keeps_schema: bool) -> None:
    rows = [record for record in records if isinstance(record, dict)]
    try:
        table = pa.Table.from_pylist(rows, schema=PAD_SCHEMA if keeps_schema else None)
        with tempfile.TemporaryFile() as file:
            pq.write_table(table, file)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        assume(False)  # values that no column can hold
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pad.parquet"
        pq.write_table(table, path)
        values = [unfolded(row) for row in table.to_pylist()]
        for value in values:
            labels = value.get("labels")
            value["labels"] = [unfolded(label) for label in labels] if isinstance(labels, list) else labels
        values = [
            {key: entry for key, entry in value.items() if key != "labels" or "labels" in table.column_names}
            for value in values
        ]
        check_reading(path, values)


# ---- spoilt bytes ------------------------------------------------------------------------------------------------


@st.composite
def damages(draw: Any) -> list[tuple[float, int, bytes]]:
    """Where (share of the file), how many bytes go, and what stands there instead."""
    pieces = st.sampled_from(
        [b"", b"\xff", b"\xc3", b"\n", b"\r", b"\0", b'"', b"]", b"}", b",", b"[", b"\xef\xbb\xbf", b"NaN"]
    )
    where = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
    length = st.integers(0, 4) | st.just(10**6)
    return draw(st.lists(st.tuples(where, length, pieces | st.binary(max_size=3)), min_size=1, max_size=3))


def plainly_read(content: bytes, suffix: str) -> list[Any] | None:
    """All values of a JSON file, or None if it is none."""
    try:
        if suffix.endswith("gz"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read()
        text = content.decode("utf-8-sig")
        if "jsonl" in suffix:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        values = json.loads(text)
    except (ValueError, RecursionError, EOFError, OSError, zlib.error):
        return None
    return values if isinstance(values, list) else None


@given(
    damages(), st.sampled_from([".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet"]), st.integers(1, len(RECORDS))
)
@fuzzed(0.3)
def test_a_damaged_file_is_read_plainly_or_refused_by_name(
    damage: list[tuple[float, int, bytes]], suffix: str, count: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pad{suffix}"
        write_annotations(map(parse_annotation, RECORDS[:count]), path)
        content = path.read_bytes()
        for share, length, piece in damage:
            start = round(share * len(content))
            content = content[:start] + piece + content[start + length :]
        path.write_bytes(content)
        values = None if suffix == ".parquet" else plainly_read(content, suffix)
        if values is not None:
            check_reading(path, values)
            return
        try:
            list(read_annotations(path, lambda error: None))
            open_annotation_index(path, Path(folder) / "cache")
        except RecordFileError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert suffix == ".parquet"  # where a changed byte may be another valid value
