"""Files that appear whole or not at all, and the hash that names what is in one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and is removed when it fails.

    It is on the disk before it takes the place, so that a machine that loses power leaves no half file under the name.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves its files to their owner alone, whatever the umask
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Brings the folder's list of names to the disk; not every system and network drive can be asked to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Which weights a number belongs to: SHA-256 of a checkpoint's weight files and configs. Needs no torch.

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_CONFIGS = ("config.json", "adapter_config.json")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # of a training run, beside its weights


@dataclass(frozen=True)
class CheckpointHash:
    """What a checkpoint holds, by content: neither its place nor the order of its files matters.

    Attributes:
        sha256: of all files together: of the lines `<sha256>  <name>`, sorted by name, as `sha256sum` prints them.
        files: SHA-256 of each file, by name.
        size_bytes: of all files.
    """

    sha256: str
    files: dict[str, str]
    size_bytes: int


def checkpoint_hash(path: Path | str, progress: Callable[[int, int], None] | None = None) -> CheckpointHash:
    """Hashes a checkpoint: weights (safetensors or bin, the projector, an adapter) and configs, without subfolders.

    Tokenizer, optimizer and logs are left out: they may differ where the model is the same.

    Args:
        path: folder of a checkpoint, or one file of weights.
        progress: told bytes done and bytes in all, after each block of 4 MB.

    Raises:
        FileNotFoundError: nothing is there, or the folder has no weights.
    """
    path = Path(path)
    files = _files_of(path)
    total = sum(file.stat().st_size for file in files)
    done = 0
    hashes = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                if progress:
                    progress(done, total)
        hashes[file.name] = digest.hexdigest()
    lines = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    return CheckpointHash(hashlib.sha256(lines.encode()).hexdigest(), hashes, total)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: found nothing; expected a checkpoint's folder or a file of weights. A model of the hub is "
            f"downloaded first: hf download {path} --local-dir FOLDER"
        )
    weights = [
        file
        for file in path.iterdir()
        if file.suffix in _WEIGHT_SUFFIXES and file.name not in _NO_WEIGHTS and file.is_file()
    ]
    if not weights:
        raise FileNotFoundError(
            f"{path}: found no weights; expected files *{' or *'.join(_WEIGHT_SUFFIXES)}. Does the checkpoint lie in "
            "a subfolder?"
        )
    configs = [path / name for name in _CONFIGS if (path / name).is_file()]
    return sorted(weights + configs, key=lambda file: file.name)
