"""Published checkpoints are converted once, read as tensors only, and refused by name where they don't fit."""

from __future__ import annotations

import datetime
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from patch_aligned.annotate.ram import model as checkpoint_module
from patch_aligned.annotate.ram.model import RamModel, load_ram
from patch_aligned.files import sha256_of

PublishedFile = Callable[..., Path]
CONVERTED = "ram_mini.converted.safetensors"


def test_a_converted_checkpoint_computes_what_the_published_one_does(
    golden: dict[str, Tensor], model: RamModel, published_file: PublishedFile
) -> None:
    path = published_file(golden)
    loaded, published = load_ram(path)
    assert loaded.config == model.config
    assert not loaded.training
    assert_close(loaded(golden["input.image"]), model(golden["input.image"]), rtol=0, atol=0)
    described = json.loads(path.with_name("ram_mini.converted.json").read_text(encoding="utf-8"))
    assert described["source"] == published.model_dump() == {
        "name": "ram_mini.pth", "bytes": path.stat().st_size, "sha256": sha256_of(path)
    }  # fmt: skip


def test_the_published_file_is_read_once(
    ram_golden: dict[str, Tensor], published_file: PublishedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published_file(ram_golden)
    first, checkpoint = load_ram(path)
    monkeypatch.setattr(checkpoint_module, "convert_checkpoint", None)
    for source in (path, path.with_name(CONVERTED)):
        again, described = load_ram(source)
        assert described == checkpoint
        assert_close(dict(again.state_dict()), dict(first.state_dict()), rtol=0, atol=0)
    path.unlink()
    assert load_ram(path.with_name(CONVERTED))[1] == checkpoint


def test_another_published_file_of_the_same_name_is_converted_anew(
    ram_golden: dict[str, Tensor], ram_plus_golden: dict[str, Tensor], published_file: PublishedFile
) -> None:
    assert load_ram(published_file(ram_golden))[0].config.kind == "ram"
    path = published_file(ram_plus_golden)
    os.utime(path, (0, 0))  # an old file, of another size
    assert load_ram(path)[0].config.kind == "ram_plus"
    path = published_file(ram_plus_golden, {"fc.bias": torch.tensor([7.0])})
    os.utime(path, (0, 0))  # an old one of the same size
    assert load_ram(path)[0].fc.bias.item() == 7


def test_the_converted_file_may_be_read_by_all_who_may_read_its_folder(
    ram_golden: dict[str, Tensor], published_file: PublishedFile, tmp_path: Path
) -> None:
    path = published_file(ram_golden)
    load_ram(path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["ram_mini.converted.json", CONVERTED, path.name]
    assert files[1].stat().st_mode == files[0].stat().st_mode


def test_half_precision_and_older_names_are_read(
    ram_golden: dict[str, Tensor], ram: RamModel, published_file: PublishedFile
) -> None:
    head = {name.removeprefix("state."): tensor for name, tensor in ram_golden.items() if "tagging_head" in name}
    older = {name.replace("tagging_head", "vision_multi"): tensor for name, tensor in head.items()}
    half = {"fc.weight": ram_golden["state.fc.weight"].half()}
    loaded, _ = load_ram(published_file(ram_golden, {**dict.fromkeys(head), **older, **half}))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert_close(loaded.decoder.state_dict(), ram.decoder.state_dict(), rtol=0, atol=0)


def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_named(
    ram_golden: dict[str, Tensor], published_file: PublishedFile
) -> None:
    path = published_file(
        ram_golden, {"fc.bias": None, "mystery.weight": torch.zeros(1), "image_proj.bias": torch.zeros(3)}
    )
    message = (
        r"ram_mini\.pth: does not fit ram: missing fc\.bias; unexpected mystery\.weight; "
        r"image_proj\.bias of shape \[3\] instead of \[512\]"
    )
    with pytest.raises(ValueError, match=message):
        load_ram(path)
    assert not path.with_name(CONVERTED).exists()


def test_python_objects_besides_tensors_are_refused_by_name(
    ram_golden: dict[str, Tensor], published_file: PublishedFile
) -> None:
    path = published_file(ram_golden, saved_on=datetime.date(2023, 6, 1))
    with pytest.raises(ValueError, match=r"Python objects besides tensors \(datetime\.date\).*torch\.save"):
        load_ram(path)


def test_files_that_hold_no_model_are_refused(
    ram_golden: dict[str, Tensor], published_file: PublishedFile, tmp_path: Path
) -> None:
    path = tmp_path / "absent.pth"
    with pytest.raises(ValueError, match=r"absent\.pth: found no such file.*huggingface\.co"):
        load_ram(path)
    whole = published_file(ram_golden).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"truncated after {len(whole) // 2} bytes. Download it again"):
        load_ram(path)
    for text in ("<html>Not found</html>", "hello", "0", "", "Not found"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="not readable by torch"):
            load_ram(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    with pytest.raises(ValueError, match="not readable by torch"):
        load_ram(path)
    torch.save({"state_dict": {}, "epoch": 1}, path)
    with pytest.raises(ValueError, match="found epoch, state_dict, expected a dict with tensors under 'model'"):
        load_ram(path)
    torch.save({"model": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: found no blocks of a Swin encoder")):
        load_ram(path)


def test_a_converted_file_that_is_broken_or_undescribed_says_what_to_do(
    ram_golden: dict[str, Tensor], published_file: PublishedFile
) -> None:
    path = published_file(ram_golden)
    load_ram(path)
    weights = path.with_name(CONVERTED)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"Remove it, so that it is converted again"):
        load_ram(path)
    sidecar = path.with_name("ram_mini.converted.json")
    sidecar.write_text('{"format": "other"}', encoding="utf-8")
    with pytest.raises(ValueError, match="format"):
        load_ram(weights)
    sidecar.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="found no description of a converted RAM model"):
        load_ram(weights)
    sidecar.unlink()
    with pytest.raises(ValueError, match=r"found no ram_mini\.converted\.json beside it"):
        load_ram(weights)


def test_a_place_that_cannot_be_written_is_named(
    ram_golden: dict[str, Tensor], published_file: PublishedFile, tmp_path: Path
) -> None:
    (tmp_path / CONVERTED).mkdir()
    with pytest.raises(ValueError, match=r"cannot be written.*copy the .pth to another one"):
        load_ram(published_file(ram_golden))
