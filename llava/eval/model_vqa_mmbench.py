"""Answers MMBench: a table of multiple-choice questions with the images inside.

    python -m llava.eval.model_vqa_mmbench --model-path liuhaotian/llava-v1.5-7b --single-pred-prompt --temperature 0 \\
        --question-file mmbench_dev_20230712.tsv --answers-file answers/mmbench_dev_20230712/llava-v1.5-7b.jsonl

Columns are `index`, `question`, `hint`, `A` to `D` and `image` (base64). With --all-rounds each question is asked once
for each of its options, which move round by one place each time.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from llava.command import run_command
from llava.eval.model_vqa_science import OPTION_LETTER
from llava.eval.vqa_cli import answer_to_file, question_parser, with_defaults
from llava.eval.vqa_files import Question, chunk_of, read_text

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("index", "question", "hint", *LETTERS, "image")
OPTION_LETTER_CN = "请直接回答选项字母。"

# upstream parity: what pandas takes for an empty cell, so that an option that reads "None" ends the list.
_EMPTY = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
          "NA", "NULL", "n/a", "null")  # fmt: skip


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = question_parser("llava.eval.model_vqa_mmbench", __doc__)
    parser.add_argument("--all-rounds", action="store_true", help="ask once for each option, moving them round")
    parser.add_argument("--single-pred-prompt", action="store_true", help="end each question by asking for a letter")
    parser.add_argument(
        "--lang", choices=("en", "cn"), default="en", help="cn asks for the letter in Chinese; default: %(default)s"
    )
    return parser


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a tab-separated table with a header, quoted as CSV is."""
    csv.field_size_limit(sys.maxsize)  # an image is a cell
    text = read_text(path, "MMBench's table, tab-separated (--question-file)")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, tab-separated")
    rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if short := [name for name in COLUMNS if row[name] is None]:
            raise ValueError(f"{path}, row {number}: no cell for {', '.join(short)}; is the file cut off?")
    return rows


def rounds_of(row: dict[str, str], where: str, all_rounds: bool, option_letter: str) -> list[Question]:
    """Return a row's question, or with `all_rounds` one for each rotation of its options. `option_letter` ends each."""
    options: list[str] = []
    for letter in LETTERS:
        if is_empty(row[letter]):
            break
        options.append(row[letter])
    letters = list(LETTERS[: len(options)])
    try:
        index, image = int(row["index"]), base64.b64decode(row["image"], validate=True)
        Image.open(io.BytesIO(image))
    except (ValueError, OSError) as error:
        found = f"index {row['index'][:20]!r}, image of {len(row['image'])} characters"
        raise ValueError(f"{where}: {error} (found {found}); expected a number and an image as base64") from None
    hint = [] if is_empty(row["hint"]) else [row["hint"]]
    questions = []
    for turn in range(len(options) if all_rounds else 1):
        moved = options[turn:] + options[:turn]
        listed = [f"{letter}. {option}" for letter, option in zip(letters, moved, strict=True)]
        prompt = "\n".join([*hint, row["question"], *listed])
        line = {
            "prompt": prompt,
            "round_id": turn,
            "options": moved,
            "option_char": letters[turn:] + letters[:turn],
        }
        questions.append(Question(index, f"{prompt}\n{option_letter}" if option_letter else prompt, (image,), line))
    return questions


def is_empty(cell: str) -> bool:
    """Whether a cell counts as empty."""
    return cell in _EMPTY or cell.lower() in ("nan", "none")


def eval_model(args: Any) -> None:
    """Answer `args.question_file` into `args.answers_file`; flags that `args` lacks have their defaults."""
    args = with_defaults(args, argument_parser())
    letter = (OPTION_LETTER_CN if args.lang == "cn" else OPTION_LETTER) if args.single_pred_prompt else ""
    rows = list(enumerate(read_table(args.question_file), start=1))
    questions = [
        question
        for number, row in chunk_of(rows, args.num_chunks, args.chunk_idx)
        for question in rounds_of(row, f"{args.question_file}, row {number}", args.all_rounds, letter)
    ]
    answer_to_file(args, questions)


if __name__ == "__main__":
    run_command(eval_model, argument_parser())
