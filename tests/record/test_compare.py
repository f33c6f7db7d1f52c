"""`compare.py` finds every difference and passes the named ones; and the interface is that of the recorded one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.record import compare as compare_records

HERE = Path(__file__).parent
GOLDEN = HERE.parents[0] / "goldens" / "record"
SOUND = {"loss": [7.25, 1e-17], "rows": 3, "stderr": None, "answers": {"a/b": "yes", "": []}, "done": True}

Compare = Callable[..., int]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Compares two values of one part, with the given text of differences.toml."""

    def compare(one: Any, other: Any, differences: str = "", other_part: str = "part") -> int:
        (tmp_path / "differences.toml").write_text(differences)
        for folder, part, value in (("a", "part", one), ("b", other_part, other)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{part}.json").write_text(json.dumps(value))
        words = [str(tmp_path / "a"), str(tmp_path / "b"), "--differences", str(tmp_path / "differences.toml")]
        return compare_records.main(words)

    return compare


def test_equal_records_are_equal_and_counted(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(SOUND, SOUND) == 0
    assert "7 values: 7 part" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", [7.250000000000001, 1e-17]),
        ("loss", [7.25, 1.0000000000000001e-17 * (1 + 2**-52)]),
        ("loss", [7.25]),
        ("loss", [7.25, 1e-17, 0.0]),
        ("loss", [1e-17, 7.25]),
        ("rows", 3.0),
        ("rows", "3"),
        ("rows", None),
        ("stderr", 0),
        ("stderr", float("nan")),
        ("answers", {"a/b": "Yes", "": []}),
        ("answers", {"a/b": "yes", "": {}}),
        ("answers", {"a/b": "yes"}),
        ("answers", {"a/b": "yes", "": [], "c": None}),
        ("done", 1),
    ],
)
def test_a_changed_value_or_type_is_a_difference(compare: Compare, key: str, value: Any) -> None:
    assert compare(SOUND, {**SOUND, key: value}) == 1
    assert compare({**SOUND, key: value}, SOUND) == 1


def test_a_missing_key_a_new_key_and_a_missing_part_are_differences(compare: Compare) -> None:
    without = {key: value for key, value in SOUND.items() if key != "stderr"}
    assert compare(SOUND, without) == 1
    assert compare(without, SOUND) == 1
    assert compare(SOUND, SOUND, other_part="another") == 1


def test_named_differences_pass_and_no_others(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    named = '[[difference]]\nkey = "part/loss/*"\nreason = "the loss is summed in float64"\n'
    changed = {**SOUND, "loss": [7.5, 0.0]}
    assert compare(SOUND, changed, named) == 0
    assert "named: 2 (the loss is summed in float64)" in capsys.readouterr().out
    assert compare(SOUND, {**changed, "rows": 4}, named) == 1
    assert compare(SOUND, {**SOUND, "losses": 1}, named) == 1  # no part of a longer name


def test_last_digits_may_be_named_and_nothing_beyond(compare: Compare) -> None:
    named = '[[difference]]\nkey = "part/*"\nreason = "summed in another order"\nwithin = 1e-12\n'
    assert compare(SOUND, {**SOUND, "loss": [7.25 + 5e-13, 1e-17]}, named) == 0
    assert compare(SOUND, {**SOUND, "loss": [7.25 + 5e-12, 1e-17]}, named) == 1
    assert compare(SOUND, {**SOUND, "rows": 3.0}, named) == 1
    assert compare(SOUND, {**SOUND, "stderr": 0.0}, named) == 1


def test_a_difference_without_a_reason_is_refused(compare: Compare) -> None:
    with pytest.raises(SystemExit, match="reason"):
        compare(SOUND, SOUND, '[[difference]]\nkey = "part/loss"\nreason = " "\n')


@pytest.mark.slow
@pytest.mark.parametrize("part", ["dry_run", "flags"])
def test_commands_and_flags_are_those_recorded(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The part of a record that is equal on every machine, against that of commit 2628157."""
    out = tmp_path / "tree"
    command = [sys.executable, str(HERE / "record.py"), str(out), "--inputs", str(tmp_path), "--parts", part]
    subprocess.run(command, check=True, capture_output=True, text=True)
    recorded, found = (json.loads((folder / f"{part}.json").read_text()) for folder in (GOLDEN, out))
    if part == "flags" and importlib.util.find_spec("lmms_eval") is None:
        for name in [name for name in recorded["commands"] if name.startswith("eval.")]:
            recorded["commands"].pop(name), found["commands"].pop(name)  # cannot start without the extra `eval`
    for folder, value in (("a", recorded), ("b", found)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{part}.json").write_text(json.dumps(value))
    assert compare_records.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0, capsys.readouterr().out
