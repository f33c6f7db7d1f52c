"""Answers one question about one or several images.

    python -m llava.eval.run_llava --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg \\
        --query "What should I be cautious about when I visit here?"

From Python: `llava.chat(checkpoint, image, question)`, or `eval_model(args)` with any object that has these flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.command import command_parser, run_command
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import template_named
from llava.eval.vqa_cli import add_generation_flags, add_model_flags, answers_of, settings_of, with_defaults
from llava.eval.vqa_files import Question, open_image
from llava.mm_utils import load_rgb_image


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


def chat(checkpoint: str | Path, image: str | Path | Image.Image, question: str, base: str | None = None) -> str:
    """Return a checkpoint's greedy answer to a question about an image. Each call loads the checkpoint.

    Args:
        checkpoint: folder or hub name.
        image: file, http(s) address, or picture.
        question: the text. After stage 1 alone the model writes captions: ask the empty question.
        base: the language model, where the checkpoint is a projector or a LoRA adapter.
    """
    given = argparse.Namespace(model_path=str(checkpoint), model_base=base, query=question, temperature=0)
    shown = [image if isinstance(image, Image.Image) else load_image(str(image))]
    return _answer(with_defaults(given, argument_parser()), shown)


def eval_model(args: Any) -> str:
    """Print and return the answer to `args.query`; flags that `args` lacks have their defaults."""
    args = with_defaults(args, argument_parser())
    text = _answer(args, load_images(image_parser(args)))
    print(text)
    return text


def _answer(args: argparse.Namespace, images: Sequence[Image.Image]) -> str:
    if args.conv_mode is not None:
        template_named(args.conv_mode)
    question = Question("--query", args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN), tuple(images))
    args.batch_size = args.workers = 1
    return next(answers_of(args, args.model_path, [question], settings_of(args))).text


if __name__ == "__main__":
    run_command(eval_model, argument_parser())
