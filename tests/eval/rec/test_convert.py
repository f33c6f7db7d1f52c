"""The published archives become rows, and files from elsewhere cannot run code or reach outside the data root."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image, ImageFile

from eval.rec.boxes import Row, load_image, prompt_of
from eval.rec.convert import PUBLISHED_EXPRESSIONS, load_plain_pickle, main, read_referred_objects
from llava.mm_utils import UnreadableImageError

SIZE_WH = (64, 48)


def coco_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def write_archive(folder: Path, refs_name: str, splits: list[str]) -> None:
    """One object with two expressions in a picture of its own for each split, and one for training."""
    folder.mkdir(parents=True)
    refs, images, annotations = [], [], []
    for index, split in enumerate([*splits, "train"]):
        sentences: list[dict[str, Any]] = [
            {"sent_id": 2 * index + n, "sent": text, "raw": text.title(), "tokens": text.split()}
            for n, text in enumerate((f"left thing {index}", "the caf\xe9"))
        ]
        refs.append({"ref_id": index, "ann_id": 100 + index, "image_id": index, "split": split, "category_id": 1,
                     "file_name": f"COCO_train2014_{index:012d}_{index}.jpg", "sent_ids": [2 * index, 2 * index + 1],
                     "sentences": sentences})  # fmt: skip
        images.append({"id": index, "file_name": coco_name(index), "width": SIZE_WH[0], "height": SIZE_WH[1]})
        annotations.append({"id": 100 + index, "image_id": index, "bbox": [4 + index, 8, 16.5, 20]})
    (folder / refs_name).write_bytes(pickle.dumps(refs, protocol=0))
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """The three archives, and the pictures below a data root."""
    write_archive(tmp_path / "refs" / "refcoco", "refs(unc).p", ["val", "testA", "testB"])
    write_archive(tmp_path / "refs" / "refcoco+", "refs(unc).p", ["val", "testA", "testB"])
    write_archive(tmp_path / "refs" / "refcocog", "refs(umd).p", ["val", "test"])
    images = tmp_path / "data" / "coco" / "train2014"
    images.mkdir(parents=True)
    for image_id in range(3):
        Image.new("RGB", SIZE_WH, (image_id, 0, 0)).save(images / coco_name(image_id))
    return tmp_path


def run_main(*arguments: str) -> int:
    """The exit status of the command."""
    try:
        main(arguments)
    except SystemExit as stopped:
        print(stopped.code, file=sys.stderr)  # as the interpreter does
        return 1
    return 0


def convert(world: Path, *options: str, images: str = "train2014") -> int:
    folders = ["--data_root", str(world / "data"), "--output", str(world / "out")]
    if "--json" in options:
        return run_main(*options, *folders)
    return run_main(*options, "--refs", str(world / "refs"), "--images", str(world / "data/coco" / images), *folders)


def rows_of(path: Path) -> list[Row]:
    rows: Any = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def test_one_row_for_each_expression_of_the_split(world: Path) -> None:
    assert convert(world) == 0
    assert {path.stem for path in (world / "out").iterdir()} == set(PUBLISHED_EXPRESSIONS)
    row = {"image": f"coco/train2014/{coco_name(1)}", "box_xyxy_px": [5, 8, 21.5, 28], "width": 64, "height": 48}
    assert rows_of(world / "out/refcocog_test.parquet") == [
        {"id": "2", "expression": "left thing 1", **row},
        {"id": "3", "expression": "the café", **row},
    ]


def test_counts_are_compared_with_the_published_ones(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(world)
    lines = capsys.readouterr().out.splitlines()
    assert "refcoco_val.parquet: 2 expressions, but 10834 are published" in lines[0]
    assert "refcoco_plus_val.parquet: 2 expressions, but 10758 are published" in lines[3]
    assert len(lines) == 8


def test_pictures_of_train2017_serve_too(world: Path) -> None:
    """They are the same files under a shorter name, and whoever trained LLaVA has them."""
    folder = (world / "data/coco/train2014").rename(world / "data/coco/train2017")
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.removeprefix("COCO_train2014_"))
    assert convert(world, images="train2017") == 0
    assert rows_of(world / "out/refcocog_val.parquet")[0]["image"] == "coco/train2017/000000000000.jpg"


def test_links_inside_the_data_root_may_lead_elsewhere(world: Path) -> None:
    folder = (world / "data/coco/train2014").rename(world / "elsewhere")
    (world / "data/coco/train2014").symlink_to(folder)
    assert convert(world) == 0
    assert rows_of(world / "out/refcocog_val.parquet")[0]["image"] == IMAGE


def test_missing_pictures_are_counted_and_no_file_is_written(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "data/coco/train2014" / coco_name(0)).unlink()
    assert convert(world) == 1
    assert f"1 of 1 pictures are missing, the first is {coco_name(0)}" in capsys.readouterr().err
    assert not (world / "out").exists()


def test_a_resized_picture_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 24)).save(world / "data/coco/train2014" / coco_name(0))
    assert convert(world) == 1
    assert "found 32 x 24 pixels, expected 64 x 48" in capsys.readouterr().err


def test_pictures_outside_the_data_root_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(world, images="../../refs") == 1
    assert "expected a folder below --data_root" in capsys.readouterr().err


def test_a_wrong_archive_names_the_splits_that_it_has(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = world / "refs/refcocog/refs(umd).p"
    refs = [ref for ref in pickle.loads(path.read_bytes()) if ref["split"] != "test"]
    path.write_bytes(pickle.dumps(refs))
    assert convert(world) == 1
    assert "found the splits ['train', 'val'], expected 'test'" in capsys.readouterr().err


def test_no_archive_at_all(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--refs", str(world), "--data_root", str(world / "data")) == 1
    assert "found none of the folders refcoco, refcoco+, refcocog" in capsys.readouterr().err


def test_a_python_2_pickle_of_bytes_and_unicode(tmp_path: Path) -> None:
    # {'sent': 'caf\xe9', 'raw': u'caf\u00e9', 'id': 7L} as Python 2 wrote it with protocol 0.
    path = tmp_path / "refs.p"
    path.write_bytes(b"(dp0\nS'sent'\np1\nS'caf\\xe9'\np2\nsS'raw'\np3\nVcaf\xe9\np4\nsS'id'\np5\nL7L\ns.")
    assert load_plain_pickle(path) == {"sent": "café", "raw": "café", "id": 7}


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, protocol: int) -> None:
    path, proof = tmp_path / "refs(unc).p", tmp_path / "it ran"
    path.write_bytes(pickle.dumps([RunsCode(proof)], protocol=protocol))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: .*asks for .*, which may run code"):
        load_plain_pickle(path)
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists()  # so the file was dangerous


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"(lp0\n", b"\x80\x04]", b"cos\nsystem\n(S'true'\ntR."])
def test_what_is_no_plain_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p"):
        load_plain_pickle(path)


def test_a_reference_to_an_unknown_object_is_named(world: Path) -> None:
    folder = world / "refs/refcocog"
    document = json.loads((folder / "instances.json").read_text())
    (folder / "instances.json").write_text(json.dumps({**document, "annotations": document["annotations"][1:]}))
    with pytest.raises(ValueError, match=r"refs\(umd\).p, reference 0: .*ann_id 100"):
        list(read_referred_objects(folder, "refs(umd).p"))


def test_a_broken_instances_file_is_named(world: Path) -> None:
    folder = world / "refs/refcocog"
    (folder / "instances.json").write_text('{"images": [{"id": 1, "file_name": "a", "width": Infinity, "height": 1}]}')
    with pytest.raises(ValueError, match=r"instances\.json: field 'images\[0\]\.width': found inf"):
        list(read_referred_objects(folder, "refs(umd).p"))


IMAGE = f"coco/train2014/{coco_name(0)}"
RECORD = {"image": IMAGE, "expression": "it", "bbox": [1, 2, 3, 4.5], "width": 64, "height": 48}


def test_a_plain_json_list(world: Path) -> None:
    (world / "own.json").write_text(json.dumps([RECORD, {**RECORD, "id": 77}]))
    assert convert(world, "--json", str(world / "own.json"), "--name", "own") == 0
    rows = rows_of(world / "out/own.parquet")
    assert [row["id"] for row in rows] == ["0", "77"]
    assert rows[0]["box_xyxy_px"] == [1, 2, 3, 4.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 1, 4]}, "record 1, box: found"),
        ({"bbox": [1, 2, float("nan"), 4]}, "field '[1].bbox[2]': found nan"),
        ({"bbox": [70, 2, 80, 4]}, "leaves its 64 x 48 picture"),
        ({"bbox": [1, 2, 10**400, 4]}, "field '[1].bbox[2]'"),
        ({"bbox": [0.1, 0.2, 0.5, 1.0]}, "probably shares of the picture, expected pixels"),
        ({"bbox": [1, 2, 3]}, "field '[1].bbox': found [1, 2, 3]"),
        ({"bbox": None}, "field '[1].bbox': found None"),
        ({"bbox": "1234"}, "field '[1].bbox': found '1234'"),
        ({"expression": " "}, "field expression"),
        ({"expression": None}, "field '[1].expression': found None"),
        ({"width": float("inf")}, "field '[1].width': found inf"),
        ({"width": 64.9}, "field '[1].width': found 64.9"),
        ({"id": "0"}, "found the id '0' twice"),
        ({"image": "../refs/x.jpg"}, "which leads out of"),
        ({"image": "/etc/passwd"}, "which leads out of"),
        ({"image": "coco/none.jpg"}, "record 1, field image: there is no"),
        ({"width": 65}, "found 64 x 48 pixels, expected 65 x 48"),
    ],
)
def test_a_bad_record_is_named(
    world: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "own.json").write_text(json.dumps([RECORD, {**RECORD, **change}]))
    assert convert(world, "--json", str(world / "own.json"), "--name", "own") == 1
    assert message in capsys.readouterr().err
    assert not (world / "out").exists()


def test_the_prompt_is_the_one_of_the_training_data() -> None:
    sentence = "Please provide the bounding box coordinate of the region this sentence describes: small hole in door."
    assert prompt_of("small hole in door") == prompt_of("small hole in door.") == sentence


def test_a_row_may_not_leave_the_data_root(world: Path) -> None:
    row: Row = {"id": "0", "image": "../secret.png", "expression": "it", "box_xyxy_px": [0, 0, 1, 1], "width": 64,
                "height": 48}  # fmt: skip
    Image.new("RGB", SIZE_WH).save(world / "secret.png")
    with pytest.raises(ValueError, match="which leads out of"):
        load_image(row, world / "data")
    with pytest.raises(ValueError, match="found 64 x 48 pixels, expected 48 x 64"):
        load_image({**row, "image": IMAGE, "width": 48, "height": 64}, world / "data")


def test_a_picture_that_is_cut_off_is_refused_though_lmms_eval_lets_it_pass(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval leaves it
    path = world / "data" / IMAGE
    Image.effect_noise(SIZE_WH, 50).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    row: Row = {"id": "1", "image": IMAGE, "expression": "x", "box_xyxy_px": [0, 0, 9, 9], "width": 64, "height": 48}
    with pytest.raises(UnreadableImageError, match=f"{path}: cannot be decoded"):
        load_image(row, world / "data")
    assert ImageFile.LOAD_TRUNCATED_IMAGES
