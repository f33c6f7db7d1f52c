"""Which images are captioned and by what they are judged: all forms of files, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.captions.references import CAPTION_SETS, CaptionedImage, choose_set, image_files, read_references
from patch_aligned.record_files import RecordFileError

TWO = (CaptionedImage("9", "val/9.jpg", ("A dog.", "One dog.")), CaptionedImage("4", "val/4.jpg", ("Cats.",)))
COCO = {
    "info": {},
    "images": [{"id": 9, "file_name": "val/9.jpg"}, {"id": 4, "file_name": "val/4.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "A dog."},
        {"id": 2, "image_id": 4, "caption": "Cats."},
        {"id": 3, "image_id": 9, "caption": "One dog."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val", "filename": "9.jpg", "cocoid": 9, "split": "test",
         "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"]}, {"raw": "One dog."}]},
        {"filepath": "train", "filename": "1.jpg", "cocoid": 1, "split": "restval", "sentences": [{"raw": "A car."}]},
        {"filepath": "val", "filename": "4.jpg", "cocoid": 4, "split": "test", "sentences": [{"raw": "Cats."}]},
    ],
}  # fmt: skip


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_cocos_captions_are_put_to_their_images(tmp_path: Path) -> None:
    found = read_references(write(tmp_path / "captions_val2014.json", COCO))
    assert (found.images, found.split) == (TWO, "all")


def test_karpathys_file_gives_one_of_its_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    assert (read_references(path).images, read_references(path).split) == (TWO, "test")
    assert [image.image for image in read_references(path, "restval").images] == ["train/1.jpg"]
    with pytest.raises(ValueError, match=r"--split: found 'dev', expected one of restval, test as in"):
        read_references(path, "dev")


def test_records_of_one_image_are_put_together(tmp_path: Path) -> None:
    records = [{"image": "x.jpg", "captions": ["A dog.", "One dog."]}, {"image": "x.jpg", "caption": "Dog!"}]
    (image,) = read_references(write(tmp_path / "mine.json", records)).images
    assert image == CaptionedImage("x.jpg", "x.jpg", ("A dog.", "One dog.", "Dog!"))


def test_a_pad_file_has_a_caption_an_image(tmp_path: Path) -> None:
    path = tmp_path / "pad.jsonl"
    path.write_text('{"image_id": "0/x.jpg", "size": [4, 4], "caption": "A dog.", "labels": []}\n')
    assert read_references(path).images == (CaptionedImage("0/x.jpg", "0/x.jpg", ("A dog.",)),)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            {"images": COCO["images"], "annotations": []},
            "found no caption of val/9.jpg, val/4.jpg, expected one or more",
        ),
        ({"images": [], "annotations": COCO["annotations"]}, "found captions of images 9, 4, which 'images' lacks"),
        ({"images": COCO["images"] * 2, "annotations": COCO["annotations"]}, "found images 9, 4 twice"),
        ({"images": [{"id": 9}], "annotations": []}, r"field 'images\[0\]\.file_name': found nothing"),
        ({"images": [{"id": 9, "file_name": 3}], "annotations": []}, r"'images\[0\]\.file_name': found 3"),
        ({"annotations": []}, "found the keys annotations; expected 'images' among them"),
        ([{"image": "x.jpg", "captions": [" "]}], "found no caption of x.jpg"),
        ([{"image": "x.jpg"}], "record 0: field 'captions': found nothing"),
        ([{"image": "x.jpg", "captions": ["a", 3]}], r"record 0: field '.*\[1\]': found 3"),
        (["x.jpg"], "record 0: found 'x.jpg'"),
        ([], "found no images"),
    ],
)
def test_a_file_that_is_wrong_is_told_with_the_place(tmp_path: Path, document: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_references(write(tmp_path / "captions.json", document))


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "captions.json", COCO)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"captions\.json: found no JSON"):
        read_references(path)
    with pytest.raises(RecordFileError, match="found no such file"):
        read_references(tmp_path / "none.json")


def test_a_split_of_a_file_without_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--split: found 'test', but .* has no splits"):
        read_references(write(tmp_path / "captions.json", COCO), "test")


def test_missing_images_are_named_and_counted(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/4.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"found no val/9\.jpg, 1 of 2 images are there"):
        image_files(TWO, tmp_path)
    (tmp_path / "val/9.jpg").touch()
    assert image_files(TWO, tmp_path) == {"9": tmp_path / "val/9.jpg", "4": tmp_path / "val/4.jpg"}


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg"])
def test_images_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        image_files([CaptionedImage("x", name, ("A dog.",))], tmp_path)


def test_a_set_is_known_by_name_or_given_by_files(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.json", [])
    chosen = choose_set(None, mine, tmp_path)
    assert (chosen.name, chosen.references, chosen.image_folder) == ("captions_mine", mine, tmp_path)
    chosen = choose_set("captions_coco2014", mine, None)
    assert (chosen.references, chosen.image_folder) == (mine, CAPTION_SETS["captions_coco2014"].image_folder)
    with pytest.raises(ValueError, match="--benchmark: found 'captions_coco', expected one of captions_coco2014, "):
        choose_set("captions_coco", None, None)


def test_a_set_whose_file_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"next: python -m playground\.mini\.reference_captions"):
        choose_set("captions_mini", None, None)
