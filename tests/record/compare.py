"""Compares two records value by value; every difference must be named in differences.toml.

    python tests/record/compare.py A B [--differences FILE]

A value differs if its type differs (1 is not 1.0, null is not 0), if any digit differs, or if one record lacks its key.
An entry of differences.toml has a key (`*` stands for anything), a reason and, where only the last digits of floats may
differ, `within`: the largest absolute difference.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ABSENT = "(absent)"
SHOWN = 40


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text, null and empty collection below `value`, with its place."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}/{name}")
    elif isinstance(value, list) and value:
        for place, item in enumerate(value):
            yield from leaves(item, f"{key}/{place}")
    else:
        yield key.lstrip("/"), value


def read_record(folder: Path) -> dict[str, Any]:
    """All values of a record, by part and place."""
    parts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not parts:
        raise SystemExit(f"{folder}: found no *.json, expected a record; next: bash tests/record/record.sh {folder}")
    return dict(leaves(parts))


def written(value: Any) -> str:
    """A value such that equal texts mean equal values of equal types."""
    return value if value is ABSENT else json.dumps(value, ensure_ascii=False)


def find_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Both values of each key under which they differ."""
    pairs = {key: (written(one.get(key, ABSENT)), written(other.get(key, ABSENT))) for key in {**one, **other}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


class Named(NamedTuple):
    """A difference that is meant: under which keys, why, and by how much floats may differ (None: by anything)."""

    keys: re.Pattern[str]
    reason: str
    within: float | None

    def covers(self, key: str, one: Any, other: Any) -> bool:
        """Whether the two values under `key` may differ as they do."""
        if not self.keys.fullmatch(key):
            return False
        if self.within is None:
            return True
        return isinstance(one, float) and isinstance(other, float) and abs(one - other) <= self.within


def read_named(path: Path) -> list[Named]:
    """The differences that are meant."""
    named = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("difference", []):
        if not {"key", "reason"} <= set(entry) <= {"key", "reason", "within"} or not entry["reason"].strip():
            raise SystemExit(f"{path}: found {entry}, expected a key, a reason and perhaps `within`")
        keys = re.compile(re.escape(entry["key"]).replace(r"\*", ".*"))
        named.append(Named(keys, entry["reason"], entry.get("within")))
    return named


def main(arguments: list[str] | None = None) -> int:
    """Prints what differs; the exit status is 1 if something does that is not named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, metavar="A")
    parser.add_argument("other", type=Path, metavar="B")
    parser.add_argument("--differences", type=Path, default=Path(__file__).with_name("differences.toml"))
    options = parser.parse_args(arguments)
    one, other = read_record(options.one), read_record(options.other)
    named = read_named(options.differences)

    meant: Counter[str] = Counter()
    unnamed = {}
    for key, pair in find_differences(one, other).items():
        values = one.get(key, ABSENT), other.get(key, ABSENT)
        reason = next((entry.reason for entry in named if entry.covers(key, *values)), None)
        if reason is None:
            unnamed[key] = pair
        else:
            meant[reason] += 1
    for key, (before, after) in list(unnamed.items())[:SHOWN]:
        print(f"{key}\n  A {before[:200]}\n  B {after[:200]}")
    if len(unnamed) > SHOWN:
        print(f"... and {len(unnamed) - SHOWN} more")
    for reason in dict.fromkeys(entry.reason for entry in named):
        print(f"named: {meant[reason]} ({reason})")
    compared = Counter(key.split("/")[0] for key in {**one, **other})
    print(f"{sum(compared.values())} values: " + ", ".join(f"{number} {part}" for part, number in compared.items()))
    print(f"{len(unnamed)} differences that are not named" if unnamed else "equal")
    return int(bool(unnamed))


if __name__ == "__main__":
    sys.exit(main())
