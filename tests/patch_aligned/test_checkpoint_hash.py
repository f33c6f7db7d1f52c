from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from patch_aligned.files import checkpoint_sha256

FILES = {
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "model-00001-of-00002.safetensors": b"first",
    "mm_projector.bin": b"projector",
    "adapter_model.safetensors": b"adapter",
    "config.json": b"{}",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_hash_is_of_sha256sums_lines(tmp_path: Path) -> None:
    lines = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in sorted(FILES))
    found = checkpoint_sha256(write(tmp_path / "model", FILES))
    assert found == hashlib.sha256(lines.encode()).hexdigest()


def test_order_place_and_other_files_do_not_matter_but_every_byte_does(tmp_path: Path) -> None:
    expected = checkpoint_sha256(write(tmp_path / "one", FILES))
    others = {"training_args.bin": b"x", "trainer_state.json": b"x", "tokenizer.model": b"x"}
    assert checkpoint_sha256(write(tmp_path / "two", {**others, **dict(reversed(FILES.items()))})) == expected
    for number, name in enumerate(FILES):
        changed = {**FILES, name: FILES[name] + b"."}
        assert checkpoint_sha256(write(tmp_path / f"changed{number}", changed)) != expected
    swapped = dict(zip(FILES, [FILES["model-00001-of-00002.safetensors"], *list(FILES.values())[1:]], strict=True))
    swapped["model-00001-of-00002.safetensors"] = FILES["model-00002-of-00002.safetensors"]
    assert checkpoint_sha256(write(tmp_path / "swapped", swapped)) != expected


def test_a_single_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    path.write_bytes(b"projector")
    line = f"{hashlib.sha256(b'projector').hexdigest()}  mm_projector.bin\n"
    assert checkpoint_sha256(path) == hashlib.sha256(line.encode()).hexdigest()


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf download .*missing"):
        checkpoint_sha256(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"found no weights; expected files \*\.safetensors or \*\.bin"):
        checkpoint_sha256(write(tmp_path / "empty", {"config.json": b"{}"}))


def test_folders_that_are_called_like_weights_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", FILES)
    expected = checkpoint_sha256(folder)
    (folder / "quantized.bin").mkdir()
    assert checkpoint_sha256(folder) == expected
