"""How commands end."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from llava.command import clear_errors, command_parser, run_command, typer_app_with_debug


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
