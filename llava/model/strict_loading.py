"""Filling parameters from files strictly: every name must be there, on both sides, in the same shape."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.tensor_files import unreadable

SHOWN = 10
"""How many differing names an error spells out."""


def fill_strictly(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: object, hint: str
) -> None:
    """Copies `tensors` into the parameters of the same names; under ZeRO-3 on gathered parameters.

    Args:
        parameters: all that are to be filled.
        tensors: of any dtype.
        source: where the tensors come from, for messages.
        hint: the likely reason and the next step, for messages.

    Raises:
        ValueError: a name is missing on one side, or shapes differ; the message names both sides.
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
    """Names whose shapes differ or that are missing on one side, in words."""
    names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    nothing = "has no such tensor"
    shown = [f"{name}: model {expected.get(name, nothing)}, file {found.get(name, nothing)}" for name in names[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Context in which ZeRO-3 partitions of `parameters` are whole and writable; does nothing elsewhere."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return nullcontext()


def from_pretrained_strictly(
    model_class: Any, weights_path: str, may_come_later: Callable[[str], bool] | None = None, **kwargs: Any
) -> tuple[Any, list[str]]:
    """`model_class.from_pretrained`, where a missing, superfluous or misshapen weight is an error, not a warning.

    Args:
        may_come_later: tells by its name whether a weight may be missing, as another file brings it. None: none may.
        **kwargs: of `from_pretrained`.

    Returns:
        the model, and the names of the weights that are still to come.

    Raises:
        ValueError: the weights do not fit the config; the message names them.
    """
    try:
        with without_load_report():
            model, report = model_class.from_pretrained(
                weights_path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except pickle.UnpicklingError as error:
        raise ValueError(unreadable(weights_path, error)) from error
    to_come = sorted(filter(may_come_later, report["missing_keys"])) if may_come_later is not None else []
    missing = sorted(set(report["missing_keys"]) - set(to_come))
    unexpected = sorted(report["unexpected_keys"])
    misshapen = {name: (tuple(model_s), tuple(file_s)) for name, file_s, model_s in report["mismatched_keys"]}
    if missing or unexpected or misshapen:
        shapes = differences({n: s[0] for n, s in misshapen.items()}, {n: s[1] for n, s in misshapen.items()})
        raise ValueError(
            f"The weights in {weights_path} do not fit their config. Missing: {missing[:SHOWN]} ({len(missing)}). "
            f"Unexpected: {unexpected[:SHOWN]} ({len(unexpected)}). Of another shape: {shapes or 'none'}. "
            "Check that config.json belongs to these weights."
        )
    return model, to_come


@contextmanager
def without_load_report() -> Iterator[None]:
    """Holds back transformers' table of missing weights: it alarms where they are to come, and errors say more."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)
