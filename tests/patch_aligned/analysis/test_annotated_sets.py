"""Readers of COCO's instances and of GranD-f give the masks that are drawn in the files, and name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from patch_aligned.analysis.sets import open_annotated_set
from patch_aligned.pad import AnnotatedImage, Region

WIDTH, HEIGHT = 20, 12


def drawn(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask


def polygon(left: int, top: int, right: int, bottom: int) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def listed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as a list, as COCO writes its crowds."""
    pixels = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, len(pixels)]).tolist()}


def mask_of(region: Region) -> np.ndarray:
    return coco_mask.decode({"size": [HEIGHT, WIDTH], "counts": region.rle_mask.encode()})


def coco(**changed: Any) -> dict[str, Any]:
    """Two images; a dog of two polygons, a cup by an RLE, a crowd, and one annotation without a mask."""
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0,
         "segmentation": [polygon(0, 0, 4, 4), polygon(10, 2, 14, 8)]},
        {"id": 2, "image_id": 9, "category_id": 47, "iscrowd": 0, "segmentation": listed(drawn(2, 2, 6, 9))},
        {"id": 3, "image_id": 9, "category_id": 18, "iscrowd": 1, "segmentation": listed(drawn(0, 0, 20, 2))},
        {"id": 4, "image_id": 9, "category_id": 18, "segmentation": []},
    ]  # fmt: skip
    images = [
        {"id": 7, "file_name": "000000000007.jpg", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "000000000009.jpg", "width": WIDTH, "height": HEIGHT},
    ]
    categories = [{"id": 18, "name": "dog"}, {"id": 47, "name": "cup"}]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}} | changed


def coco_annotation(segmentation: Any) -> dict[str, Any]:
    return coco(annotations=[{"id": 5, "image_id": 7, "category_id": 18, "segmentation": segmentation}])


Opener = Callable[..., list[AnnotatedImage]]


@pytest.fixture
def read(tmp_path: Path) -> Opener:
    def open_and_read(document: Any, format: str = "auto") -> list[AnnotatedImage]:
        path = tmp_path / "set.json"
        path.write_text(json.dumps(document))
        return list(open_annotated_set(path, tmp_path, format))

    return open_and_read


def test_coco_gives_names_masks_and_boxes(read: Opener):
    first, second = read(coco())
    assert (first.image_id, first.size_wh) == ("000000000007.jpg", (WIDTH, HEIGHT))
    (dog,) = first.regions
    assert dog.tag == "dog"
    np.testing.assert_array_equal(mask_of(dog), drawn(0, 0, 4, 4) | drawn(10, 2, 14, 8))
    assert dog.bbox_xyxy_px == (0, 0, 14, 8)
    (cup,) = second.regions
    assert cup.tag == "cup"
    np.testing.assert_array_equal(mask_of(cup), drawn(2, 2, 6, 9))
    assert cup.bbox_xyxy_px == (2, 2, 6, 9)


def test_crowds_and_annotations_without_mask_are_counted(tmp_path: Path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(coco()))
    annotated = open_annotated_set(path, tmp_path)
    assert (annotated.format, annotated.skipped) == ("coco", {"crowd": 1, "no mask": 1})
    assert [image.image_id for image in annotated] == [image.image_id for image in annotated]  # a second pass


def test_the_three_shapes_of_grandf_give_the_same_regions(read: Opener, tmp_path: Path):
    parts = [drawn(0, 0, 4, 4), drawn(10, 2, 14, 8)]
    caption = "a brown dog sleeps"
    grounded = {
        "file_name": "x.jpg",
        "caption": caption,
        "groundings": {
            "a brown dog": {"token_positives": [0, 11], "rle_masks": [compressed(part) for part in parts]},
            "sleeps": {"token_positives": [12, 18], "rle_masks": []},
        },
    }
    polygons = [polygon(0, 0, 4, 4), polygon(10, 2, 14, 8)]
    referred = {
        "12": {
            "img_file_name": "x.jpg",
            "caption": caption,
            "refs": [{"sentence": "a brown dog", "segmentation": polygons}, {"sentence": "sleeps", "segmentation": []}],
        }
    }
    tables = {
        "images": [{"id": 1, "file_name": "x.jpg", "width": WIDTH, "height": HEIGHT, "caption": caption}],
        "annotations": [
            {"id": 1, "image_id": 1, "tokens_positive": [[0, 11]], "sam_mask": compressed(parts[0] | parts[1])},
            {"id": 2, "image_id": 1, "tokens_positive": [[12, 18]], "sam_mask": None},
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "x.jpg")
    for document in ([grounded], [referred], tables):
        (image,) = read(document)
        assert (image.image_id, image.size_wh, image.caption) == ("x.jpg", (WIDTH, HEIGHT), caption)
        (region,) = image.regions
        assert region.tag == "a brown dog"
        np.testing.assert_array_equal(mask_of(region), parts[0] | parts[1])
        assert open_annotated_set(tmp_path / "set.json", tmp_path).skipped == {"no phrase or no mask": 1}


def test_captions_of_one_image_share_its_record(read: Opener):
    def caption(text: str, phrase: str) -> dict[str, Any]:
        grounding = {phrase: {"token_positives": [0, 1], "rle_masks": [compressed(drawn(0, 0, 4, 4))]}}
        return {"file_name": "x.jpg", "caption": text, "groundings": grounding}

    (image,) = read([caption("a dog", "dog"), caption("grass", "the grass")])
    assert (image.caption, [region.tag for region in image.regions]) == ("a dog", ["dog", "the grass"])


def test_pad_is_read_as_before(read: Opener):
    record = {"image_id": "a.jpg", "size": [WIDTH, HEIGHT], "caption": "a dog", "labels": []}
    assert [image.image_id for image in read([record])] == ["a.jpg"]
    assert read([]) == []


def test_a_random_subset_hangs_on_ids_and_seed_alone(tmp_path: Path):
    images = [{"image_id": f"{index}.jpg", "size": [WIDTH, HEIGHT], "caption": "", "labels": []} for index in range(50)]
    forward, backward = tmp_path / "forward.json", tmp_path / "backward.jsonl"
    forward.write_text(json.dumps(images))
    backward.write_text("\n".join(map(json.dumps, reversed(images))))

    def subset(path: Path, seed: int) -> list[str]:
        return [image.image_id for image in open_annotated_set(path, tmp_path).choose(10, "random", seed)]

    assert len(subset(forward, 0)) == 10
    assert subset(forward, 0) == subset(backward, 0)[::-1]
    assert set(subset(forward, 0)) != set(subset(forward, 1))
    assert subset(forward, 0) != [f"{index}.jpg" for index in range(10)]
    assert subset(forward, 0)[:3] == ["2.jpg", "8.jpg", "9.jpg"]  # pinned: a published subset can be had again
    assert len(open_annotated_set(forward, tmp_path).choose(80, "random")) == 50


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"images": [], "annotations": []}, r"lists images, annotations, categories"),
        (coco(categories=[]), r"annotation 1, field 'category_id': found 18, expected one of the 0"),
        (coco(images=[]), r"annotation 1, field 'image_id': found 7"),
        (coco(categories=[{"id": 18}]), r"set\.json: category 18, field 'name': found none"),
        (coco(images=[{"id": 7, "file_name": "a.jpg"}], annotations=[]), r"image 7, field 'width': found none"),
        (coco(images=[{"file_name": "a.jpg"}]), r"an image, field 'id': found none"),
        (coco(images=coco()["images"] * 2), r"an image, field 'id': found 7 a second time"),
        (coco(images=[coco()["images"][0], coco()["images"][0] | {"id": 9}]), r"'file_name': found '0+7\.jpg' a sec"),
        (coco(categories=[*coco()["categories"], {"id": 18, "name": "wolf"}]), r"category, field 'id': found 18 a sec"),
        (coco_annotation([[1, 2, 3]]), r"annotation 5 of 000000000007.jpg.*found \[1, 2, 3\].*polygon"),
        (coco_annotation("k5d4"), r"found 'k5d4', expected polygons or an RLE"),
        (coco_annotation({"size": [WIDTH, HEIGHT], "counts": [240]}), r"mask of size \[20, 12\].*\[12, 20\]"),
        (coco_annotation({"size": [HEIGHT, WIDTH], "counts": "zz"}), r"a character that no RLE string has"),
        (coco_annotation({"size": [HEIGHT, WIDTH], "counts": "d0"}), r"runs that sum to \d+ pixels"),
        (coco_annotation({"size": [HEIGHT, WIDTH], "counts": [3, 4]}), r"labels\[0\].rle_mask.*sum to 7 pixels"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_named(read: Opener, document: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read(document)


def test_what_is_wrong_with_a_grandf_file_is_named(read: Opener, tmp_path: Path):
    grounded = {"file_name": "x.jpg", "caption": "", "groundings": {}}
    with pytest.raises(ValueError, match=r"record 1: found neither 'groundings' nor 'refs'"):
        read([grounded, {"file_name": "y.jpg"}])
    with pytest.raises(ValueError, match="no file of GranD-f"):
        read(coco(), format="grandf")
    unsized = {"a dog": {"rle_masks": [{"counts": "d0"}]}}
    with pytest.raises(ValueError, match=r"record 0, rle_masks, field 'size': found none"):
        read([grounded | {"groundings": unsized}])
    with pytest.raises(ValueError, match=r"image 1, field 'height': found none"):
        read(
            {
                "images": [{"id": 1, "file_name": "x.jpg", "width": 4}],
                "annotations": [{"image_id": 1, "sam_mask": None}],
            }
        )
    image = {"id": 1, "file_name": "x.jpg", "width": 4, "height": 4}
    with pytest.raises(ValueError, match=r"field 'id': found 1 a second time"):
        read({"images": [image, image | {"file_name": "y.jpg"}], "annotations": [{"image_id": 1, "sam_mask": None}]})
    escaping = {"1": {"img_file_name": "../x.jpg", "caption": "", "refs": []}}
    with pytest.raises(ValueError, match="leads out of"):
        read([escaping])
    with pytest.raises(ValueError, match=r"no file .*x\.jpg"):
        read([{"1": {"img_file_name": "x.jpg", "caption": "", "refs": []}}])


def test_what_is_no_set_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file of annotations"):
        open_annotated_set(tmp_path / "none.json", tmp_path)
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="found no JSON"):
        open_annotated_set(tmp_path / "broken.json", tmp_path)
    with pytest.raises(ValueError, match=r"'voc'.*auto, pad, coco, grandf"):
        open_annotated_set(tmp_path / "broken.json", tmp_path, "voc")
