"""JSON into dataclasses, strictly: each field is there, no other is, and each has the type that it is declared with."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_types_of = functools.cache(get_type_hints)  # reading them anew is half the time of a file with many rows


def read_json(text: str) -> Any:
    """A JSON document; numbers that are not finite are none.

    Raises:
        ValueError: says where the text is no JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError:
        raise ValueError("no JSON that can be read: arrays or objects within each other, too deep") from None


def from_json(cls: type[T], document: Any) -> T:
    """An instance of a dataclass from a JSON object; JSON arrays become tuples where these are declared.

    Raises:
        ValueError: names the field, what was found and what was expected.
    """
    return _read(cls, document, "")


def _read(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        assert len(rest) == 1, "fields here are of one type, or that or None"
        return _read(rest[0], value, place)
    if origin is Literal:
        _expect(isinstance(value, str) and value in arguments, place, value, " or ".join(map(repr, arguments)))
        return value
    if origin is dict:
        _expect(isinstance(value, dict), place, value, "an object")
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is tuple:
        _expect(isinstance(value, list | tuple), place, value, "an array")
        return tuple(_read(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if kind is Any:
        return value
    if kind is float:
        _expect(_is_number(value) and math.isfinite(value), place, value, "a finite number")
        return value
    if kind is int:
        _expect(_is_number(value) and isinstance(value, int), place, value, "a whole number")
        return value
    assert kind is str, kind
    _expect(isinstance(value, str), place, value, "a text")
    return value


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    _expect(isinstance(value, dict), place, value, "an object")
    hints = _types_of(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    prefix = f"{place}." if place else ""
    for name in names:
        if name not in value:
            raise ValueError(f"field {prefix + name!r}: found nothing, expected it among {', '.join(names)}")
    for name in value:
        if name not in names:
            raise ValueError(f"field {prefix + name!r}: found one too many, expected {', '.join(names)}")
    return kind(**{name: _read(hints[name], value[name], prefix + name) for name in names})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect(holds: bool, place: str, value: Any, expected: str) -> None:
    if not holds:
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        where = f"field {place!r}: " if place else ""
        raise ValueError(f"{where}found {shown if len(shown) <= 80 else shown[:80] + '…'}, expected {expected}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"found {name}, expected a finite number")
