"""Reading projector weights from the files that LLaVA-family training writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from llava.model.strict_loading import fill_strictly, gathered
from llava.model.tensor_files import read_tensors

__all__ = ["gathered", "load_projector", "projector_state", "read_projector_file"]

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
    state = read_tensors(path)
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
    hint = "The projector was trained for another LLM, another vision tower or another --mm_projector_type."
    fill_strictly(dict(projector.named_parameters()), projector_state(state), f"The projector in {source}", hint)
