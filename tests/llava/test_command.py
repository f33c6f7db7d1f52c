"""How commands end."""

from __future__ import annotations

import pytest

from llava.command import command_parser, run_command


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
