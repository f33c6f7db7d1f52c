"""Data files become tables that hold what the files hold, and say what is wrong with them."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.data import records
from llava.data import records as json_stream
from llava.data.records import RecordError, as_conversation, find_problem, image_names, open_records, read_json_values

GOOD = {"id": "g", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello you"}]}
ANNOTATED = {
    "image_id": "a/1.jpg",
    "size": [4, 3],
    "caption": "a red cup",
    "labels": [{"tag": "cup", "bbox": [0.0, 0.5, 2.0, 3.0], "rle_mask": "052"}],
}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def with_image(**fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    return {"id": "i", "image": "i.png", "conversations": turns} | fields


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzipped_array(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))


WRITERS: dict[str, Callable[[Path, list[Any]], Any]] = {
    "data.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1, ensure_ascii=False)),
    "data.jsonl": write_lines,
    "data.json.gz": write_gzipped_array,
    "data.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_records_back(name: str, tmp_path: Path) -> None:
    rows = [GOOD | {"extra": {"deep": [1, "é", 2.5]}}, GOOD | {"id": "h", "extra": {"deep": [2, "日", 0.5]}}]
    for row in rows:
        row["extra"]["deep"] = [str(item) for item in row["extra"]["deep"]]  # one type, as Parquet wants it
    WRITERS[name](tmp_path / name, rows)
    table = open_records(tmp_path / name)
    assert list(table) == rows and len(table) == 2
    assert table.problems() == {} and table.words().tolist() == [3, 3] and not table.has_image().any()


@given(
    rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=6),
    pieces=st.integers(1, 40),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_whatever_the_size_of_the_pieces(
    rows: list[Any], pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_CHARACTERS_AT_ONCE", pieces)
    for name, text in (
        ("a.json", json.dumps(rows, indent=2, ensure_ascii=False)),
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = list(read_json_values(tmp_path / name))
        assert [value for _, value in read] == rows
        assert [json.loads(own_text) for own_text, _ in read] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ]', "record 1: found invalid JSON"),
        ('[{"a": 1}', r"after record 0: found '', expected ',' or '\]'"),
        ('[{"a": 1},', r"found the end after 1 records, expected '\]'"),
        ('[{"a": 1}] x', r"found 'x' after the closing '\]'"),
        ('{"a": 1}\n{"a": ', "record 1: found invalid JSON"),
        ("", "found no records"),
        ("[]", "found no records"),
    ],
)
def test_broken_files_are_refused_and_leave_no_table(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message):
        open_records(path, tmp_path / "tables")
    assert not list((tmp_path / "tables").glob("*.arrow")) and not list((tmp_path / "tables").glob("*.tmp"))


@pytest.mark.parametrize("name", ["cut.json.gz", "cut.parquet", "latin1.json"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "latin1.json":
        path.write_bytes('[{"a": "é"}]'.encode("latin-1"))
    else:
        WRITERS[name.replace("cut", "data")](path, [GOOD] * 50)
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match="cannot be read"):
        open_records(path)


def test_parquet_columns_that_json_has_no_value_for(tmp_path: Path) -> None:
    others = {"thumbnail": b"\x89PNG", "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.5")}
    pq.write_table(pa.Table.from_pylist([GOOD | others]), tmp_path / "data.parquet")
    assert open_records(tmp_path / "data.parquet")[0] == GOOD | {
        "thumbnail": "4 bytes", "day": "2026-01-02", "price": "1.5"
    }  # fmt: skip


def test_a_missing_file_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such data file.*check --data_path"):
        open_records(tmp_path / "nowhere.json")


def test_a_file_is_converted_once_and_anew_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD]))
    first = open_records(path).path
    monkeypatch.setattr(records, "_convert", lambda *_: pytest.fail("converted again"))
    assert open_records(path).path == first
    monkeypatch.undo()
    path.write_text(json.dumps([GOOD, GOOD]))
    os.utime(path, ns=(1, 1))
    assert len(open_records(path, tmp_path / "tables")) == 2


def test_a_table_is_cheap_to_send_to_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD | {"number": number} for number in range(1000)]))
    table = open_records(path)
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    assert pickle.loads(sent)[999]["number"] == 999


def test_an_annotated_image_stands_alone() -> None:
    record = as_conversation(ANNOTATED)
    assert record["id"] == record["image"] == "a/1.jpg"
    assert [turn["value"] for turn in record["conversations"]] == ["<image>", "a red cup"]
    assert record["labels"] == ANNOTATED["labels"] and record["size"] == [4, 3]
    assert find_problem(record) is None
    assert as_conversation(GOOD) == GOOD


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "found list, expected an object"),
        ({"id": "x"}, "field conversations: found None, expected a list of turns"),
        ({"id": "x", "conversations": []}, r"field conversations: found \[\]"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, r"conversations\[0\].from: found 'bot'"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value: found None, expected text"),
        (with_image(image=3), "field image: found 3, expected a path"),
        (with_image(image=""), "field image: found ''"),
        (with_image(image=["a.png", "b.png"]), "found 1 <image>, expected 2"),
        (with_image(conversations=GOOD["conversations"]), "found 0 <image>, expected 1"),
        ({"conversations": with_image()["conversations"]}, "found 1 <image>, expected 0"),
    ],
)
def test_problems_name_field_and_finding(record: Any, message: str) -> None:
    assert re.search(message, find_problem(record) or "")


def test_text_may_speak_of_image_tags() -> None:
    turns = [
        {"from": "human", "value": "In RSS, what does <image> do?"},
        {"from": "gpt", "value": "<image> is a logo."},
    ]
    assert find_problem({"conversations": turns}) is None


def test_problems_words_and_ids_are_columns(tmp_path: Path) -> None:
    rows = [GOOD, "no object", with_image(image=["a.png"]), ANNOTATED, {"conversations": GOOD["conversations"]}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    table = open_records(path)
    assert table.problems() == {1: "found str, expected an object"}
    assert table.words().tolist() == [3, 0, 3, 4, 3]
    assert table.has_image().tolist() == [False, False, True, True, False]
    assert [table.sample_id(row) for row in range(5)] == ["g", "record-1", "i", "a/1.jpg", "record-4"]
    assert table.where(3) == f"{path}, record 3 (id 'a/1.jpg')"
    assert image_names(table[2]) == ["a.png"]
