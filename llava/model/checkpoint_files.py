"""The files of a checkpoint: its weights, one by one and without code in them, and the small files beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.tensor_files import UNSHARDED_FILES, find_file, read_tensors

VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token."""

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


class CheckpointTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from disk when it is asked for.

    Args:
        checkpoint: folder or hub name; safetensors or `pytorch_model.bin`, whole or in shards.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
    """

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in UNSHARDED_FILES:
            if index := find_file(checkpoint, f"{name}.index.json"):
                shard_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                # A name and no path, so that no index leads out of the folder.
                self._file_of = {name: Path(shard).name for name, shard in shard_of.items()}
                return
            if find_file(checkpoint, name):
                self._file_of = dict.fromkeys(self._opened(name).keys(), name)
                return
        raise FileNotFoundError(
            f"No weights at {checkpoint}: expected {' or '.join(UNSHARDED_FILES)}, or the index of their shards."
        )

    def __getitem__(self, name: str) -> Tensor:
        opened = self._opened(self._file_of[name])
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            path = find_file(self.checkpoint, file)
            if path is None:
                raise FileNotFoundError(f"{self.checkpoint}: {file} is missing, though the index names it.")
            self._open[file] = _open_weights(path)
        return self._open[file]


def _open_weights(path: str) -> Any:
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        return safe_open(path, framework="pt")
    return read_tensors(path)


def require_new_folder(destination: Path) -> None:
    """Raises `FileExistsError` where the folder holds anything: half of an old checkpoint would mix with the new."""
    if destination.is_file():
        raise FileExistsError(f"{destination} is a file: name a new folder.")
    if destination.is_dir() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty: name a new folder, or remove what is in it.")


def save_weights(weights: Mapping[str, Tensor], folder: Path, max_shard_size: str = "5GB") -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` and their index."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(weights), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def copy_file(checkpoint: str, folder: Path, name: str) -> None:
    """Copies a file of a checkpoint (folder or hub name), as it is; does nothing where there is none."""
    if source := find_file(checkpoint, name):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def save_checkpoint(weights: Mapping[str, Tensor], folder: Path, source: str, dtype: torch.dtype) -> None:
    """Writes weights, and beside them config and tokenizer of `source` as they are, but for the config's `dtype`."""
    save_weights(weights, folder)
    for name in SMALL_FILES:
        copy_file(source, folder, name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
