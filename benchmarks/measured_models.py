"""The models that benchmarks run: the miniature, its projector untrained, and random weights of LLaVA-1.5-7B's size."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.arguments import parse_arguments
from llava.train.assemble import add_vision, give_padding_token, load_language_model, load_tokenizer

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "playground/mini/cache/models"


class Assembled(NamedTuple):
    """Model and tokenizer as training puts them together, with the parsed flags."""

    tokenizer: Any
    model: Any
    model_args: Any
    data_args: Any
    training_args: Any


def miniature_model(flags: str, output_dir: str) -> Assembled:
    """SmolLM2 and DINOv2-small with an untrained projector, on a CPU.

    Args:
        flags: of the trainer, beside those of the models.
        output_dir: the trainer's; nothing is written there.
    """
    model_args, data_args, training_args, _ = parse_arguments(
        f"--model_name_or_path {MODELS}/smollm2-135m-instruct --vision_tower {MODELS}/dinov2-small "
        f"--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False "
        f"--use_cpu True --bf16 False --output_dir {output_dir} {flags}".split()
    )
    tokenizer = load_tokenizer(model_args, training_args)
    model = load_language_model(model_args, training_args, "sdpa")
    give_padding_token(tokenizer, model, model_args.version)
    add_vision(model, tokenizer, model_args, data_args, training_args)
    return Assembled(tokenizer, model, model_args, data_args, training_args)


def seven_billion_model(device: str, **settings: Any) -> Any:
    """LLaVA-1.5-7B's shape with random weights in bfloat16.

    Args:
        device: where it is made.
        settings: of its config.
    """
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        CLIPVisionModel(tower).bfloat16().save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(folder)
        vision = {"mm_vision_tower": folder, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu"}
        config = LlavaConfig(**vision, mm_vision_select_layer=-2, **settings)  # type: ignore[arg-type, call-arg]
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlavaLlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.get_vision_tower().load_model(device_map=device)
    return model
