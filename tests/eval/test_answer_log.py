"""Answers that were given are kept, whatever is in them and wherever the process was killed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.adapter import AnswerLog

ANSWERS = ["yes", "two\nlines, and a \u2028 separator", "日本の犬", "no"]


def request(row: int, question: str = "What?") -> Any:
    """What an answer depends on of a request of lmms-eval."""
    return SimpleNamespace(args=(question, {"max_new_tokens": 8}, None, row, "task", "test"))


def answer(folder: Path, rows: list[int], asked: list[int], identity: str = "weights", rank: int = 0) -> list[str]:
    """Answers from a log that is opened anew; the rows that had to be asked are added to `asked`."""

    def ask(requests: list[Any]) -> list[str]:
        asked.extend(one.args[3] for one in requests)
        return [ANSWERS[one.args[3]] for one in requests]

    log = AnswerLog(folder, {"model": identity}, rank)
    return log.answer([request(row) for row in rows], ask, lambda one: one.args[3], block=2)


@pytest.mark.parametrize("cut_bytes", [1, 2, 9, 40])
def test_a_log_that_was_cut_loses_its_last_answer_alone(tmp_path: Path, cut_bytes: int) -> None:
    answer(tmp_path, [0, 1, 2], [])
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut_bytes])
    for expected in ([2, 3], []):
        asked: list[int] = []
        assert answer(tmp_path, [3, 2, 1, 0], asked) == ANSWERS[::-1]
        assert asked == expected


def test_processes_read_each_others_answers_and_write_their_own(tmp_path: Path) -> None:
    answer(tmp_path, [0], [], rank=0)
    answer(tmp_path, [1], [], rank=1)
    asked: list[int] = []
    assert answer(tmp_path, [0, 1, 2, 2], asked, rank=1) == [ANSWERS[0], ANSWERS[1], ANSWERS[2], ANSWERS[2]]
    assert asked == [2]  # rows that only even out the processes are not asked again
    assert [len(path.read_text().splitlines()) for path in sorted(tmp_path.iterdir())] == [1, 2]


def test_answers_of_other_weights_are_not_taken_up(tmp_path: Path) -> None:
    answer(tmp_path, [0], [])
    asked: list[int] = []
    answer(tmp_path, [0], asked, identity="other weights")
    assert asked == [0]


def test_the_first_process_says_how_far_it_is_in_all_blocks_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(tmp_path, [0, 1], [])
    answer(tmp_path, [0, 1, 2, 3], [], identity="two blocks")
    shown = capsys.readouterr().err
    assert "4/4" in shown and "2/2" not in shown
    answer(tmp_path, [0, 1, 2, 3], [], identity="another process", rank=1)
    assert capsys.readouterr().err == ""
