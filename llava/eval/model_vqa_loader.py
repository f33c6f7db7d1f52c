"""Answers a JSONL file of questions about images.

    python -m llava.eval.model_vqa_loader --model-path liuhaotian/llava-v1.5-7b --temperature 0 \\
        --question-file questions.jsonl --image-folder images --answers-file answers.jsonl

A question has `question_id`, `image` and `text`; an answer `question_id`, `prompt`, `text`, `answer_id`, `model_id` and
`metadata`. A killed run continues where it stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.command import run_command
from llava.eval.vqa_cli import answer_to_file, question_parser, with_defaults
from llava.eval.vqa_files import chunk_of, vqa_questions


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags; answers are short here unless told otherwise."""
    return question_parser("llava.eval.model_vqa_loader", __doc__, max_new_tokens=128)


def eval_model(args: Any) -> None:
    """Answers `args.question_file` into `args.answers_file`; flags that `args` lacks have their defaults."""
    args = with_defaults(args, argument_parser())
    questions = chunk_of(vqa_questions(args.question_file, args.image_folder), args.num_chunks, args.chunk_idx)
    answer_to_file(args, questions)


if __name__ == "__main__":
    run_command(eval_model, argument_parser())
