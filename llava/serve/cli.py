"""Chat about an image in the terminal.

    python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg

The answer streams as it is generated. `/image FILE` shows another image, `/reset` forgets what was said; an empty line
or the end of input leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from typing import Any

from PIL import Image

from llava.command import command_parser, run_command
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates, conversation_mode
from llava.eval.run_llava import load_image
from llava.eval.vqa_cli import add_model_flags, load_model
from llava.eval.vqa_files import GenerationSettings
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token

COMMANDS = "/image FILE shows another image, /reset forgets what was said; an empty line or Ctrl-D leaves."


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = command_parser("llava.serve.cli", __doc__)
    add_model_flags(parser)
    parser.add_argument("--image-file", required=True, help="path or http(s) address of the image")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="template; default: the checkpoint's own")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 answers greedily; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--load-8bit", action="store_true", help="quantise the LLM to 8 bits")
    parser.add_argument("--load-4bit", action="store_true", help="quantise the LLM to 4 bits")
    parser.add_argument("--debug", action="store_true", help="print each prompt as the model sees it")
    return parser


class ImageChat:
    """A conversation about an image."""

    def __init__(self, tokenizer: Any, model: Any, image_processor: Any, image: Image.Image, template: Conversation):
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.template = template
        self.show(image)

    def show(self, image: Image.Image) -> None:
        """Start a conversation about another image."""
        self.images = process_images([image], self.image_processor, self.model.config)
        self.image_size = image.size
        self.reset()

    def reset(self) -> None:
        """Start the conversation again."""
        self.conversation = self.template.copy()

    def prompt(self, message: str) -> str:
        """Return the full prompt, with the user's message and an open turn. The image is before the first message."""
        if len(self.conversation.messages) == self.conversation.offset:
            image = DEFAULT_IMAGE_TOKEN
            if getattr(self.model.config, "mm_use_im_start_end", False):
                image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
            message = f"{image}\n{message}"
        self.conversation.append_message(self.conversation.roles[0], message)
        self.conversation.append_message(self.conversation.roles[1], None)
        return self.conversation.get_prompt()

    def answer(self, prompt: str, *, temperature: float, max_new_tokens: int, streamer: Any = None) -> str:
        """Generate the answer to an open turn, and close the turn with it."""
        import torch

        from llava.stopping_criteria import KeywordsStoppingCriteria

        ids = torch.tensor([tokenizer_image_token(prompt, self.tokenizer)], device=self.model.device)  # [1, T]
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        new_ids = self.model.generate(
            ids,
            images=self.images,
            image_sizes=[self.image_size],
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=[KeywordsStoppingCriteria([self.conversation.stop_string], self.tokenizer, ids)],
            **sampling,
        )
        text = self.tokenizer.decode(new_ids[0], skip_special_tokens=True).strip()
        text = text.removesuffix(self.conversation.stop_string).strip()
        self.conversation.messages[-1][1] = text
        return text


def speaker_name(role: str) -> str:
    """Return a template's role without marks such as `<|im_start|>`."""
    return re.sub(r"<\|.*?\|>", "", role).strip() or "-"


def chat(session: ImageChat, args: argparse.Namespace) -> None:
    """Reads messages and streams answers until an empty line or the end of input."""
    from transformers import TextStreamer

    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - lets `input` edit lines and recall earlier ones
    asker, assistant = (speaker_name(role) for role in session.conversation.roles)
    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(COMMANDS)
    while message := _read_message(f"{asker}: "):
        if message.startswith("/"):
            print(_obey(message, session))
            continue
        if DEFAULT_IMAGE_TOKEN in message:
            print(f"The image is shown to the model already: ask again without {DEFAULT_IMAGE_TOKEN}.")
            continue
        print(f"{assistant}: ", end="", flush=True)
        prompt = session.prompt(message)
        session.answer(prompt, temperature=args.temperature, max_new_tokens=args.max_new_tokens, streamer=streamer)
        if args.debug:
            print(f"\n{prompt!r}\n")
    print("exit...")


def _read_message(shown: str) -> str:
    try:
        return input(shown).strip()
    except EOFError:
        return ""


def _obey(message: str, session: ImageChat) -> str:
    """Run a command of the chat and return the reply. An image that cannot be read changes nothing."""
    command, _, file = message.partition(" ")
    if command == "/reset":
        session.reset()
        return "The conversation starts again."
    if command != "/image" or not file.strip():
        return f"{message}: no such command. {COMMANDS}"
    try:
        session.show(load_image(file.strip().strip("'\"")))
    except (OSError, ValueError) as error:
        return f"{error}. The image is still the one before."
    return f"The conversation starts again, about {file.strip()}."


def main(args: argparse.Namespace) -> None:
    """Loads what `args` name and chats.

    Raises:
        OSError, ValueError: the first thing that is wrong, before the model is loaded where that can be seen.
    """
    GenerationSettings(temperature=args.temperature, max_new_tokens=args.max_new_tokens)  # refuses what has no meaning
    image = load_image(args.image_file)
    tokenizer, model, image_processor, _ = load_model(args, load_8bit=args.load_8bit, load_4bit=args.load_4bit)
    if image_processor is None:
        raise ValueError(f"{args.model_path} has no vision tower; pass a LLaVA checkpoint.")
    mode = args.conv_mode or conversation_mode(get_model_name_from_path(args.model_path), model.config)
    chat(ImageChat(tokenizer, model, image_processor, image, conv_templates[mode]), args)


if __name__ == "__main__":
    run_command(main, argument_parser())
