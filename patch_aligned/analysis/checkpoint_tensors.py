"""Single tensors out of large checkpoints, from a folder or the hub, without reading the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def checkpoint_shards(source: str) -> list[str]:
    """Names of the weight files of a checkpoint, safetensors before torch's; empty where there is none."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = checkpoint_file(source, f"{stem}.{ending}.index.json")
        if index is not None:
            shards = json.loads(index.read_text())["weight_map"].values()
            return sorted({Path(shard).name for shard in shards})  # a name, so that no index leads out of the folder
        if checkpoint_file(source, f"{stem}.{ending}") is not None:
            return [f"{stem}.{ending}"]
    return []


def checkpoint_file(source: str, name: str) -> Path | None:
    """One file of a local folder or a hub model; None where the checkpoint has no such file.

    Raises:
        FileNotFoundError: `source` is no folder here, and the hub could not give it.
    """
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise FileNotFoundError(
            f"There is no folder {source}, and the hub has no such model or cannot be reached "
            f"({str(error).splitlines()[0]})."
        ) from error


def read_checkpoint_tensors(source: str, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Only the wanted tensors of a checkpoint, by name.

    Raises:
        FileNotFoundError: the checkpoint cannot be found or has no weights.
    """
    shards = checkpoint_shards(source)
    if not shards:
        raise FileNotFoundError(f"{source} holds no model.safetensors or pytorch_model.bin (whole or in shards).")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        path = checkpoint_file(source, shard)
        if path is None:
            raise FileNotFoundError(
                f"{source}: the index names {shard}, which is missing. Download the checkpoint again."
            )
        if shard.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if is_wanted(name)}  # noqa: SIM118
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            tensors |= {name: tensor.clone() for name, tensor in state.items() if is_wanted(name)}
    return tensors
