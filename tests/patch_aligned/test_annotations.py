"""PAD files: what is written is read again, and what breaks the format is named."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_aligned import record_files
from patch_aligned.masks import rle_problems, run_lengths
from patch_aligned.pad import (
    AnnotationError,
    open_annotation_index,
    parse_annotation,
    read_annotations,
    write_annotations,
)
from patch_aligned.record_files import RecordFileError
from tests.pads import rle_of


def make_record(name: str = "a/0.jpg", regions: int = 1) -> dict[str, Any]:
    mask = np.zeros((6, 8))
    mask[1:4, 2:7] = 1
    label = {"tag": "water", "bbox": [-0.25, 1.0, 7.5, 4.0], "rle_mask": rle_of(mask)}
    return {"image_id": name, "size": [8, 6], "caption": "a cliff", "labels": [dict(label) for _ in range(regions)]}


def write_json(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_what_is_written_is_read_again_with_further_keys(tmp_path: Path, suffix: str):
    records = [make_record(f"ä/{number}.jpg", regions=number % 3) for number in range(700)]
    records[1]["source"] = {"urls": ["x", None], "rank": 3}
    records[1]["labels"][0]["score"] = 0.75
    records[2]["source"] = "another type"
    path = tmp_path / f"pad{suffix}"
    assert write_annotations(map(parse_annotation, records), path) == 700
    assert [image.to_record() for image in read_annotations(path)] == records


def test_the_same_records_give_the_same_gzip_bytes(tmp_path: Path):
    images = [parse_annotation(make_record())]
    for name in ("a.json.gz", "b.json.gz"):
        write_annotations(images, tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "pad.jsonl"
    write_annotations([parse_annotation(make_record())], path)
    before = path.read_bytes()

    def images():
        yield parse_annotation(make_record("b.jpg"))
        raise RuntimeError("the annotator died")

    with pytest.raises(RuntimeError, match="died"):
        write_annotations(images(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_array_is_read_whatever_the_pieces_it_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = [make_record(f"{number}.jpg") for number in range(3)]
    path = tmp_path / "pad.json"
    path.write_text("\ufeff \n" + json.dumps(records, indent=2) + " \n")
    for size in (1, 2, 7, 100):
        monkeypatch.setattr(record_files, "_CHUNK_CHARACTERS", size)
        if size > 2:  # the first piece has to reach the opening bracket
            assert list(record_files.iter_records(path)) == records


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": 2}', r"expected '\[', one array.*\.jsonl"),
        ('[{"a": 1}, {"a": ', "record 1: .*cut off"),
        ('[{"a": 1} {"a": 2}]', "record 1: expected ',' or ']'"),
        ('[{"a": 1}] more', "more.* array"),
        ("", r"expected '\['"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "pad.json"
    path.write_text(text)
    with pytest.raises(RecordFileError, match=expected) as caught:
        list(record_files.iter_records(path))
    assert str(path) in str(caught.value)


def test_broken_files_of_other_kinds_are_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * 10000)[:-12])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "a.csv").write_text("")
    expected = {"a.jsonl": "line 2", "a.json.gz": "not a valid", "a.parquet": "not a valid Parquet", "a.csv": "suffix"}
    for name, message in {**expected, "missing.json": "found no such file"}.items():
        with pytest.raises(RecordFileError, match=message):
            list(record_files.iter_records(tmp_path / name))


def edited(**changes: Any) -> dict[str, Any]:
    return {**make_record(), **changes}


def with_label(**changes: Any) -> dict[str, Any]:
    record = make_record()
    record["labels"][0].update(changes)
    return record


def without(key: str) -> dict[str, Any]:
    record = make_record()
    del (record if key in record else record["labels"][0])[key]
    return record


@pytest.mark.parametrize(
    ("record", "field", "found"),
    [
        ([1, 2], "record", "[1, 2]"),
        (without("caption"), "record", "image_id, size, labels"),
        (without("rle_mask"), "labels[0]", "tag, bbox"),
        (edited(image_id=""), "image_id", "''"),
        (edited(image_id=7), "image_id", "7"),
        (edited(size=[8, 6.0]), "size", "[8, 6.0]"),
        (edited(size=[8]), "size", "[8]"),
        (edited(size=[8, 0]), "size", "[8, 0]"),
        (edited(caption=None), "caption", "None"),
        (edited(labels=None), "labels", "None"),
        (edited(labels=["water"]), "labels[0]", "'water'"),
        (with_label(tag=" "), "labels[0].tag", "' '"),
        (with_label(tag=["water"]), "labels[0].tag", "['water']"),
        (with_label(bbox=[1, 2, 3]), "labels[0].bbox", "[1, 2, 3]"),
        (with_label(bbox=[1, 2, float("nan"), 4]), "labels[0].bbox", "nan"),
        (with_label(bbox=[5, 2, 3, 4]), "labels[0].bbox", "[5, 2, 3, 4]"),
        (with_label(rle_mask={"size": [6, 8], "counts": "x"}), "labels[0].rle_mask", "counts"),
        (with_label(rle_mask=""), "labels[0].rle_mask", "an empty string"),
        (with_label(rle_mask="5 5"), "labels[0].rle_mask", "a character that no RLE string has"),
        (with_label(rle_mask=rle_of(np.ones((6, 7)))), "labels[0].rle_mask", "runs that sum to 42 pixels"),
        (edited(size=[8, 5]), "labels[0].rle_mask", "runs that sum to 48 pixels"),
    ],
)
def test_a_broken_record_is_named_with_file_record_field_and_value(tmp_path: Path, record: Any, field: str, found: str):
    path = write_json(tmp_path / "pad.json", [make_record("good.jpg"), record])
    with pytest.raises(AnnotationError) as caught:
        list(read_annotations(path))
    message = str(caught.value)
    assert f"{path}: record 1 " in message
    assert f"field {field!r}: found" in message
    assert found in message
    assert "expected" in message and "Correct the record; `patch-aligned verify` lists" in message
    assert "--patch_on_error" not in message  # a flag of training, which other readers of the file do not have


def test_text_in_a_parquet_file_that_is_no_utf8_is_named_with_record_and_field(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([make_record(f"{number}.jpg") for number in range(3)])
    captions = pa.array([b"a", b"b", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(2, "caption", captions), tmp_path / "pad.parquet")
    with pytest.raises(RecordFileError, match=r"pad\.parquet: record 2, field 'caption': found a value"):
        list(read_annotations(tmp_path / "pad.parquet"))


def test_a_parquet_file_whose_column_names_are_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pad.parquet"
    write_annotations([parse_annotation(make_record())], path)
    path.write_bytes(path.read_bytes().replace(b"caption", b"cap\xffion"))
    with pytest.raises(RecordFileError, match=r"pad\.parquet: after 0 records: not a valid Parquet file"):
        list(read_annotations(path))


@pytest.mark.parametrize("second", ["x/a.jpg", "./x//a.jpg"])
def test_a_second_record_of_an_image_names_the_first(tmp_path: Path, second: str):
    path = write_json(tmp_path / "pad.json", [make_record("x/a.jpg"), make_record("b.jpg"), make_record(second)])
    with pytest.raises(AnnotationError, match=r"record 2 .*the id of record 0 again"):
        list(read_annotations(path))


def test_broken_records_can_be_collected_instead(tmp_path: Path):
    records = [make_record("a.jpg"), edited(size=[6]), make_record("b.jpg"), with_label(rle_mask="")]
    errors: list[AnnotationError] = []
    images = list(read_annotations(write_json(tmp_path / "pad.json", records), errors.append))
    assert [image.image_id for image in images] == ["a.jpg", "b.jpg"]
    assert [error.record_index for error in errors] == [1, 3]


masks = st.integers(1, 12).flatmap(
    lambda height: st.integers(1, 300).flatmap(
        lambda width: st.integers(0, 2**32).map(
            lambda seed: np.random.default_rng(seed).random((height, width)) < np.random.default_rng(seed + 1).random()
        )
    )
)


@given(st.lists(masks, min_size=1, max_size=5))
@settings(max_examples=60)
def test_run_lengths_are_those_of_the_decoded_masks(given_masks: list[np.ndarray]):
    runs, starts = run_lengths([rle_of(mask) for mask in given_masks])
    for mask, found in zip(given_masks, np.split(runs, starts[1:]), strict=True):
        pixels = mask.flatten(order="F")
        edges = np.flatnonzero(np.diff(pixels)) + 1
        expected = np.diff(np.concatenate(([0], edges, [pixels.size])))
        if pixels[0]:
            expected = np.concatenate(([0], expected))
        np.testing.assert_array_equal(found, expected)


def test_a_wrong_mask_is_found_among_right_ones():
    right, cut = rle_of(np.eye(9)), rle_of(np.eye(40))[:-1]
    negative = "5" + "N" * 9  # differences of -2 on and on
    problems = rle_problems([right, cut, right, negative, right], [81, 1600, 81, 81, 80])
    assert problems[0] is None and problems[2] is None
    assert problems[1] is not None
    assert problems[3] is not None and "a run of -" in problems[3]
    assert problems[4] == "runs that sum to 81 pixels"


def test_the_index_finds_every_record_and_no_other(tmp_path: Path):
    records = [make_record(f"{number}.jpg", regions=number % 3) for number in range(600)]
    records[5]["source"] = "web"
    index = open_annotation_index(write_json(tmp_path / "pad.json", records), tmp_path / "cache")
    assert len(index) == 600 and index.regions == 600
    for number, record in enumerate(records):
        row = index.find(f"{number}.jpg")
        assert row is not None and index[row].to_record() == record
    assert index.find("600.jpg") is None
    copy = pickle.loads(pickle.dumps(index))
    assert copy[copy.find("5.jpg")].extra == {"source": "web"}
    assert len(pickle.dumps(index)) < 1000  # the arrays stay on disk


def test_the_index_takes_spellings_of_one_path_for_one_image(tmp_path: Path):
    index = open_annotation_index(
        write_json(tmp_path / "pad.json", [make_record("./a.jpg"), make_record("b/c.jpg")]), tmp_path / "cache"
    )
    assert [index.find(path) for path in ("a.jpg", "./a.jpg", "b//c.jpg", "./b/c.jpg", "c.jpg")] == [0, 0, 1, 1, None]
    assert index.count_images_with_regions(["a.jpg", "b/./c.jpg", "c.jpg"]) == (3, 2)


def test_images_of_equal_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("patch_aligned.pad._hash", lambda image_id: len(image_id))
    records = [make_record(name) for name in ("aa", "b", "cc")]
    index = open_annotation_index(write_json(tmp_path / "pad.json", records), tmp_path / "cache")
    assert index[index.find("cc")].image_id == "cc"
    assert index[index.find("aa")].image_id == "aa"
    assert index.find("dd") is None


def test_hashes_that_no_float64_tells_apart_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("patch_aligned.pad._hash", lambda image_id: 2**62 + int(image_id[:-4]))
    records = [make_record(f"{number}.jpg") for number in range(5)]
    index = open_annotation_index(write_json(tmp_path / "pad.json", records), tmp_path / "cache")
    assert [index.find(record["image_id"]) for record in records] == [0, 1, 2, 3, 4]


def test_a_changed_file_is_converted_anew_and_an_unchanged_one_is_not(tmp_path: Path):
    path = write_json(tmp_path / "pad.json", [make_record("a.jpg")])
    first = open_annotation_index(path, tmp_path / "cache")
    assert open_annotation_index(path, tmp_path / "cache").folder == first.folder
    write_json(path, [make_record("b.jpg")])
    os.utime(path, ns=(0, 12345))
    second = open_annotation_index(path, tmp_path / "cache")
    assert second.find("b.jpg") is not None and second.find("a.jpg") is None


def test_broken_records_are_left_out_of_the_index_and_listed(tmp_path: Path):
    path = write_json(tmp_path / "pad.json", [make_record("a.jpg"), edited(image_id="b.jpg", size=[6])])
    index = open_annotation_index(path, tmp_path / "cache")
    assert len(index) == 1 and index.rejected == 1
    assert "record 1 (image_id 'b.jpg'), field 'size'" in index.rejections()[0]


@pytest.mark.parametrize("records", [[], [edited(size=[6])]])
def test_a_file_without_a_sound_record_has_an_empty_index(tmp_path: Path, records: list[Any]):
    index = open_annotation_index(write_json(tmp_path / "pad.json", records), tmp_path / "cache")
    assert len(index) == 0 and index.regions == 0
    assert index.find("a.jpg") is None
    assert index.count_images_with_regions(["a.jpg"]) == (1, 0)


def test_images_with_regions_are_counted_over_a_training_file(tmp_path: Path):
    pad = write_json(tmp_path / "pad.json", [make_record("a.jpg"), make_record("b.jpg", regions=0)])
    rows = [{"image": "a.jpg"}, {"image": "a.jpg"}, {"image": ["b.jpg", "a.jpg"]}, {"image": "c.jpg"}, {"id": "text"}]
    training = write_json(tmp_path / "train.json", rows)
    index = open_annotation_index(pad, tmp_path / "cache")
    assert index.coverage_of(training) == (4, 2)
    assert index.coverage_of(training) == (4, 2)  # from its cache
    assert index.coverage_of(pad) == (2, 1)


def _open_and_count(path: Path, cache: Path, results: Any) -> None:
    results.put(len(open_annotation_index(path, cache)))


def test_ranks_that_start_together_share_one_conversion(tmp_path: Path):
    path = write_json(tmp_path / "pad.json", [make_record(f"{number}.jpg") for number in range(2000)])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_open_and_count, args=(path, tmp_path / "cache", results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=60) for _ in ranks] == [2000] * 4
    for rank in ranks:
        rank.join()
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1
