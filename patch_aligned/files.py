"""Atomic file writes, SHA-256 helpers, and validation of what files contain."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

_BLOCK_BYTES = 1 << 22
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which replaces `path` on success and is removed on failure.

    The file is synced to disk before the rename, so that a power failure leaves no partial file at `path`.
    """
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.tmp")  # a name has at most 255 bytes
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors ignores the umask and writes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        size = temporary.stat().st_size if temporary.exists() else 0
        raise OSError(
            error.errno,
            f"{path}: cannot be written ({error.strerror}, after {size / 1e6:.1f} MB). What was there before is "
            "unchanged. Free some room or name another place, and run the same command again",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def refuse_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raise `ValueError` if an output file is one of the inputs, which would be overwritten."""
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ValueError(f"{output}: is read by this command too, and would be overwritten. Name another output")


def validated(kind: Any, content: Any, where: object) -> Any:
    """Convert JSON (bytes) or Python values to a type, such as a `list` of a pydantic model, strictly.

    Raises:
        ValueError: begins with `where`, and names the field, what was found and what was expected.
    """
    from pydantic import ValidationError

    adapter = _adapter(kind)
    try:
        validate = adapter.validate_json if isinstance(content, bytes) else adapter.validate_python
        return validate(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {describe_invalid(error)}") from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def describe_invalid(error: ValidationError) -> str:
    """Return the first thing that pydantic refuses, such as `field 'boxes[1]': found '6'; input should be a number`."""
    fault = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).removeprefix(".")
    where = f"field {path!r}: " if path else ""
    found = "nothing" if fault["type"] == "missing" else f"{fault['input']!r:.80}"
    return f"{where}found {found}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, where the system and the drive support it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Hash of a checkpoint, which identifies the weights that a result belongs to. Needs no torch.

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_CONFIGS = ("config.json", "adapter_config.json")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # written by training runs beside the weights


def checkpoint_sha256(path: Path | str) -> str:
    """Hash the weights (safetensors or bin, projector, adapter) and configs of a checkpoint, without subfolders.

    It is the hash of the lines `<sha256>  <name>` of all files, sorted by name, as `sha256sum` prints them. Tokenizer,
    optimizer and logs are excluded, since they may differ for the same model.

    Args:
        path: folder of a checkpoint, or one weight file.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no weights.
    """
    lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in _files_of(Path(path)))
    return hashlib.sha256(lines.encode()).hexdigest()


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: found nothing; expected a checkpoint folder or a weight file. Download a model from the hub "
            f"first: hf download {path} --local-dir FOLDER"
        )
    weights = [
        file
        for file in path.iterdir()
        if file.suffix in _WEIGHT_SUFFIXES and file.name not in _NO_WEIGHTS and file.is_file()
    ]
    if not weights:
        raise FileNotFoundError(
            f"{path}: found no weights; expected files *{' or *'.join(_WEIGHT_SUFFIXES)}. Is the checkpoint in a "
            "subfolder?"
        )
    configs = [path / name for name in _CONFIGS if (path / name).is_file()]
    return sorted(weights + configs, key=lambda file: file.name)
