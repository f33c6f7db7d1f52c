"""Checkpoint folders that are built once, atomically, and checked by hash on later calls.

Each folder holds `manifest.json`: where the files came from, and size, modification time and SHA-256 of each. A folder
whose sizes and times still match is taken as it is; a file that was touched is hashed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patch_aligned.files import sha256_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when the converted files change in meaning, so that folders of an older format are rebuilt."""


def write_manifest(folder: Path, origin: dict[str, Any]) -> None:
    """Records every file of `folder` and where it came from."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            stat = path.stat()
            files[path.relative_to(folder).as_posix()] = {
                "bytes": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "sha256": sha256_of(path),
            }
    manifest = {"format": FORMAT, "origin": origin, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def why_unusable(folder: Path, origin: dict[str, Any], *, rehash: bool = False) -> str | None:
    """None if `folder` holds what its manifest says and came from `origin`, else the reason in words.

    `rehash` hashes every file, even where size and modification time still match.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        return "it does not exist yet" if not folder.exists() else f"{manifest_path} is missing"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        recorded, made_from, version = manifest["files"], manifest["origin"], manifest["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"{manifest_path} cannot be read ({error!r})"
    if version != FORMAT:
        return f"{manifest_path} has format {version}, expected {FORMAT}"
    if made_from != origin:
        return f"it was made from {made_from}, asked for is {origin}"
    for name, expected in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        stat = path.stat()
        if stat.st_size != expected["bytes"]:
            return f"{path} has {stat.st_size} bytes, the manifest says {expected['bytes']}"
        if rehash or stat.st_mtime_ns != expected["mtime_ns"]:
            found = sha256_of(path)
            if found != expected["sha256"]:
                return f"{path} has SHA-256 {found}, the manifest says {expected['sha256']}"
    return None


def build_atomically(
    folder: Path, origin: dict[str, Any], build: Callable[[Path], None], *, rehash: bool = False
) -> bool:
    """Makes sure that `folder` is a checkpoint made from `origin`; returns whether it had to be built.

    `build` fills a temporary folder beside the final one, which takes its place by a rename: an interrupted build
    leaves nothing behind under the final name, and two builds at once end with one complete folder.
    """
    reason = why_unusable(folder, origin, rehash=rehash)
    if reason is None:
        return False
    if folder.exists():
        logger.warning("%s is rebuilt: %s", folder, reason)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
    try:
        building.chmod(0o755)  # mkdtemp makes folders that only their owner can enter
        build(building)
        write_manifest(building, origin)
        _put_in_place(building, folder, origin)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _put_in_place(building: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Renames `building` to `folder`, moving an unusable folder out of the way first."""
    if folder.exists():
        discarded = Path(tempfile.mkdtemp(prefix=f".discarded-{folder.name}-", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            folder.replace(discarded / folder.name)
        shutil.rmtree(discarded, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError as error:
        # Another process finished the same build between the two calls; its folder serves as well as ours.
        if why_unusable(folder, origin) is not None:
            raise OSError(f"{folder} cannot be put in place: {error}. Delete it and run the command again.") from error
