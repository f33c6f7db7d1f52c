from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from patch_aligned.files import checkpoint_hash

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
    found = checkpoint_hash(write(tmp_path / "model", FILES))
    assert found.files == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    lines = "".join(f"{found.files[name]}  {name}\n" for name in sorted(FILES))
    assert found.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert found.size_bytes == sum(map(len, FILES.values()))


def test_order_place_and_other_files_do_not_matter_but_every_byte_does(tmp_path: Path) -> None:
    expected = checkpoint_hash(write(tmp_path / "one", FILES)).sha256
    others = {"training_args.bin": b"x", "trainer_state.json": b"x", "tokenizer.model": b"x"}
    assert checkpoint_hash(write(tmp_path / "two", {**others, **dict(reversed(FILES.items()))})).sha256 == expected
    for number, name in enumerate(FILES):
        changed = {**FILES, name: FILES[name] + b"."}
        assert checkpoint_hash(write(tmp_path / f"changed{number}", changed)).sha256 != expected
    swapped = dict(zip(FILES, [FILES["model-00001-of-00002.safetensors"], *list(FILES.values())[1:]], strict=True))
    swapped["model-00001-of-00002.safetensors"] = FILES["model-00002-of-00002.safetensors"]
    assert checkpoint_hash(write(tmp_path / "swapped", swapped)).sha256 != expected


def test_a_single_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    path.write_bytes(b"projector")
    assert checkpoint_hash(path).files == {"mm_projector.bin": hashlib.sha256(b"projector").hexdigest()}


def test_progress_ends_at_the_size(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = checkpoint_hash(write(tmp_path / "m", FILES), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (found.size_bytes, found.size_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf download .*missing"):
        checkpoint_hash(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"found no weights; expected files \*\.safetensors or \*\.bin"):
        checkpoint_hash(write(tmp_path / "empty", {"config.json": b"{}"}))


def test_folders_that_are_called_like_weights_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", FILES)
    expected = checkpoint_hash(folder)
    (folder / "quantized.bin").mkdir()
    assert checkpoint_hash(folder) == expected
