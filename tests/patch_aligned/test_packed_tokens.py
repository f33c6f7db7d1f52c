"""Packed covered tokens: the same as from the masks, to the last bit, and never those of another run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llava.image_geometry import ImageGeometry
from patch_aligned.cli import app
from patch_aligned.masks import PatchMaskError, covered_tokens_of_regions
from patch_aligned.packed_tokens import (
    PackedFor,
    PackedTokens,
    PackedTokensError,
    default_pack_path,
    open_packed_tokens,
    pack_tokens,
)
from patch_aligned.pad import open_annotation_index
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.plugin import PatchAlignedPlugin

GEOMETRIES = {
    "clip, square": ImageGeometry.of("square", (1, 1), 28, (4, 4)),
    "clip, pad": ImageGeometry.of("pad", (1, 1), 28, (4, 4)),
    "another shortest edge": ImageGeometry.of("square", (1, 1), 28, (7, 7), shortest_edge=32),
    "siglip": ImageGeometry((1, 1), 27, "squeeze", (3, 3), processed_side=28),
}


def at(geometry: ImageGeometry, size_wh: tuple[int, int]) -> ImageGeometry:
    return PackedFor.of(geometry, 0.5).geometry_of(size_wh)


def make_record(number: int) -> dict[str, Any]:
    """An image of one of a few sizes with up to four blobs, some of which cover no token."""
    rng = np.random.default_rng(number)
    width, height = 20 + 7 * (number % 5), 24 + 3 * (number % 3)
    labels = []
    for place in range(number % 5):
        mask = np.zeros((height, width), dtype=np.uint8)
        left, top = int(rng.integers(width)), int(rng.integers(height))
        mask[top : top + int(rng.integers(1, height)), left : left + int(rng.integers(1, width))] = 1
        rle_mask = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        labels.append({"tag": ("water", "traffic light", "dog")[place % 3], "bbox": [0, 0, 1, 1], "rle_mask": rle_mask})
    return {"image_id": f"{number}.jpg", "size": [width, height], "caption": "a lake", "labels": labels}


RECORDS = [make_record(number) for number in range(300)]  # more than one batch of the index


@pytest.fixture(scope="module")
def pad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pad") / "pad.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture(scope="module")
def index(pad: Path) -> Any:
    return open_annotation_index(pad, pad.parent / "cache")


def opened(index: Any, path: Path | None, min_coverage: float = 0.5) -> PackedTokens:
    pack = open_packed_tokens(index, path, min_coverage)
    assert pack is not None
    return pack


@pytest.fixture
def own_pad(pad: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copy2(pad, tmp_path / "own.json"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "goldens" / "llava" / "tiny-vicuna")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_row_has_the_tags_and_tokens_of_its_masks(index: Any, tmp_path: Path, name: str) -> None:
    geometry, path = GEOMETRIES[name], tmp_path / "pack.arrow"
    pack_tokens(index, PackedFor.of(geometry, 0.4), path)
    pack = pickle.loads(pickle.dumps(opened(index, path, 0.4)))
    for record in RECORDS:
        size_wh, row = tuple(record["size"]), index.find(record["image_id"])
        found = pack.read(row, record["image_id"], at(geometry, size_wh))
        masks = [label["rle_mask"] for label in record["labels"]]
        expected = covered_tokens_of_regions(masks, size_wh, at(geometry, size_wh), 0.4)
        assert found.covered.dtype == expected.dtype == bool
        np.testing.assert_array_equal(found.covered, expected)
        assert found.tags == [label["tag"] for label in record["labels"]]


@given(
    st.sampled_from(["square", "pad", "anyres"]),
    st.integers(1, 40),
    st.integers(1, 6),
    st.none() | st.integers(30, 50),
    st.none() | st.integers(30, 50),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
@settings(max_examples=100, deadline=None)
def test_a_geometry_is_the_same_with_its_defaults_written_out(
    aspect: str, side: int, grid: int, edge: int | None, output: int | None, size_wh: tuple[int, int]
) -> None:
    mode = ImageGeometry.of(aspect, size_wh, side, (grid, grid)).mode
    geometry = ImageGeometry(size_wh, side, mode, (grid, grid), edge, output)
    written_out = PackedFor.of(geometry, 0.5).geometry_of(size_wh)
    for found, expected in zip(written_out.area_tables(), geometry.area_tables(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_region_takes_72_bytes_at_24_by_24_tokens(index: Any, tmp_path: Path) -> None:
    packed_for = PackedFor.of(ImageGeometry.of("square", (1, 1), 336, (24, 24)), 0.5)
    pack_tokens(index, packed_for, tmp_path / "pack.arrow")
    with pa.OSFile(str(tmp_path / "pack.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    tokens = table.column("tokens").combine_chunks()
    assert tokens.values.type.byte_width == 72
    assert len(tokens.values) == index.regions == sum(len(record["labels"]) for record in RECORDS)


def test_workers_write_the_same_bytes(index: Any, tmp_path: Path) -> None:
    packed_for = PackedFor.of(GEOMETRIES["clip, square"], 0.5)
    pack_tokens(index, packed_for, tmp_path / "one.arrow")
    pack_tokens(index, packed_for, tmp_path / "two.arrow", workers=2)
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "two.arrow").read_bytes()


class KillsItsReader:
    """An index that ends the process which unpickles it, as the system does where memory runs out."""

    regions, batches = 1, 4

    def __init__(self, source: Path) -> None:
        self.source = source

    def __len__(self) -> int:
        return 1

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_worker_that_is_killed_is_an_error_not_a_wait_for_ever(pad: Path, tmp_path: Path) -> None:
    index: Any = KillsItsReader(pad)
    with pytest.raises(ChildProcessError, match=r"one of 2 worker processes was killed.* Pass fewer --workers"):
        pack_tokens(index, PackedFor.of(GEOMETRIES["siglip"], 0.5), tmp_path / "pack.arrow", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_pack_leaves_the_old_file_and_nothing_else(index: Any, tmp_path: Path) -> None:
    path = tmp_path / "pack.arrow"
    path.write_bytes(b"old")

    def interrupted(batches: Any) -> Any:
        yield next(iter(batches))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_tokens(index, PackedFor.of(GEOMETRIES["clip, pad"], 0.5), path, watch=interrupted)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def plugins(pad: Path, tokenizer: Any, pack: Path, **flags: Any) -> tuple[PatchAlignedPlugin, PatchAlignedPlugin]:
    """One that reads the masks and one that reads the pack."""
    made = []
    for packed in (None, str(pack)):
        plugin = PatchAlignedPlugin()
        arguments = PatchArguments(patch_packed_path=packed, patch_cache_dir=str(pad.parent / "cache"), **flags)
        plugin.setup(arguments, tokenizer, data_path=str(pad))
        made.append(plugin)
    assert made[0].packed is None and made[1].packed is not None
    return made[0], made[1]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_plugin_s_batch_is_the_same_to_the_last_bit(
    pad: Path, index: Any, tokenizer: Any, tmp_path: Path, name: str
) -> None:
    geometry = GEOMETRIES[name]
    pack_tokens(index, PackedFor.of(geometry, 0.5), tmp_path / "pack.arrow")
    batches = []
    for plugin in plugins(pad, tokenizer, tmp_path / "pack.arrow"):
        extras = [plugin.transform_sample(record, at(geometry, tuple(record["size"]))) for record in RECORDS]
        extras += [{}, plugin.transform_sample({"image": "unknown.jpg"}, at(geometry, (20, 20)))]
        batches.append(plugin.collate(extras))
    masks, packed = batches
    assert masks.keys() == packed.keys() and masks["counts"][1] > 0  # some regions cover no token
    for key, value in masks.items():
        assert value.dtype == packed[key].dtype and torch.equal(value, packed[key]), key


def test_an_image_of_another_size_is_refused_or_left_out_as_without_a_pack(
    pad: Path, index: Any, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    geometry = GEOMETRIES["clip, square"]
    pack_tokens(index, PackedFor.of(geometry, 0.5), tmp_path / "pack.arrow")
    width, height = RECORDS[2]["size"]
    swapped = at(geometry, (height, width))
    messages = []
    for plugin in plugins(pad, tokenizer, tmp_path / "pack.arrow"):
        with pytest.raises(PatchMaskError, match="swapped") as caught:
            plugin.transform_sample(RECORDS[2], swapped)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with caplog.at_level(logging.WARNING):
        for plugin in plugins(pad, tokenizer, tmp_path / "pack.arrow", patch_on_error="skip"):
            assert plugin.transform_sample(RECORDS[2], swapped)["counts"].tolist() == [0, 0, 1]
    assert caplog.text.count("swapped") == 2


OTHERS = {
    "grid": (ImageGeometry.of("square", (1, 1), 28, (2, 2)), "grid (4, 4)", "--grid 2"),
    "side": (ImageGeometry.of("square", (1, 1), 56, (4, 4)), "side 28", "--side 56"),
    "mode": (ImageGeometry.of("pad", (1, 1), 28, (4, 4)), "mode crop", "--image-aspect-ratio pad"),
    "squeezing": (ImageGeometry.of("anyres", (1, 1), 28, (4, 4)), "mode crop", "--squeeze"),
    "shortest edge": (ImageGeometry.of("square", (1, 1), 28, (4, 4), 32), "shortest_edge 28", "--shortest-edge 32"),
    "unseen rest": (ImageGeometry((1, 1), 28, "crop", (4, 4), None, 30), "processed_side 28", "--processed-side 30"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_another_geometry_is_refused_with_the_command_that_makes_its_pack(
    pad: Path, index: Any, tmp_path: Path, name: str
) -> None:
    geometry, found, flag = OTHERS[name]
    path = tmp_path / "pack.arrow"
    pack_tokens(index, PackedFor.of(GEOMETRIES["clip, square"], 0.5), path)
    size_wh, row = tuple(RECORDS[4]["size"]), index.find("4.jpg")
    with pytest.raises(PackedTokensError) as caught:
        opened(index, path).read(row, "4.jpg", at(geometry, size_wh))
    message = str(caught.value)
    assert str(path) in message and found in message and flag in message
    command = next(line for line in message.splitlines() if "patch-aligned pack" in line)
    words = [*shlex.split(command)[1:], "--cache-dir", str(pad.parent / "cache")]
    assert CliRunner().invoke(app, words).exit_code == 0
    masks = [label["rle_mask"] for label in RECORDS[4]["labels"]]
    expected = covered_tokens_of_regions(masks, size_wh, at(geometry, size_wh))
    covered = opened(index, path).read(row, "4.jpg", at(geometry, size_wh)).covered
    np.testing.assert_array_equal(covered, expected)


def test_another_least_coverage_is_refused_before_any_data_is_read(index: Any, tmp_path: Path) -> None:
    pack_tokens(index, PackedFor.of(GEOMETRIES["clip, square"], 0.5), tmp_path / "pack.arrow")
    with pytest.raises(PackedTokensError, match=r"min_coverage 0\.5; expected 0\.75(.|\n)*--min-coverage 0\.75"):
        open_packed_tokens(index, tmp_path / "pack.arrow", 0.75)


def test_a_changed_pad_file_is_refused_and_a_copied_one_is_not(own_pad: Path, tmp_path: Path) -> None:
    index = open_annotation_index(own_pad, tmp_path / "cache")
    path = default_pack_path(own_pad)
    pack_tokens(index, PackedFor.of(GEOMETRIES["clip, square"], 0.5), path)
    os.utime(own_pad, ns=(1, 1))
    assert open_packed_tokens(open_annotation_index(own_pad, tmp_path / "cache"), None, 0.5) is not None
    own_pad.write_text(own_pad.read_text().replace("traffic light", "traffic sight"))
    with pytest.raises(PackedTokensError, match="tokens of another file") as caught:
        open_packed_tokens(open_annotation_index(own_pad, tmp_path / "cache"), None, 0.5)
    assert f"patch-aligned pack {own_pad}" in str(caught.value)


def test_rows_of_other_images_are_refused(index: Any, tmp_path: Path) -> None:
    pack_tokens(index, PackedFor.of(GEOMETRIES["clip, square"], 0.5), tmp_path / "pack.arrow")
    pack = opened(index, tmp_path / "pack.arrow")
    with pytest.raises(PackedTokensError, match=r"image '3\.jpg' in row 3; expected '4\.jpg'"):
        pack.read(3, "4.jpg", at(GEOMETRIES["clip, square"], (20, 24)))


def test_a_pack_of_another_version_is_refused_whatever_it_states(index: Any, tmp_path: Path) -> None:
    path = tmp_path / "pack.arrow"
    metadata = {"patch_aligned.packed_tokens": json.dumps({"format": 2, "packed_for": {"rotated": True}})}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([], metadata=metadata)):
        pass
    with pytest.raises(PackedTokensError, match=r"pack\.arrow: found format 2; expected format 1.*patch-aligned pack"):
        opened(index, path)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_what_is_no_whole_pack_is_named(index: Any, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "pack.arrow"
    pack_tokens(index, PackedFor.of(GEOMETRIES["clip, square"], 0.5), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PackedTokensError, match=re.escape(f"{path}: found no whole pack")):
        PackedTokens(path, index.source)
    with pytest.raises(PackedTokensError, match=r"none\.arrow: found no such file"):
        PackedTokens(tmp_path / "none.arrow", index.source)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int32())])):
        pass
    with pytest.raises(PackedTokensError, match="found no whole pack"):
        PackedTokens(path, index.source)


def test_the_command_packs_beside_the_pad_file_where_training_finds_it(
    own_pad: Path, tmp_path: Path, tokenizer: Any
) -> None:
    cache = str(tmp_path / "cache")
    arguments = ["pack", str(own_pad), "--grid", "4", "--side", "28", "--cache-dir", cache]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    regions = sum(len(record["labels"]) for record in RECORDS)
    assert f"{regions} regions of 300 images" in result.output
    plugin = PatchAlignedPlugin()
    plugin.setup(PatchArguments(patch_cache_dir=cache), tokenizer, data_path=str(own_pad))
    assert plugin.packed is not None and plugin.packed.path == tmp_path / "own.json.packed.arrow"


def test_broken_records_stop_the_command_or_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pad.json"
    path.write_text(json.dumps([RECORDS[1], {**RECORDS[2], "size": [1]}, RECORDS[3]]))
    arguments = ["pack", str(path), "--grid", "4", "--side", "28", "--cache-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "1 broken records" in result.output and "--skip-broken" in result.output
    assert not default_pack_path(path).exists()
    result = CliRunner().invoke(app, [*arguments, "--skip-broken"])
    assert result.exit_code == 0 and "4 regions of 2 images" in result.output
