"""Baselines that do not look, on rows small enough to work them out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.mini.baselines import OUT, Baselines, as_table, box_baselines, main, short_answer_baselines
from playground.mini import evaluation_set


def test_chance_the_best_constant_and_the_question_alone() -> None:
    rows = [
        {"question": "Colour of the car?", "answer": "red"},
        {"question": "Colour of the car?", "answer": "blue"},
        {"question": "Colour of the tree?", "answer": "green"},
        {"question": "Colour of the boat?", "answer": "red"},
    ]
    training = [("Colour of the car?", "blue"), ("Colour of the tree?", "green"), ("Colour of the leaf?", "green")]
    # Always "red" is right twice. By the question: blue, blue, green, and for the boat, never asked about, green.
    assert short_answer_baselines("colour", rows, training) == Baselines(1 / 3, 0.5, 0.5)


def test_the_constant_box_is_the_mean_one_read_in_the_padded_square() -> None:
    # Mean box [0.25, 0.25, 0.75, 0.75]: of a 200 x 100 picture, padded by 50 above and below, that is x 50 to 150 and
    # y 0 to 100. IoU with the first row's box 1, with the second's 0.4.
    rows = [
        {"box_xyxy_px": [50.0, 0.0, 150.0, 100.0], "width": 200, "height": 100},
        {"box_xyxy_px": [50.0, 0.0, 150.0, 40.0], "width": 200, "height": 100},
    ]
    training = [[0.0, 0.25, 0.5, 0.75], [0.5, 0.25, 1.0, 0.75]]
    assert box_baselines(rows, training) == Baselines(None, 0.5, None)


def test_the_table_is_in_per_cent() -> None:
    table = as_table({"colour": (60, Baselines(1 / 3, 0.5, 1.0)), "rec": (80, Baselines(None, 0.025, None))})
    lines = table.markdown().splitlines()
    assert lines[2:] == ["| mini_colour | 60 | 33.3 | 50.0 | 100.0 |", "| mini_rec | 80 | – | 2.5 | – |"]


def test_what_is_missing_is_named_with_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no file .*questions\.jsonl; next: bash scripts/prepare_mini\.sh"):
        main(["--data", str(tmp_path), "--train", str(tmp_path)])


def test_the_evaluation_set_is_looked_for_where_it_is_made() -> None:
    assert evaluation_set.OUT == OUT
