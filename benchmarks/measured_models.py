"""What benchmarks run and how it is timed: the miniature, its projector untrained, and random weights of a named size.

What needs other packages than `llava` does is elsewhere.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import ROOT, times_of
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers import LlavaConfig as LlavaConfigOfTransformers

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.causal_lm import token_loss
from llava.train.arguments import parse_arguments
from llava.train.assemble import add_vision, give_padding_token, load_language_model, load_tokenizer

MODELS = ROOT / "playground/mini/cache/models"


def _tower(width: int, mlp: int, layers: int, heads: int, side: int = 336) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "image_size": side, "patch_size": 14}


SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
TINY_LLM = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "7b": (_tower(1024, 4096, layers=24, heads=16), {}),
    "7b_two_layers": (_tower(1024, 4096, layers=2, heads=16), {"num_hidden_layers": 2}),
    "smollm2_six_layers": (_tower(192, 768, layers=6, heads=3), SMOLLM2 | {"num_hidden_layers": 6}),
    "tiny": (_tower(32, 64, layers=2, heads=2, side=56), TINY_LLM),
}
"""Sizes of tower and LLM; what is not said is CLIP ViT-L's and Llama-7B's. `tiny` has all parts and takes no time."""


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
    return assembled_model(
        f"--model_name_or_path {MODELS}/smollm2-135m-instruct --vision_tower {MODELS}/dinov2-small "
        f"--output_dir {output_dir} {flags}"
    )


def assembled_model(flags: str) -> Assembled:
    """What the trainer's flags describe, on a CPU, with a projector of two layers."""
    model_args, data_args, training_args, _ = parse_arguments(
        "--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False --use_cpu True "
        f"{flags}".split()
    )
    tokenizer = load_tokenizer(model_args, training_args)
    model = load_language_model(model_args, training_args, "sdpa")
    give_padding_token(tokenizer, model, model_args.version)
    add_vision(model, tokenizer, model_args, data_args, training_args)
    return Assembled(tokenizer, model, model_args, data_args, training_args)


def random_model(
    shape: str,
    device: str,
    tower_side_px: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tower_folder: Path | None = None,
    **settings: Any,
) -> Any:
    """LLaVA-1.5 with random weights and these settings of its config.

    `tower_side_px` is the side of the model image, instead of the shape's; `tower_folder` keeps the tower.
    """
    tower_sizes, llm_sizes = SIZES[shape]
    tower = CLIPVisionConfig(**tower_sizes)
    side = tower.image_size = tower_side_px or tower.image_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(tower_folder or temporary)
        vision_model: Any = CLIPVisionModel(tower)
        vision_model.to(dtype).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
            folder
        )
        vision = {"mm_vision_tower": folder, "mm_hidden_size": tower.hidden_size, "mm_projector_type": "mlp2x_gelu"}
        config = LlavaConfig(**vision, mm_vision_select_layer=-2, **{**llm_sizes, **settings})  # type: ignore[arg-type, call-arg]
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model: Any = LlavaLlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.get_vision_tower().load_model(device_map=device)
    return model


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer without files: each byte of a text is a token, and further ids decode to numbers."""
    names = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    names += [f" {number}" for number in range(len(names), vocab_size)]
    tokenizer = Tokenizer(BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def random_batch(model: Any, batch_size: int, text_tokens: int, prompt_tokens: int) -> dict[str, Any]:
    """Rows of one image and random text, of which all but the first `prompt_tokens` are to be learned."""
    side = model.get_vision_tower().image_side
    ids = torch.randint(3, model.config.vocab_size - 1, (batch_size, text_tokens))  # the last is transformers' image id
    ids[:, 1] = IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, :prompt_tokens] = IGNORE_INDEX
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "images": torch.randn(batch_size, 3, side, side, dtype=torch.bfloat16),
    }


def ragged(batch: dict[str, Any], shortest: int) -> dict[str, Any]:
    """The same `random_batch`, whose rows end one after another, from `shortest` ids on to all of them."""
    size, length = batch["input_ids"].shape
    kept = torch.arange(length) < torch.linspace(shortest, length, size)[:, None].round()  # [B, T]
    kept = kept.to(batch["input_ids"].device)
    labels = batch["labels"].masked_fill(~kept, IGNORE_INDEX)
    return batch | {"input_ids": batch["input_ids"].masked_fill(~kept, 0), "labels": labels, "attention_mask": kept}


def batch_of_transformers(batch: dict[str, Any], image_id: int, visual_tokens: int) -> dict[str, Any]:
    """A `random_batch` as transformers' LLaVA takes it: an id for each visual token, `[B, T - 1 + S]`."""
    [place] = (batch["input_ids"][0] == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()

    def expanded(ids: Tensor, value: int) -> Tensor:
        return torch.cat([ids[:, :place], ids.new_full((len(ids), visual_tokens), value), ids[:, place + 1 :]], dim=1)

    ids = expanded(batch["input_ids"], image_id)
    labels = expanded(batch["labels"], IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": batch["images"]}


def random_model_of_transformers(shape: str, device: str) -> Any:
    """transformers' own LLaVA with random weights in bfloat16."""
    tower: Any = CLIPVisionConfig(**SIZES[shape][0])
    llm = LlamaConfig(**SIZES[shape][1])
    config = LlavaConfigOfTransformers(
        vision_config=tower,
        text_config=llm,
        image_token_index=llm.vocab_size - 1,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
    )
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def to_device(value: Any, device: str) -> Any:
    """`value` with its tensors on `device`."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if torch.is_tensor(value) else value


def keep_layers(model: Any, layers: int | None) -> None:
    """Keep the LLM's first layers alone, for a quick look; None keeps all."""
    model.config.num_hidden_layers = layers or model.config.num_hidden_layers
    model.model.layers = model.model.layers[: model.config.num_hidden_layers]


def seconds_in_turn(actions: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Times of actions that run in turn, so that what disturbs the machine disturbs all, after a round to warm up.

    On a CPU, where torch has one thread, CPU seconds: they leave out the time that other programs take.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            seconds[name] += times_of(action, 1, clock, device)
    return {name: spent[1:] for name, spent in seconds.items()}


def ratio_and_spread(baseline: Sequence[float], own: Sequence[float]) -> str:
    """How many times as fast: the median over rounds, and the least and the greatest."""
    ratios = sorted(before / after for before, after in zip(baseline, own, strict=True))
    return f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def loss_of_all_logits(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """The same loss as the model's own `supervised_loss`, from logits `[B, L - 1, M]` at all positions."""
    return token_loss(model.lm_head(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
