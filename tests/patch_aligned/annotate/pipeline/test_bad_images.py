"""Pictures as the web has them: read as training reads them, or refused with a reason, never replaced."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.eval.vqa_files import open_image
from llava.mm_utils import UnreadableImageError as UnreadableInTraining
from llava.mm_utils import load_rgb_image
from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.options import Workload
from patch_aligned.annotate.pipeline import StageClock, Stages, annotate_images
from patch_aligned.images import UnreadableImageError, decode_image, stored_size_wh
from patch_aligned.pad import parse_annotation

SIZE_WH = (60, 40)
Save = Callable[[Path], None]


def picture(size_wh: tuple[int, int] = SIZE_WH) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rotated_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: shown after a quarter turn clockwise
    picture().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def animated(path: Path) -> None:
    picture().save(path, "GIF", save_all=True, append_images=[Image.new("RGB", SIZE_WH)])


def transparent_palette(path: Path) -> None:
    picture().quantize(8).save(path, "PNG", transparency=3)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27).save(path, "PNG")


READABLE: dict[str, Save] = {
    "rgb.jpg": lambda path: picture().save(path),
    "cmyk.jpg": lambda path: picture().convert("CMYK").save(path),
    "grey.png": lambda path: picture().convert("L").save(path),
    "one_bit.png": lambda path: picture().convert("1").save(path),
    "rgba.png": lambda path: picture().convert("RGBA").save(path),
    "palette.png": transparent_palette,
    "sixteen_bits.png": sixteen_bits,
    "rotated.jpg": rotated_by_exif,
    "rotated.png": rotated_by_exif,
    "rotated.tif": rotated_by_exif,
    "animated.gif": animated,
    "jpeg_named.png": lambda path: picture().save(path, "JPEG"),
}


def cut_off(path: Path) -> None:
    picture().save(path)
    path.write_bytes(path.read_bytes()[:-600])


def huge(path: Path) -> None:
    """17 gigapixels by its header, a few bytes on disk."""
    path.write_bytes(b"P6 131072 131072 255\n" + b"\0" * 64)


BROKEN: dict[str, tuple[Save, str]] = {
    "missing.jpg": (lambda path: None, "no such file"),
    "empty.jpg": (lambda path: path.write_bytes(b"") and None, "an empty file"),
    "page.jpg": (lambda path: path.write_text("<html>404</html>") and None, "16 bytes that are no image"),
    "cut_off.jpg": (cut_off, "cannot be decoded: .*truncated"),
    "cut_off.png": (cut_off, "cannot be decoded"),
    "header_alone.jpg": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF") and None, "cannot be decoded"),
    "huge.ppm": (huge, "decompression bomb"),
}


@pytest.mark.parametrize("name", READABLE)
def test_pictures_are_read_as_training_reads_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    READABLE[name](path)
    found, expected = decode_image(path), load_rgb_image(path)
    assert (found.mode, found.size) == ("RGB", SIZE_WH)
    assert stored_size_wh(tmp_path, name) == found.size
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.array_equal(np.asarray(open_image(path.read_bytes())), np.asarray(expected))
    assert np.array_equal(np.asarray(open_image(Image.open(path))), np.asarray(expected))
    if name.startswith("rotated") and not name.endswith("jpg"):
        assert np.array_equal(np.asarray(found), np.asarray(picture()))


@pytest.mark.parametrize("name", ["ramp.png", "little.tif", "big.tif"])
def test_sixteen_bit_greys_keep_their_ramp(tmp_path: Path, name: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(">u2" if name == "big.tif" else np.uint16)[None]  # [1, 256]
    Image.fromarray(ramp).save(tmp_path / name)
    for read in (decode_image, load_rgb_image):
        assert np.array_equal(np.asarray(read(tmp_path / name))[0, :, 0], np.arange(256))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_greys_of_32_bits_are_refused_by_name(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / "depth.tif")
    with pytest.raises(UnreadableInTraining, match=r"depth\.tif.*mode [IF]"):
        load_rgb_image(tmp_path / "depth.tif")
    with pytest.raises(UnreadableImageError, match=r"mode [IF]"):
        decode_image(tmp_path / "depth.tif")


@pytest.mark.parametrize("name", BROKEN)
def test_what_training_can_not_read_is_refused_with_a_reason_that_names_no_folder(tmp_path: Path, name: str) -> None:
    save, reason = BROKEN[name]
    path = tmp_path / name
    save(path)
    with pytest.raises((UnreadableInTraining, FileNotFoundError)):
        load_rgb_image(path)
    with pytest.raises(UnreadableImageError, match=reason) as refused:
        decode_image(path)
    assert str(tmp_path) not in str(refused.value)


def test_a_decoder_that_gives_up_in_its_own_way_ends_one_picture_not_the_run(tmp_path: Path) -> None:
    header = struct.pack("<4s4I", b"DDS ", 124, 0, 40, 60).ljust(128, b"\0")
    (tmp_path / "surface.jpg").write_bytes(header)
    with pytest.raises(NotImplementedError):
        Image.open(tmp_path / "surface.jpg")
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        decode_image(tmp_path / "surface.jpg")


def test_an_outage_of_the_storage_stops_the_run_and_is_not_recorded_of_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "sound.png")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=r"sound\.png: Input/output error. Once it can be read again"):
        decode_image(tmp_path / "sound.png")


def test_all_formats_are_known_before_threads_open_pictures() -> None:
    code = "import patch_aligned.images; from PIL import Image; print(*Image.ID)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"JPEG", "WEBP", "TIFF"} <= set(said.split())


@pytest.fixture
def records(build: Callable[[str], Stages], tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Records of all the pictures above and of some odd sizes, by name, from the tiny models."""
    for name, save in {**READABLE, **{name: save for name, (save, _) in BROKEN.items()}}.items():
        save(tmp_path / name)
    for name, size in {"pixel.png": (1, 1), "line.png": (3000, 20), "small.png": (16, 16)}.items():
        picture(size).save(tmp_path / name)
    names = [*READABLE, *BROKEN, "pixel.png", "line.png", "small.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    entries, folder = list_images(tmp_path / "list.txt", tmp_path)
    found = annotate_images(entries, build("cpu"), folder, Workload(), StageClock())
    assert [record["image_id"] for record in found] == names
    return {record["image_id"]: record for record in found}


def test_every_picture_has_one_record_with_its_status(records: dict[str, dict[str, Any]]) -> None:
    for name in READABLE:
        assert records[name]["status"] in ("ok", "no_tags", "no_boxes"), name
        assert records[name]["size"] == list(SIZE_WH)
        parse_annotation(records[name])  # raises where it is no PAD record
    for name in BROKEN:
        assert records[name]["status"] == "unreadable", name
        assert records[name]["size"] is None
        assert records[name]["reason"]
    assert records["pixel.png"]["status"] == "skipped"
    assert records["pixel.png"]["reason"] == "a side of 1 px, less than 16"
    assert records["line.png"]["reason"] == "sides of 3000 and 20 px: too narrow to be resized"
    assert records["small.png"]["status"] != "skipped"
    for record in records.values():
        assert record["labels"] == [] or record["status"] == "ok"
