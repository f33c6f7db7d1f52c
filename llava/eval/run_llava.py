"""Answers one question about one or several images.

    python -m llava.eval.run_llava --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg \\
        --query "What should I be cautious about when I visit here?"

From Python: `eval_model(args)` with any object that has these flags.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from PIL import Image

from llava.command import command_parser, run_command
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import conversation_mode, template_named
from llava.eval.vqa_cli import add_generation_flags, add_model_flags, load_model, settings_of, with_defaults
from llava.eval.vqa_files import Question, open_image
from llava.mm_utils import get_model_name_from_path, load_rgb_image

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = command_parser("llava.eval.run_llava", __doc__)
    add_model_flags(parser)
    parser.add_argument("--image-file", required=True, help="path or http(s) address; several with --sep between")
    parser.add_argument("--query", required=True, help=f"the question; {IMAGE_PLACEHOLDER} in it places an image")
    parser.add_argument("--conv-mode", help="template; default: the checkpoint's own")
    parser.add_argument("--sep", default=",", help="between image files; default: %(default)s")
    add_generation_flags(parser, max_new_tokens=512)
    return parser


def image_parser(args: Any) -> list[str]:
    """Return the image files that the flags name."""
    return args.image_file.split(args.sep)


def load_image(image_file: str) -> Image.Image:
    """Load the image at a path or an http(s) address as RGB. Raises `OSError` if it cannot be fetched or read."""
    if not image_file.startswith(("http://", "https://")):
        return load_rgb_image(image_file)
    import requests

    response = requests.get(image_file, timeout=30)
    response.raise_for_status()
    return open_image(response.content, image_file)


def load_images(image_files: Sequence[str]) -> list[Image.Image]:
    """Load the images at paths or addresses."""
    return [load_image(image_file) for image_file in image_files]


def eval_model(args: Any) -> str:
    """Print and return the answer to `args.query`; flags that `args` lacks have their defaults."""
    args = with_defaults(args, argument_parser())
    if args.conv_mode is not None:
        template_named(args.conv_mode)
    settings = settings_of(args)
    images = tuple(load_images(image_parser(args)))
    question = Question("--query", args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN), images)
    tokenizer, model, image_processor, _ = load_model(args)
    from llava.eval.answering import answer_questions  # it needs torch

    own_mode = conversation_mode(get_model_name_from_path(args.model_path), model.config)
    if args.conv_mode not in (None, own_mode):
        logger.warning("--conv-mode %s is used; the checkpoint's own seems to be %s", args.conv_mode, own_mode)
    template = template_named(args.conv_mode or own_mode)
    answers = answer_questions([question], tokenizer, model, image_processor, template, settings)
    text = next(answers).text
    print(text)
    return text


if __name__ == "__main__":
    run_command(eval_model, argument_parser())
