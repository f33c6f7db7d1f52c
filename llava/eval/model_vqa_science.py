"""Answers ScienceQA in LLaVA's format, questions with an image and without.

    python -m llava.eval.model_vqa_science --model-path liuhaotian/llava-v1.5-7b --single-pred-prompt --temperature 0 \\
        --question-file llava_test_CQM-A.json --image-folder images/test --answers-file answers.jsonl

The question file is a JSON array of `id`, `conversations` (the question comes first) and, where there is one, `image`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava.command import run_command
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.vqa_cli import answer_to_file, question_parser, with_defaults
from llava.eval.vqa_files import Question, checked_field, chunk_of, image_path, read_json

OPTION_LETTER = "Answer with the option's letter from the given choices directly."


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = question_parser("llava.eval.model_vqa_science", __doc__)
    parser.add_argument("--single-pred-prompt", action="store_true", help=f'end each question by "{OPTION_LETTER}"')
    parser.add_argument("--answer-prompter", action="store_true", help="accepted and without effect, as upstream")
    return parser


def science_questions(path: str | Path, image_folder: str | Path, option_letter: bool) -> list[Question]:
    """Questions of the file."""
    questions = []
    for number, record in enumerate(read_json(path, "an array of questions (--question-file)", list), start=1):
        where = f"{path}, record {number}"
        turns = checked_field(record, "conversations", list, where)
        if not turns:
            raise ValueError(f"{where}, field `conversations`: found none, expected the question first")
        text = (
            checked_field(turns[0], "value", str, f"{where}, conversations[0]").replace(DEFAULT_IMAGE_TOKEN, "").strip()
        )
        images: tuple[Path, ...] = ()
        if "image" in record:
            images = (image_path(checked_field(record, "image", str, where), image_folder, where),)
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text}"
        if option_letter:
            text = f"{text}\n{OPTION_LETTER}"
        questions.append(Question(checked_field(record, "id", (str, int), where), text, images))
    return questions


def eval_model(args: Any) -> None:
    """Answer `args.question_file` into `args.answers_file`; flags that `args` lacks have their defaults."""
    args = with_defaults(args, argument_parser())
    questions = science_questions(args.question_file, args.image_folder, args.single_pred_prompt)
    answer_to_file(args, chunk_of(questions, args.num_chunks, args.chunk_idx))


if __name__ == "__main__":
    run_command(eval_model, argument_parser())
