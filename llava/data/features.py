"""Outputs of a frozen vision tower on disk, so that training neither reads images nor runs the tower.

A folder holds safetensors shards, written atomically: `features` `[n, S, C]`, `keys` `[n]`, `sizes_wh` `[n, 2]`. A key
is a hash of an image's path, size in bytes and time of change, so that a changed image counts as new. The folder's name
identifies tower and processor. Shards are only ever added; one image in two shards is harmless.
"""

from __future__ import annotations

import hashlib
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CachedImage = tuple[int, Tensor, tuple[int, int]]
"""Key, features `[S, C]`, width and height of an image."""
_SUFFIX = ".safetensors"


class FeatureCache:
    """Memory-mapped features of images by name, relative to `image_folder`. Cheap to fork, and to send to a worker."""

    def __init__(self, folder: Path, image_folder: str | Path | None) -> None:
        self.folder, self.image_folder = folder, Path(image_folder or "")
        self.reload()

    def reload(self) -> None:
        """Look for new shards."""
        self.shards = sorted(self.folder.glob(f"*{_SUFFIX}"))
        held: list[Any] = [_open(shard).get_tensor("keys").numpy() for shard in self.shards]
        keys = np.concatenate([np.zeros(0, dtype=np.int64), *held])
        shard = np.repeat(np.arange(len(held)), [len(of_shard) for of_shard in held])
        row = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(len(of_shard)) for of_shard in held)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._shard, self._row = keys[order], shard[order], row[order]

    def key(self, name: str) -> int:
        """Return the key of an image, or raise `OSError` if there is no such file."""
        status = (self.image_folder / name).stat()
        text = f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)

    def find(self, name: str) -> tuple[Tensor, tuple[int, int]] | None:
        """Return features `[S, C]`, and width and height of the image; None if they are not here."""
        place = self._place(name)
        if place is None:
            return None
        shard, row = _open(self.shards[self._shard[place]]), int(self._row[place])
        width, height = shard.get_slice("sizes_wh")[row : row + 1][0].tolist()
        return shard.get_slice("features")[row : row + 1][0], (width, height)

    def __contains__(self, name: str) -> bool:
        return self._place(name) is not None

    def add(self, images: list[CachedImage]) -> None:
        """Write a shard; `reload` makes it visible."""
        keys, features, sizes_wh = zip(*images, strict=True)
        tensors = {
            "features": torch.stack(features),  # [n, S, C]
            "keys": torch.tensor(keys),  # [n]
            "sizes_wh": torch.tensor(sizes_wh),  # [n, 2]
        }
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        save_file(tensors, unfinished)
        unfinished.rename(self.folder / f"{unfinished.name[1:]}{_SUFFIX}")

    def _place(self, name: str) -> int | None:
        try:
            key = self.key(name)
        except OSError:
            return None
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None


@lru_cache(maxsize=256)  # of some hundreds or thousands: an open shard takes a file descriptor
def _open(shard: Path) -> Any:
    return safe_open(shard, framework="pt")
