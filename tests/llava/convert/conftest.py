"""A checkpoint and its converted folder, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.conversation import conv_templates
from llava.convert.to_hf import to_hf
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.folders import set_config


class Pair(NamedTuple):
    """A model under both of its classes, and what each reads its inputs with."""

    tokenizer: Any
    ours: Any
    image_processor: Any
    theirs: Any
    processor: Any
    mode: str

    def our_inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        dialogue = conv_templates[self.mode].copy()
        dialogue.append_message(dialogue.roles[0], f"<image>\n{question}")
        dialogue.append_message(dialogue.roles[1], None)
        ids = tokenizer_image_token(dialogue.get_prompt(), self.tokenizer, return_tensors="pt")
        return {"inputs": ids[None], "images": process_images([image], self.image_processor, self.ours.config)}

    def their_inputs(self, image: Image.Image, question: str) -> Any:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    @torch.no_grad()
    def logits(self, image: Image.Image, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both, at all positions: `[1, L, M]`."""
        inputs = self.our_inputs(image, question)
        ours = self.ours(input_ids=inputs["inputs"], images=inputs["images"]).logits
        return ours, self.theirs(**self.their_inputs(image, question)).logits


@pytest.fixture
def convert(golden_world: Path) -> Callable[..., Pair]:
    """Sets keys in a checkpoint's config, converts the checkpoint, and loads both."""

    def convert(folder: str = "tiny-llava", base: str | None = None, mode: str = "v1", **config: Any) -> Pair:
        set_config(folder, conversation_version=mode, **config)
        to_hf(folder, "hf", base=base)
        tokenizer, ours, image_processor, _ = load_pretrained_model(folder, base, folder, device="cpu")
        theirs, report = AutoModelForImageTextToText.from_pretrained("hf", output_loading_info=True)
        problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
        assert not any(report[key] for key in problems), report
        processor = AutoProcessor.from_pretrained("hf", backend="pil")
        return Pair(tokenizer, ours, image_processor, theirs.eval(), processor, mode)

    return convert
