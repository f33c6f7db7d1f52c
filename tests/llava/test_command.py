"""How commands end, and what they record."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from llava.command import (
    RunRecord,
    changed_flags,
    clear_errors,
    command_parser,
    errors_as_sentences,
    run_command,
    typer_app_with_debug,
)


@pytest.mark.parametrize(
    ("raised", "ending"), [(ValueError("no such file"), "error: no such file"), (KeyboardInterrupt(), 130)]
)
def test_wrong_input_ends_with_a_sentence_and_an_interrupt_without(raised: BaseException, ending: str | int) -> None:
    def command(args: object) -> None:
        raise raised

    with pytest.raises(SystemExit) as caught:
        run_command(command, command_parser("llava.test", None), [])
    assert caught.value.code == ending


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        run_command(lambda args: {}["key"], command_parser("llava.test", None), [])


def test_a_full_gpu_ends_with_a_sentence_that_says_what_to_set() -> None:
    def command(args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit, match="PER_DEVICE_TRAIN_BATCH_SIZE"):
        run_command(command, command_parser("llava.test", None), [])


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"), errors_as_sentences():
        raise ValueError("wrong")


def test_the_version_is_shown(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_parser("llava.test", None).parse_args(["--version"])
    shown = CliRunner().invoke(app, ["--version"])
    assert not ended.value.code and not shown.exit_code
    assert shown.stdout == capsys.readouterr().out == f"patch-aligned-llava {version('patch-aligned-llava')}\n"


@pytest.fixture
def app() -> typer.Typer:
    app = typer_app_with_debug("Commands that fail.")

    @app.command()
    @clear_errors
    def wrong_input(context: typer.Context, some_file: str = "?") -> None:
        raise ValueError(f"{some_file}: no such file")

    @app.command()
    @clear_errors
    def bug(context: typer.Context) -> None:
        {}["key"]

    return app


@pytest.mark.parametrize("flag", ["--some-file", "--some_file"])
def test_a_typer_command_ends_with_a_sentence_however_its_flag_is_spelled(app: typer.Typer, flag: str) -> None:
    result = CliRunner().invoke(app, ["wrong-input", flag, "a.json"])
    assert (result.exit_code, result.stderr) == (2, "Error: a.json: no such file\n")


def test_debug_and_bugs_show_the_traceback(app: typer.Typer) -> None:
    assert isinstance(CliRunner().invoke(app, ["--debug", "wrong-input"]).exception, ValueError)
    assert isinstance(CliRunner().invoke(app, ["bug"]).exception, KeyError)


def test_a_record_keeps_every_sitting_and_what_changed_between_them(tmp_path: Path) -> None:
    first = RunRecord(tmp_path, {"rate": 1.0, "path": Path("a")}, {"path": "1" * 64, "unknown": None})
    first.begin()
    killed = json.loads((tmp_path / "run.json").read_text())
    second = RunRecord(tmp_path, {"rate": 2.0, "path": Path("b")}, {"path": "1" * 64}, trained={"steps": 3})
    second.begin()
    second.end()
    RunRecord(tmp_path, {"rate": 3.0}, {}, is_writer=False).end()
    found = json.loads((tmp_path / "run.json").read_text())
    assert killed["sittings"][0]["ended"] is None and killed["sittings"] == found["sittings"][:1]
    assert (found["flags"], found["sha256"]) == ({"rate": 2.0, "path": "b"}, {"path": "1" * 64})
    assert found["sittings"][1]["changed"] == {"rate": [1.0, 2.0]} and found["trained"] == {"steps": 3}
    assert found["sittings"][1]["started"] <= found["sittings"][1]["ended"]
    assert {"python", "torch", "patch-aligned-llava"} <= found["sittings"][1]["versions"].keys()
    fresh = RunRecord(tmp_path, {}, {}, resumes=False)
    fresh.begin()
    assert len(json.loads((tmp_path / "run.json").read_text())["sittings"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_flags_differ_by_content_and_not_by_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()

    def run(path: str, digest: str, **flags: Any) -> dict[str, Any]:
        return {"flags": {"data": path, **flags}, "sha256": {"data": digest}}

    before = run("data.json", "a" * 64, images="images")
    assert not changed_flags({}, before)
    assert not changed_flags(before, run("/copy/of/data.json", "a" * 64, images=f"{tmp_path}/images/", new=1))
    changed = changed_flags(before, run("data.json", "b" * 64, images="nowhere"))
    assert changed.keys() == {"data", "images"} and "b" * 12 in changed["data"][1]
