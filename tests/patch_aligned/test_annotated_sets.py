"""Readers of COCO's instances and of GranD-f give the masks that are drawn in the files, and name what is wrong."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from patch_aligned.annotated_sets import open_annotated_set
from patch_aligned.pad import AnnotatedImage, AnnotationError, Region

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


PARTS = [drawn(0, 0, 4, 4), drawn(10, 2, 14, 8)]
CAPTION = "a brown dog sleeps"
GROUNDED = {
    "file_name": "x.jpg",
    "caption": CAPTION,
    "groundings": {
        "a brown dog": {"token_positives": [0, 11], "rle_masks": [compressed(part) for part in PARTS]},
        "sleeps": {"token_positives": [12, 18], "rle_masks": []},
    },
}
POLYGONS = [polygon(0, 0, 4, 4), polygon(10, 2, 14, 8)]
REFERRED = {
    "12": {
        "img_file_name": "x.jpg",
        "caption": CAPTION,
        "refs": [{"sentence": "a brown dog", "segmentation": POLYGONS}, {"sentence": "sleeps", "segmentation": []}],
    }
}
TABLES = {
    "images": [{"id": 1, "file_name": "x.jpg", "width": WIDTH, "height": HEIGHT, "caption": CAPTION}],
    "annotations": [
        {"id": 1, "image_id": 1, "tokens_positive": [[0, 11]], "sam_mask": compressed(PARTS[0] | PARTS[1])},
        {"id": 2, "image_id": 1, "tokens_positive": [[12, 18]], "sam_mask": None},
    ],
    "categories": [{"id": 1, "name": "object"}],
}

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


@pytest.mark.parametrize("empty", [[[]], [[9.0, 9.0]], [[2, 2, 9, 9]], []])
def test_polygons_without_area_are_no_mask(tmp_path: Path, read: Opener, empty: list[Any]):
    document = coco_annotation(empty)
    assert [image.regions for image in read(document)] == [(), ()]
    assert open_annotated_set(tmp_path / "set.json", tmp_path).skipped == {"no mask": 1}
    [region] = read(coco_annotation([polygon(0, 0, 4, 4), *empty]))[0].regions
    np.testing.assert_array_equal(mask_of(region), drawn(0, 0, 4, 4))


def test_a_polygon_may_leave_the_image(read: Opener):
    [region] = read(coco_annotation([polygon(-3, -2, WIDTH + 5, 4)]))[0].regions
    np.testing.assert_array_equal(mask_of(region), drawn(0, 0, WIDTH, 4))


@pytest.mark.parametrize("name", ["set.JSON", "set.json.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_names_and_byte_order_marks_of_files_as_people_have_them(tmp_path: Path, name: str, mark: bytes):
    content = mark + json.dumps(coco()).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert len(list(open_annotated_set(tmp_path / name, tmp_path))) == 2


def test_broken_gzip_names_the_file(tmp_path: Path):
    (tmp_path / "set.json.gz").write_bytes(gzip.compress(json.dumps(coco()).encode())[:-20])
    with pytest.raises(ValueError, match=r"set\.json\.gz"):
        open_annotated_set(tmp_path / "set.json.gz", tmp_path, "coco")


ODD_VALUES = [None, [None]]


def values_below(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from values_below(inner, (*path, key))


def test_odd_values_anywhere_are_read_or_named(read: Opener, tmp_path: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "x.jpg")
    for document in (coco(), [GROUNDED], [REFERRED], TABLES):
        for path in values_below(document):
            for odd in ODD_VALUES:
                changed = copy.deepcopy(document)
                *above, last = path
                functools.reduce(lambda inner, key: inner[key], above, changed)[last] = odd
                (tmp_path / "set.json").unlink(missing_ok=True)  # faster than to truncate it
                try:
                    read(changed)
                except AnnotationError as error:
                    assert error.field
                except ValueError as error:
                    assert str(tmp_path) in str(error), (path, odd)


def test_the_three_shapes_of_grandf_give_the_same_regions(read: Opener, tmp_path: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "x.jpg")
    for document in ([GROUNDED], [REFERRED], TABLES):
        (image,) = read(document)
        assert (image.image_id, image.size_wh, image.caption) == ("x.jpg", (WIDTH, HEIGHT), CAPTION)
        (region,) = image.regions
        assert region.tag == "a brown dog"
        np.testing.assert_array_equal(mask_of(region), PARTS[0] | PARTS[1])
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
        (coco_annotation({"size": [HEIGHT, WIDTH], "counts": [3, 4]}), r"annotation 5 of 0+7\.jpg.*sum to 7 pixels"),
        (coco_annotation({"size": [HEIGHT, WIDTH], "counts": [-5, 245]}), r"annotation 5 of 0+7\.jpg.*\[-5, 245\]"),
        (coco_annotation([[math.nan, 2, 9, 2, 9, 9]]), r"annotation 5 of 0+7\.jpg.*nan"),
        (coco_annotation([[2.08e8, 2, 9, 2, 9, 9]]), r"annotation 5 of 0+7\.jpg.*208000000"),
        (coco_annotation([["2", 2, 9, 2, 9, 9]]), r"annotation 5 of 0+7\.jpg.*'2'"),
        (coco_annotation(5), r"annotation 5 of 0+7\.jpg.*found 5"),
        (
            coco(images=[coco()["images"][0] | {"width": 1 << 40}], annotations=[]),
            r"image 7, fields 'width'.*1099511627776",
        ),
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
