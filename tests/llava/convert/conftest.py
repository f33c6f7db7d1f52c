"""A checkpoint and its converted folder, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava.conversation import conv_templates
from llava.convert.to_hf import to_hf
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model


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
def set_config() -> Callable[..., None]:
    """Sets keys in a checkpoint's config.json."""

    def set_config(folder: str, **values: Any) -> None:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return set_config


@pytest.fixture
def convert(golden_world: Path, set_config: Callable[..., None]) -> Callable[..., Pair]:
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


@pytest.fixture
def tower_folder(golden_world: Path) -> Callable[[str], str]:
    """Writes a tiny tower with random weights; gives its folder."""

    def write(kind: str) -> str:
        if kind == "clip":
            return "tiny-clip"
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        square = {"height": 56, "width": 56}
        processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size=square)
        encoder: Any
        if kind == "siglip":  # 3 patches of 14 pixels leave 6 unseen, as 27 do in 384
            encoder = SiglipVisionModel(SiglipVisionConfig(**size, image_size=48, patch_size=14))
            processor = SiglipImageProcessorPil(size={"height": 48, "width": 48})
        elif kind == "dinov2":
            encoder = Dinov2Model(Dinov2Config(**size, image_size=70, patch_size=14))
        else:
            encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, image_size=70, patch_size=14))
        encoder.save_pretrained(kind)
        processor.save_pretrained(kind)
        return kind

    return write
