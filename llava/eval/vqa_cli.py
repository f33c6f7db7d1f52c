"""Shared by the commands that answer a file of questions: flags, loading, and the answers file."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llava.checkpoint_files import require_checkpoint
from llava.command import command_parser
from llava.conversation import conversation_mode, template_named
from llava.eval.vqa_files import (
    Answer,
    GenerationSettings,
    Question,
    model_hashes,
    open_answers,
    require_images,
    require_positive,
)
from llava.mm_utils import get_model_name_from_path

logger = logging.getLogger(__name__)

LONG_ANSWER = 1024
"""Upstream's limit of new tokens in commands without a flag for it."""


def question_parser(module: str, description: str | None, max_new_tokens: int = LONG_ANSWER) -> argparse.ArgumentParser:
    """Upstream's flags and defaults, and what a batch needs."""
    parser = command_parser(module, description)
    add_model_flags(parser)
    parser.add_argument("--image-folder", default="", help="where the questions' images lie")
    parser.add_argument("--question-file", default="tables/question.jsonl", help="default: %(default)s")
    parser.add_argument(
        "--answers-file", default="answer.jsonl", help="JSONL; a killed run continues. default: %(default)s"
    )
    parser.add_argument("--conv-mode", help="template; default: the checkpoint's own")
    parser.add_argument("--num-chunks", type=int, default=1, help="parts to split the questions into")
    parser.add_argument("--chunk-idx", type=int, default=0, help="which part to answer, from 0")
    add_generation_flags(parser, max_new_tokens)
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered at once; default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="threads that read images ahead; default: %(default)s")
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and where it runs."""
    parser.add_argument("--model-path", required=True, help="checkpoint: folder or hub name")
    parser.add_argument("--model-base", help="the LLM that a stage-1 projector or a LoRA adapter belongs to")
    parser.add_argument("--device", help="default: cuda, or cpu where there is no GPU")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights; default: float16 on a GPU, float32 on a CPU, where bfloat16 may be faster",
    )


def add_generation_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How answers are generated; upstream's spelling."""
    parser.add_argument("--temperature", type=float, default=0.2, help="0 answers greedily; default: %(default)s")
    parser.add_argument("--top_p", type=float, help="of nucleus sampling")
    parser.add_argument("--num_beams", type=int, default=1, help="of beam search; default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, where temperature is above 0")


def with_defaults(args: Any, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Fill in the parser's defaults: from Python, `args` may be any object with some of the flags."""
    names = {action.dest: action.default for action in parser._actions if action.dest not in ("help", "version")}
    return argparse.Namespace(**{name: getattr(args, name, default) for name, default in names.items()})


def settings_of(args: argparse.Namespace) -> GenerationSettings:
    """The generation flags."""
    return GenerationSettings(args.temperature, args.top_p, args.num_beams, args.max_new_tokens, args.seed)


def answer_to_file(args: argparse.Namespace, questions: Sequence[Question]) -> None:
    """Answer questions with the checkpoint that `args` name, into `args.answers_file`."""
    if args.conv_mode is not None:
        template_named(args.conv_mode)
    require_positive(batch_size=args.batch_size, workers=args.workers)
    require_images(questions)
    settings = settings_of(args)
    model_path = os.path.expanduser(args.model_path)  # noqa: PTH111 - a Path would take "." off, and make it a hub name
    require_checkpoint(model_path, args.model_base)
    run = {
        "model": [model_hashes(model_path), model_hashes(args.model_base)],
        "conv_mode": args.conv_mode,
        "settings": asdict(settings),
        **({"dtype": args.dtype} if args.dtype else {}),
    }
    with open_answers(args.answers_file, questions, get_model_name_from_path(model_path), run) as answers_file:
        remaining = questions[answers_file.kept :]
        if not remaining:
            logger.info("%s: nothing is left to answer", args.answers_file)
        answers = answers_of(args, model_path, remaining, settings) if remaining else iter(())
        empty = 0
        with (
            logging_redirect_tqdm(),
            answers_file.writer() as write,  # leaves an empty chunk its file
            tqdm(answers, total=len(questions), initial=answers_file.kept, unit="question") as bar,
        ):
            for answer in bar:
                write(answer)
                empty += not answer.text
    if empty:
        logger.warning("%s: %d of %d answers are empty", args.answers_file, empty, len(remaining))


def load_model(args: argparse.Namespace, **kwargs: Any) -> Any:
    """Load the checkpoint that `args` name, as `load_pretrained_model` does; torch is imported no earlier than here."""
    model_path = os.path.expanduser(args.model_path)  # noqa: PTH111 - a Path would take "." off, and make it a hub name
    require_checkpoint(model_path, args.model_base)
    import torch

    from llava.model.builder import load_pretrained_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model_name = get_model_name_from_path(model_path)
    return load_pretrained_model(model_path, args.model_base, model_name, device=device, dtype=args.dtype, **kwargs)


def answers_of(
    args: argparse.Namespace, model_path: str, questions: Sequence[Question], settings: GenerationSettings
) -> Iterator[Answer]:
    """Load the checkpoint at `model_path`, and return an iterator that generates the answers."""
    model_name = get_model_name_from_path(model_path)
    tokenizer, model, image_processor, _ = load_model(args)
    from llava.eval.answering import answer_questions  # it needs torch

    own_mode = conversation_mode(model_name, model.config)
    if args.conv_mode not in (None, own_mode):
        logger.warning("--conv-mode %s is used; the checkpoint's own seems to be %s", args.conv_mode, own_mode)
    mode = args.conv_mode or own_mode
    logger.info("%s answers in the template %s, %d at once", model_name, mode, args.batch_size)
    template = template_named(mode)
    counts = {"batch_size": args.batch_size, "workers": args.workers}
    return answer_questions(questions, tokenizer, model, image_processor, template, settings, **counts)
