"""Find and read weight files of a checkpoint, local or on the hub. Only tensors are unpickled, never code."""

from __future__ import annotations

import logging
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llava.checkpoint_files import UNSHARDED_FILES, find_file

_LFS = b"version https://git-lfs"


@contextmanager
def broken_files_named(model_path: str) -> Iterator[None]:
    """Raise `ValueError` with the name of the broken file in place of what safetensors and pickle say without it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(unreadable(model_path, error)) from error
    except SafetensorError:
        for file in safetensors_files(model_path):
            open_safetensors(file)
        raise


def safetensors_files(model_path: str) -> list[Path]:
    """Return the safetensors files of a folder, or the one file of a hub name."""
    if Path(model_path).is_dir():
        return sorted(Path(model_path).glob("*.safetensors"))
    file = find_file(model_path, UNSHARDED_FILES[0])
    return [] if file is None else [Path(file)]


def open_safetensors(path: str | Path) -> Any:
    """Open a safetensors file, whose tensors are read on access."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}).{lfs_hint(path)} Copy or download it again."
        ) from error


def lfs_hint(path: str | Path) -> str:
    """Say that a file is but a pointer of Git LFS, as a clone without LFS leaves it; empty if it is not."""
    with Path(path).open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    return " It is a pointer of Git LFS: run `git lfs pull` in its folder." if is_pointer else ""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file, in their stored dtype, on the CPU."""
    path = Path(path)
    if path.suffix == ".safetensors":
        opened = open_safetensors(path)
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
    try:
        # Files written before torch 1.6 are not zip archives and cannot be memory-mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (FileNotFoundError, PermissionError):
        raise
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:  # OSError: seek past a truncated end
        raise ValueError(unreadable(path, error)) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a dict of tensors, as torch.save writes it.")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds more than tensors: {others[:5]}. Save only the state dict.")
    return state


def unreadable(path: str | Path, error: Exception) -> str:
    """Build the message for a torch file that cannot be read safely."""
    hint = lfs_hint(path) if Path(path).is_file() else ""
    return (
        f"{path} cannot be read as a file of tensors.{hint} It is cut off, or its pickle holds other objects, which "
        "are never loaded. Download it again, or ask its authors for the state dict alone, preferably as safetensors. "
        f"({(str(error) or 'nothing in it').splitlines()[0]})"
    )


# Strict loading: names and shapes must match exactly.

SHOWN = 10
"""Maximum number of differing names in an error message."""


def fill_strictly(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: object, hint: str
) -> None:
    """Copy `tensors`, of any dtype, into `parameters` by name. Both must have the same names and shapes.

    Under ZeRO-3 the parameters are gathered. A message names the `source` of the tensors, and ends with `hint`: the
    likely reason and the next step.
    """
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        if any(0 in shape for shape in found.values()):
            hint = "A shape with 0 comes from a file saved from ZeRO-3 shards without gathering; save it again."
        raise ValueError(f"{source} does not fit this model. {differences(expected, found)}. {hint}")
    with gathered(list(parameters.values())), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Describe the names whose shapes differ or that are missing on one side."""
    names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    nothing = "has no such tensor"
    shown = [f"{name}: model {expected.get(name, nothing)}, file {found.get(name, nothing)}" for name in names[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Context manager that gathers ZeRO-3 partitions of `parameters` for writing; a no-op without ZeRO-3."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return nullcontext()


def from_pretrained_strictly(
    model_class: Any, weights_path: str, may_come_later: Callable[[str], bool] | None = None, **kwargs: Any
) -> tuple[Any, list[str]]:
    """Call `model_class.from_pretrained`, and raise for missing, unexpected or misshapen weights.

    `may_come_later` says of a name whether its weight may be missing because another file has it. Returns the model,
    and the names of the weights that are still missing.
    """
    with broken_files_named(weights_path):
        if "quantization_config" not in kwargs and not hasattr(kwargs["config"], "quantization_config"):
            require_described(model_class, kwargs["config"], weights_path)
        with without_load_report():
            model, report = model_class.from_pretrained(
                weights_path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    to_come = sorted(filter(may_come_later, report["missing_keys"])) if may_come_later is not None else []
    missing = sorted(set(report["missing_keys"]) - set(to_come))
    unexpected = sorted(report["unexpected_keys"])
    misshapen = {name: (tuple(model_s), tuple(file_s)) for name, file_s, model_s in report["mismatched_keys"]}
    if missing or unexpected or misshapen:
        shapes = differences({n: s[0] for n, s in misshapen.items()}, {n: s[1] for n, s in misshapen.items()})
        raise ValueError(
            f"The weights in {weights_path} do not fit their config. Missing: {missing[:SHOWN]} ({len(missing)}). "
            f"Unexpected: {unexpected[:SHOWN]} ({len(unexpected)}). Different shape: {shapes or 'none'}. "
            "Check that config.json belongs to these weights."
        )
    return model, to_come


def require_described(model_class: Any, config: Any, weights_path: str) -> None:
    """Check a config against the shapes in the weights' headers, before a model of absurd sizes takes the memory."""
    shapes: dict[str, tuple[int, ...]] = {}
    for opened in map(open_safetensors, safetensors_files(weights_path)):
        shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")}
    if layers and config.num_hidden_layers != len(layers):
        raise ValueError(
            f"{weights_path}, config.json, num_hidden_layers: found {config.num_hidden_layers!r}, but the weights have "
            f"{len(layers)} layers. Check that config.json belongs to these weights."
        )
    try:
        with torch.device("meta"):
            model = getattr(model_class, "from_config", model_class)(config)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"The config.json of {weights_path} describes no model: {error}. Copy it again.") from error
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters() if name in shapes}
    if wrong := differences(expected, {name: shapes[name] for name in expected}):
        raise ValueError(
            f"The weights in {weights_path} do not fit their config. Different shape: {wrong}. Check that config.json "
            "belongs to these weights."
        )


@contextmanager
def without_load_report() -> Iterator[None]:
    """Suppress transformers' report of missing weights: errors say more, and some weights are loaded later."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


# Projector weights, as written by training of the LLaVA family.

MARK = "mm_projector."
HONEYBEE_MARK = "abstractor."


def read_projector_file(path: str | Path) -> dict[str, Tensor]:
    """Read an `mm_projector.bin` or safetensors file, in its stored dtype, on the CPU.

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
    """Select the projector's entries under local names, e.g. `model.mm_projector.0.weight` -> `0.weight`.

    Keys may have any prefix before `mm_projector.`, such as a wrapper's `base_model.model.`. Honeybee's name
    `abstractor.` is accepted too; the CLS row in the position table of its old checkpoints is dropped.
    """
    local = {name.split(MARK, 1)[1]: tensor for name, tensor in state.items() if MARK in name}
    if not local:
        local = {name.split(HONEYBEE_MARK, 1)[1]: state[name] for name in state if HONEYBEE_MARK in name}
        positions = local.get("pos_emb")
        if positions is not None and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
            local["pos_emb"] = positions[:, 1:]  # [1, 1 + S, C] -> [1, S, C]
    return local


def load_projector(projector: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load the projector's entries of `state` into `projector`, strictly. Under ZeRO-3 parameters are gathered.

    Raises:
        ValueError: keys are missing or unexpected, or a shape differs; names both sides and the likely reason.
    """
    hint = "The projector was trained for another LLM, another vision tower or another --mm_projector_type."
    fill_strictly(dict(projector.named_parameters()), projector_state(state), f"The projector in {source}", hint)


def maybe_zero_3(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """Copy a parameter to the CPU, gathered first if ZeRO-3 has sharded it (a collective call)."""
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.data.detach().cpu().clone()
    return param.detach().cpu().clone()
