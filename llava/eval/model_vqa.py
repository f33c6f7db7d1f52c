"""Answers a JSONL file of questions about images, at length: `model_vqa_loader` with up to 1024 new tokens.

    python -m llava.eval.model_vqa --model-path liuhaotian/llava-v1.5-7b --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.command import run_command
from llava.eval import model_vqa_loader
from llava.eval.vqa_cli import question_parser, with_defaults


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    return question_parser("llava.eval.model_vqa", __doc__)


def eval_model(args: Any) -> None:
    """Answers `args.question_file` into `args.answers_file`; flags that `args` lacks have their defaults."""
    model_vqa_loader.eval_model(with_defaults(args, argument_parser()))


if __name__ == "__main__":
    run_command(eval_model, argument_parser())
