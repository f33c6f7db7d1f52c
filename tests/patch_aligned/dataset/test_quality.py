"""`quality`: what was done to a PAD file comes back as figures, and pairs are those of a search through all."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.quality import name_rule, pair_regions
from patch_aligned.intervals import wilson_interval
from patch_aligned.masks import rle_of_mask
from patch_aligned.pad import AnnotatedImage, Region, read_annotations, write_annotations
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]
Rows = dict[tuple[str, str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of the miniature, whose masks are exact and apart from each other, with their PAD file."""
    from playground.mini.scene_records import DatasetSettings, write_scene

    folder = tmp_path_factory.mktemp("scenes")
    chosen = DatasetSettings(count=12, seed=3, style="full")
    records = [record for index in range(chosen.count) for record in write_scene(chosen, index, folder)["pad"]]
    (folder / "pad.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(tmp_path / "cache"))


def run(*words: Any, fails: bool = False) -> str:
    result = CliRunner().invoke(app, ["quality", *map(str, words)])
    assert result.exit_code == (2 if fails else 0), result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def measured(pad: Path, *words: Any) -> tuple[Rows, dict[str, Any]]:
    """The figures of the report by file, kind and name of the group, and figure; and the whole report."""
    run(pad, *words)
    report = json.loads((pad.with_name(pad.name + ".quality") / "quality.json").read_text())
    return {(row["file"], row["by"], row["name"], row["figure"]): row for row in report["figures"]}, report


def decoded(image: AnnotatedImage, region: Region) -> np.ndarray:
    return coco_mask.decode({"size": list(image.size_wh[::-1]), "counts": region.rle_mask.encode()}).astype(bool)


def shrunk(mask: np.ndarray, share: float) -> np.ndarray:
    """The first pixels of a mask, column by column."""
    flat = mask.ravel(order="F").copy()
    flat[np.flatnonzero(flat)[round(share * flat.sum()) :]] = False
    return flat.reshape(mask.shape, order="F")


# --- what was done to a file comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "cut"), [(0.0, 0.0), (0.1, 0.2), (0.3, 0.0), (0.3, 0.5)])
def test_wrong_labels_and_shrunk_masks_come_back_exactly(scenes: Path, tmp_path: Path, wrong: float, cut: float):
    """Some names are replaced, some masks lose a fifth of their pixels, others three fifths, which no pair survives."""
    rng = np.random.default_rng(0)
    images, done = list(read_annotations(scenes / "pad.json")), []
    names = sorted({region.tag for image in images for region in image.regions})
    corrupted = []
    for image in images:
        regions = []
        for region in image.regions:
            mask = decoded(image, region)
            keeps = rng.choice([0.8, 0.4]) if rng.random() < cut else 1.0
            smaller = shrunk(mask, keeps)
            is_wrong = rng.random() < wrong
            tag = str(rng.choice([name for name in names if name != region.tag])) if is_wrong else region.tag.upper()
            regions.append(replace(region, tag=tag, rle_mask=rle_of_mask(smaller)))
            size = "small" if mask.sum() < 32**2 else "medium" if mask.sum() < 96**2 else "large"
            iou = smaller.sum() / mask.sum()
            done.append((region.tag, size, bool(iou >= 0.5), not is_wrong, iou, smaller.sum(), mask.size))
        corrupted.append(replace(image, regions=tuple(regions)))
    write_annotations(corrupted, tmp_path / "pad.jsonl")
    found, report = measured(tmp_path / "pad.jsonl", "--truth", scenes / "pad.json", "--image-folder", scenes)
    assert wrong == 0 or 0 < sum(not right for _, _, _, right, *_ in done) < len(done)

    def check(by: str, name: str, own: Sequence[Any]) -> None:
        met = [one for one in own if one[2]]
        both = sum(one[3] for one in met)
        expected = {
            "recall": (len(met), len(own)), "recall by name": (both, len(own)), "named right": (both, len(met)),
            "mask IoU": (sum(one[4] for one in met), len(met)),
        }  # fmt: skip
        for figure, (above, below) in expected.items():
            row = found["truth", by, name, figure]
            assert row["of"] == below
            assert row["value"] == (pytest.approx(above / below, abs=1e-9) if below else None)
            assert not below or row["low"] is None or row["low"] <= row["value"] + 1e-9 <= row["high"] + 2e-9

    check("overall", "all", done)
    for index, by in ((0, "label"), (1, "size")):
        for name in {one[index] for one in done}:
            check(by, name.casefold(), [one for one in done if one[index] == name])
    met = sum(one[2] for one in done)
    precision = found["PAD", "overall", "all", "precision of labels"]
    assert (precision["of"], round(precision["value"] * met)) == (met, sum(one[2] and one[3] for one in done))
    assert found["PAD", "overall", "all", "on an instance"]["value"] == pytest.approx(met / len(done), abs=1e-9)
    pixels = sum(decoded(image, image.regions[0]).size for image in images)
    labelled = found["PAD", "pixels", "all", "share labelled"]
    assert labelled["value"] == pytest.approx(sum(one[5] for one in done) / pixels, abs=1e-9)
    assert report["names"] == "exact" and report["images in both"] == 12


def test_two_files_are_measured_alike_and_none_is_called_truth(scenes: Path, tmp_path: Path):
    images = list(read_annotations(scenes / "pad.json"))
    fewer = [replace(image, regions=image.regions[1:]) for image in images[:10]]
    write_annotations(images[1:], tmp_path / "more.jsonl")
    write_annotations(fewer, tmp_path / "fewer.jsonl")
    one, report = measured(tmp_path / "more.jsonl", "--against", tmp_path / "fewer.jsonl", "--image-folder", scenes)
    other, _ = measured(tmp_path / "fewer.jsonl", "--against", tmp_path / "more.jsonl", "--image-folder", scenes)
    swap = {"A": "B", "B": "A"}
    assert {(swap[file], *rest): row | {"file": swap[file]} for (file, *rest), row in one.items()} == other
    regions = sum(len(image.regions) for image in images[1:10])
    assert one["A", "overall", "all", "in the other file"]["of"] == regions
    assert one["B", "overall", "all", "in the other file"]["of"] == regions - 9
    assert one["A", "overall", "all", "in the other file"]["value"] == pytest.approx(1 - 9 / regions)
    assert one["B", "overall", "all", "in the other file"]["value"] == 1
    assert (report["images only in A"], report["images only in B"]) == (2, 1)
    page = (tmp_path / "more.jsonl.quality" / "quality.html").read_text()
    facts_and_tables = page[page.index("<main>") : page.index("What the columns mean")]
    assert "truth" not in facts_and_tables and "wrong" not in facts_and_tables


# --- pairs ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2**32))
@settings(max_examples=150)
def test_pairs_are_the_best_of_all(rows: int, columns: int, seed: int):
    rng = np.random.default_rng(seed)
    tenths, same = rng.integers(3, 9, (rows, columns)), rng.random((rows, columns)) < 0.4

    def worth(pairs: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
        return len(pairs), sum(int(tenths[pair]) for pair in pairs), sum(bool(same[pair]) for pair in pairs)

    choices = [
        list(zip(some, others, strict=True))
        for size in range(min(rows, columns) + 1)
        for some in itertools.combinations(range(rows), size)
        for others in itertools.permutations(range(columns), size)
    ]
    choices = [pairs for pairs in choices if all(tenths[pair] >= 5 for pair in pairs)]
    found = pair_regions(tenths / 10, same)
    assert worth(found) == max(map(worth, choices))
    assert found in choices


def test_an_image_of_many_regions_is_paired(write_pad: Make, tmp_path: Path):
    """More than 255 masks, which overflow a byte in pycocotools with numpy 2; the same mask twice under two names."""
    cells = [label(x, y, x + 2, y + 2, f"column {x % 3}") for x in range(0, 96, 4) for y in range(0, 64, 4)]
    pad = write_pad(record("a.png", *cells, cells[0] | {"tag": "twin"}))
    found, _ = measured(pad, "--truth", pad, "--image-folder", tmp_path / "images")
    row = found["truth", "overall", "all", "recall by name"]
    assert (row["of"], row["value"]) == (385, 1)


# --- truths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's instances of two images of 96 x 64: a cat, a dog, a crowd of people in columns 60 to 95; a bird."""
    crowd = {"size": [64, 96], "counts": [60 * 64, 36 * 64]}  # run lengths as a list, column by column
    document = {
        "images": [{"id": n, "file_name": f"{name}.png", "width": 96, "height": 64} for n, name in enumerate("ab")],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("cat", "dog", "person", "bird"))],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 0, "iscrowd": 0, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]},
            {"id": 2, "image_id": 0, "category_id": 1, "iscrowd": 0, "segmentation": [[30, 0, 50, 0, 50, 20, 30, 20]]},
            {"id": 3, "image_id": 0, "category_id": 2, "iscrowd": 1, "segmentation": crowd},
            {"id": 4, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]},
        ],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    return path


def test_crowds_of_coco_are_neither_missed_nor_wrong(coco: Path, write_pad: Make, tmp_path: Path):
    pad = write_pad(
        record(
            "a.png",
            label(0, 0, 20, 20, "cat"),
            label(62, 10, 70, 30, "man"),  # in the crowd
            label(50, 30, 70, 40, "half"),  # half in it
            label(51, 50, 69, 60, "less"),  # eighteen columns, nine in it
            label(49, 42, 70, 48, "outside"),  # eleven of its 21 columns are outside
        )
    )
    found, report = measured(pad, "--truth", coco, "--image-folder", tmp_path / "images")
    recall = found["truth", "overall", "all", "recall"]
    assert (recall["of"], recall["value"]) == (2, 0.5)
    assert ("truth", "label", "person", "recall") not in found
    on_instance = found["PAD", "overall", "all", "on an instance"]
    assert (on_instance["of"], on_instance["value"]) == (2, 0.5)  # the cat, and what is outside
    assert {name for file, by, name, _ in found if (file, by) == ("PAD", "label")} == {"cat", "outside"}
    assert found["truth", "pixels", "all", "share labelled"]["value"] == pytest.approx((800 + 36 * 64) / (96 * 64))
    assert (report["images only in truth"], report["images in both"]) == (1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_matches_misses_and_crowds_are_those_of_cocos_own_evaluation(write_pad: Make, tmp_path: Path, seed: int):
    """Of boxes that do not overlap, so that COCO's greedy matching is the best one; a crowd covers the right half."""
    rng = np.random.default_rng(seed)
    drawn, regions = [], []
    for x, y in itertools.product(range(0, 96, 16), range(0, 64, 16)):
        width, height = map(int, rng.integers(8, 16, 2))
        if x < 48 and rng.random() < 0.7:
            drawn.append([x, y, x + width, y + height])
        if rng.random() < 0.7:
            regions.append(label(x, y, x + int(rng.integers(5, 16)), y + int(rng.integers(5, 16))))
    crowd = label(40, 0, 96, 64)["rle_mask"]
    common = {"image_id": 1, "category_id": 1, "area": 1.0, "bbox": [0, 0, 1, 1]}
    truth = [
        common | {"id": n, "iscrowd": int(n == 1), "segmentation": {"size": [64, 96], "counts": mask}}
        for n, mask in enumerate([crowd, *(label(*box)["rle_mask"] for box in drawn)], start=1)
    ]
    image = {"id": 1, "file_name": "a.png", "width": 96, "height": 64}
    document = {"images": [image], "annotations": truth, "categories": [{"id": 1, "name": "box"}]}
    (tmp_path / "instances.json").write_text(json.dumps(document))
    masks = [{"size": [64, 96], "counts": region["rle_mask"]} for region in regions]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "instances.json")
        results = [{"image_id": 1, "category_id": 1, "segmentation": mask, "score": 1.0} for mask in masks]
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.iouThrs, evaluation.params.areaRng = np.array([0.5]), [[0, 1e10]]
        evaluation.evaluate()
    [theirs] = evaluation.evalImgs
    counted, matched = ~theirs["dtIgnore"][0].astype(bool), theirs["dtMatches"][0] > 0
    pad = write_pad(record("a.png", *regions))
    found, _ = measured(pad, "--truth", tmp_path / "instances.json", "--image-folder", tmp_path / "images")
    recall, on_instance = found["truth", "overall", "all", "recall"], found["PAD", "overall", "all", "on an instance"]
    assert 0 < counted.sum() < len(regions)
    assert (recall["of"], on_instance["of"]) == (len(drawn), counted.sum())
    for row in (recall, on_instance):
        assert round(row["value"] * row["of"]) == (matched & counted).sum()


def test_images_of_one_file_alone_are_counted_and_change_nothing(coco: Path, write_pad: Make, tmp_path: Path):
    both = record("a.png", label(0, 0, 20, 20, "cat"))
    folder = ("--image-folder", tmp_path / "images")
    alone, _ = measured(write_pad(both), "--truth", coco, *folder)
    found, report = measured(write_pad(both, record("c.png", label(0, 0, 9, 9))), "--truth", coco, *folder)
    assert found == alone
    assert [report[f"images {of}"] for of in ("in both", "only in PAD", "only in truth")] == [1, 1, 1]
    elsewhere = write_pad(record("c.png"))
    assert "no image in both" in run(elsewhere, "--truth", coco, *folder, fails=True)


def test_an_image_of_two_sizes_is_refused(coco: Path, write_pad: Make):
    pad = write_pad(record("a.png", size=[64, 96]))
    assert "a.png" in (said := run(pad, "--truth", coco, fails=True)) and "swapped" in said


def test_where_nothing_is_there_is_no_figure(write_pad: Make, tmp_path: Path):
    nothing = write_pad(record("a.png"), record("b.png")).rename(tmp_path / "nothing.json")
    pad = write_pad(record("a.png", label(0, 0, 32, 32, "x")), record("b.png"))  # of 32 x 32 pixels: medium
    folder = ("--image-folder", tmp_path / "images")
    found, _ = measured(pad, "--truth", nothing, *folder)
    assert found["PAD", "size", "medium", "on an instance"]["value"] == 0
    assert found["PAD", "overall", "all", "precision of labels"]["value"] is None
    assert not [file for file, by, *_ in found if file == "truth" and by != "pixels"]
    assert {by for _, by, *_ in measured(nothing, "--truth", nothing, *folder)[0]} == {"pixels"}
    assert measured(nothing, "--truth", pad, *folder)[0]["truth", "overall", "all", "recall"]["value"] == 0


def test_a_broken_record_stops_rather_than_being_left_out(write_pad: Make, tmp_path: Path):
    broken = record("b.png", label(0, 0, 9, 9) | {"rle_mask": "0"})
    pad = write_pad(record("a.png"), broken)
    for mode in (("--truth", pad), ("--spot-check", tmp_path / "answers", "--port", 0)):
        assert "'b.png'" in run(pad, *mode, fails=True)


# --- names ------------------------------------------------------------------------------------------------------------


def test_synonyms_are_names_of_one_entry(coco: Path, write_pad: Make, tmp_path: Path):
    pad = write_pad(record("a.png", label(0, 0, 20, 20, "Kitty"), label(30, 0, 50, 20, "puppy")))
    words = (pad, "--truth", coco, "--image-folder", tmp_path / "images")
    synonyms = tmp_path / "synonyms.json"
    for content, right in (
        ({}, 0), ({"cat": ["kitty"]}, 1), ({"pet": ["kitty", " CAT ", "dog"]}, 1),
        ({"kitty": ["cat"], "dog": ["puppy"]}, 2), ({"puppy": ["hound"], "dog": ["hound"]}, 0),
    ):  # fmt: skip
        synonyms.write_text(json.dumps(content))
        found, report = measured(*words, "--synonyms", synonyms)
        assert found["PAD", "overall", "all", "precision of labels"]["value"] == right / 2, content
        assert report["names"].startswith("synonyms") and "synonyms.json" in report["names"]
    synonyms.write_text('{"cat": "kitty"}')
    assert "'cat'" in run(*words, "--synonyms", synonyms, fails=True)


def test_embeddings_decide_by_their_cosine(golden_world: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = AutoModelForCausalLM.from_pretrained("tiny-vicuna").get_input_embeddings().weight.detach()
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")

    def mean(name: str) -> torch.Tensor:
        return table[tokenizer(name, add_special_tokens=False)["input_ids"]].mean(dim=0)

    cosine = float(torch.cosine_similarity(mean("red car"), mean("dog"), dim=0))
    for threshold, expected in ((cosine - 1e-4, True), (cosine + 1e-4, False)):
        rule, same = name_rule(None, "tiny-vicuna", threshold)
        assert same("Red  car", "dog") is same("dog", "red car") is expected
        assert same("dog", " DOG") is True
        assert "tiny-vicuna" in rule and f"{threshold:g}" in rule


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_worst_image_is_shown_with_what_is_wrong(write_pad: Make, tmp_path: Path):
    attack = "</script><img src=x onerror=alert(1)>"
    truth = write_pad(
        record("good.png", label(0, 0, 9, 9, "cat")),
        record("bad.png", label(0, 0, 20, 20, "cat"), label(30, 0, 50, 20, attack), label(60, 0, 80, 20, "cow")),
    ).rename(tmp_path / "truth.json")
    pad = write_pad(
        record("good.png", label(0, 0, 9, 9, "cat")),
        record("bad.png", label(0, 0, 20, 20, "cat"), label(30, 0, 50, 20, "dog"), label(0, 40, 20, 60, "sky")),
    )
    run(pad, "--truth", truth, "--image-folder", tmp_path / "images")
    folder = tmp_path / "pad.json.quality"
    [worst] = read_annotations(folder / "worst.jsonl")
    assert worst.image_id == "bad.png" and "1 of 3" in worst.caption
    tags = Counter(region.tag for region in worst.regions)
    assert tags == Counter(["both: cat", f"PAD: dog, truth: {attack}", "only truth: cow", "only PAD: sky"])
    for name in ("quality.html", "worst.html"):
        text = (folder / name).read_text()
        assert "<img src=x" not in text and "default-src 'none'" in text
    assert "script-src 'none'" in (folder / "quality.html").read_text()
    assert 'href="worst.html"' in (folder / "quality.html").read_text()


def test_tables_begin_with_the_worst_label_that_both_files_know(write_pad: Make, tmp_path: Path):
    boxes = [(0, 0, 20, 20), (30, 0, 50, 20), (60, 0, 80, 20), (0, 40, 20, 60)]
    tags = (("dog", "cat", "cat", "sky"), ("cow", "cat", "cow", None))
    both = [[label(*box, tag) for box, tag in zip(boxes, own, strict=True) if tag] for own in tags]
    truth = write_pad(record("a.png", *both[1])).rename(tmp_path / "truth.json")
    pad = write_pad(record("a.png", *both[0]))
    run(pad, "--truth", truth, "--image-folder", tmp_path / "images")
    page = (tmp_path / "pad.json.quality" / "quality.html").read_text()
    tables = {
        title: re.findall(r'scope="row">(.*?)</th>', rest)
        for title, rest in re.findall(r"<h2>(.*?)</h2>\s*(.*?)</table>", page, re.DOTALL)
    }
    assert tables["PAD: label"] == ["dog", "cat", "sky"]  # nobody asked the truth about the sky
    assert tables["truth: label"] == ["cow", "cat"]


def test_one_way_of_measuring_and_one_rule_for_names_is_chosen(write_pad: Make):
    pad = write_pad(record("a.png"))
    assert "--truth" in run(pad, fails=True)
    assert "--truth" in run(pad, "--truth", pad, "--against", pad, fails=True)
    assert "--synonyms" in run(pad, "--truth", pad, "--synonyms", pad, "--words", "x", fails=True)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 20), (7, 20), (150, 200), (200, 200)])
def test_wilsons_interval_ends_where_the_normal_test_does(hits: int, trials: int):
    """Each end p within (0, 1) solves |hits / trials - p| = 1.96 sqrt(p (1 - p) / trials)."""
    low, high = wilson_interval(hits, trials)
    assert 0 <= low <= hits / trials + 1e-12 and hits / trials - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            distance = 1.959963984540054 * (end * (1 - end) / trials) ** 0.5
            assert abs(hits / trials - end) == pytest.approx(distance, rel=1e-9)
    assert (low < 1e-9) == (hits == 0) and (high > 1 - 1e-9) == (hits == trials)
