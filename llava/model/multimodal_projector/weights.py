"""Reading projector weights from the files that LLaVA-family training writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MARK = "mm_projector."
HONEYBEE_MARK = "abstractor."


def read_projector_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an `mm_projector.bin` or safetensors file, as stored, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no key of the file belongs to a projector.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No projector weights at {path}. Stage 1 writes them as <output_dir>/mm_projector.bin; "
            "run scripts/v1_5/pretrain.sh first or pass the path of that file."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not projector_state(state):
        raise ValueError(f"{path} holds no projector: expected keys that contain `{MARK}`, found {sorted(state)[:5]}.")
    return state


def projector_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's own entries under local names, e.g. `model.mm_projector.0.weight` -> `0.weight`.

    Any key that contains `mm_projector.` counts, so prefixes added by wrappers (`base_model.model.`) do no harm. So
    does `abstractor.`, as Honeybee calls its own; the place for CLS in old ones' position table is left out.
    """
    local = {name.split(MARK, 1)[1]: tensor for name, tensor in state.items() if MARK in name}
    if not local:
        local = {name.split(HONEYBEE_MARK, 1)[1]: state[name] for name in state if HONEYBEE_MARK in name}
        positions = local.get("pos_emb")
        if positions is not None and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
            local["pos_emb"] = positions[:, 1:]  # [1, 1 + S, C] -> [1, S, C]
    return local


def load_projector(projector: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies the projector's entries of `state` into `projector`, strictly; under ZeRO-3 on gathered parameters.

    Raises:
        ValueError: keys are missing or unexpected, or a shape differs; names both sides and the likely reason.
    """
    loaded = projector_state(state)
    parameters = dict(projector.named_parameters())
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    if expected != found:
        differing = [
            f"{name}: model {expected.get(name, 'has no such tensor')}, file {found.get(name, 'has no such tensor')}"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        reason = (
            "A shape with 0 comes from a file saved from ZeRO-3 shards without gathering; save it again."
            if any(0 in shape for shape in found.values())
            else "The projector was trained for another LLM, another vision tower or another --mm_projector_type."
        )
        raise ValueError(f"The projector in {source} does not fit this model. {'; '.join(differing)}. {reason}")
    with gathered(list(parameters.values())), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded[name])


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Context in which ZeRO-3 partitions of `parameters` are whole and writable; does nothing elsewhere."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return nullcontext()
