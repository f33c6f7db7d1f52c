"""Convert a LLaVA checkpoint to a folder of `LlavaForConditionalGeneration`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AddedToken, GenerationConfig, LlavaProcessor
from transformers import LlavaConfig as HfLlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conversation_mode, template_named
from llava.convert.chat_template import chat_template
from llava.convert.model_card import write_model_card
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model, read_config
from llava.model.checkpoint import copy_file, require_new_folder, save_weights
from llava.model.multimodal_encoder.builder import build_vision_tower

# The names of a tensor in LLaVA's checkpoints, in transformers' modules, and in the files that engines read.

OUR_TOWER = "model.vision_tower.vision_tower."
NESTED = "vision_model."

# LLaVA's name, the name in a published folder. The first match decides; each list is read both ways.
_PARTS_TO_FILE = (
    (OUR_TOWER, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_PARTS_FROM_MODULE = (
    ("model.vision_tower.", OUR_TOWER),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)


def file_name_of(name: str, tower_type: str) -> str:
    """Name in a folder for Hugging Face of the tensor that LLaVA's model calls `name`.

    These are the names of the published `llava-hf` folders: transformers reads them whatever its version, and vLLM
    looks for the encoder of CLIP and SigLIP in a `vision_model` that transformers' own modules no longer have.
    """
    renamed = _renamed(name, _PARTS_TO_FILE)
    if not renamed.startswith("vision_tower."):
        return renamed
    inner = renamed.removeprefix("vision_tower.").removeprefix(NESTED)
    return f"vision_tower.{NESTED if tower_type in ('clip_vision_model', 'siglip_vision_model') else ''}{inner}"


def name_of_module_tensor(name: str) -> str:
    """LLaVA's name of the tensor that `LlavaForConditionalGeneration` calls `name`."""
    return _renamed(name, _PARTS_FROM_MODULE)


def _renamed(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for old, new in parts:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"{name}: no such tensor in a LLaVA-1.5 model; expected a name that starts with {parts[0][0]} ...")


# Hugging Face's processor of a checkpoint: its tokenizer with `<image>`, its image processor, its chat template.

IMAGE_SETTINGS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def image_settings(image_processor: Any) -> dict[str, Any]:
    """Return an image processor's settings that LLaVA's towers use, as JSON values."""
    values = image_processor.to_dict()
    return {name: values[name] for name in IMAGE_SETTINGS if values.get(name) is not None}


def llava_image_processor(image_processor: Any, pads: bool) -> LlavaImageProcessorPil:
    """Hugging Face's image processor with the pixels of `process_images`; `pads` is `image_aspect_ratio: pad`."""
    settings = image_settings(image_processor)
    if not settings.get("do_center_crop", False):  # SigLIP squeezes. Engines still ask for the crop's size.
        settings |= {"do_center_crop": False, "crop_size": settings["size"]}
    return LlavaImageProcessorPil(**settings, do_pad=pads)


def add_image_token(tokenizer: Any) -> int:
    """Add `<image>` to the tokenizer, set it up for generation in batches, and return the id of `<image>`."""
    tokenizer.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.padding_side = "left"  # new tokens follow the prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


logger = logging.getLogger(__name__)

ORIGINAL_CONFIG = "llava_config.json"
"""The checkpoint's own config, kept beside Hugging Face's for the way back."""

ADDS_BOS = "tokenizer_adds_bos"
"""Key in it: whether the checkpoint's tokenizer adds the BOS token, which here the chat template does."""

ROWS_MULTIPLE_OF = 64
"""New rows of the word embeddings are rounded up to this, as in the published `llava-hf` folders."""

HAS_CLS = {"clip_vision_model": True, "dinov2": True, "siglip_vision_model": False}
"""Towers whose features Hugging Face's Llava selects as LLaVA does: whether a CLS token comes before the patches."""

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def to_hf(
    source: str,
    destination: str | Path,
    base: str | None = None,
    dtype: Dtype = "auto",
    conv_mode: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the new folder `destination` and return its path; arguments are the options of `llava-convert to-hf`.

    Raises `ValueError` naming the part of the checkpoint that Hugging Face's Llava has no counterpart for.
    """
    destination = Path(destination)
    require_new_folder(destination)
    config = read_config(source)
    require_counterpart(config)
    name = get_model_name_from_path(source)
    mode = conv_mode or conversation_mode(name, config)
    conversation = template_named(mode)
    if conv_mode is None and getattr(config, "conversation_version", None) is None:
        logger.warning("%s records no template: `%s`, by its name or kind. If wrong, pass --conv-mode.", source, mode)

    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    kept = stored if dtype == "auto" else getattr(torch, dtype)
    tokenizer, model, _, _ = load_pretrained_model(source, base, name, device="cpu", dtype=kept)
    tower = model.get_vision_tower()
    tower_type = tower.config.model_type
    image_id = add_image_token(tokenizer)
    template = chat_template(conversation, tokenizer, getattr(model.config, "mm_use_im_start_end", False))
    drops_cls = HAS_CLS[tower_type] and tower.select_feature == "patch"
    strategy: Literal["default", "full"] = "default" if drops_cls else "full"
    weights = {file_name_of(name, tower_type): tensor for name, tensor in model.state_dict().items()}
    rows = add_vocabulary_rows(weights, image_id + 1)
    if model.config.tie_word_embeddings:
        del weights["language_model.lm_head.weight"]

    destination.mkdir(parents=True, exist_ok=True)
    save_weights(weights, destination, max_shard_size)
    vision = {key: value for key, value in tower.config.to_dict().items() if key not in ("_name_or_path", "model_type")}
    hf_config = HfLlavaConfig(
        vision_config=type(tower.config)(**vision),  # without a local path
        text_config=text_config(model, rows, kept),
        image_token_index=image_id,
        image_seq_length=tower.num_patches + int(HAS_CLS[tower_type] and not drops_cls),
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=tower.select_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=model.config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=kept,
    )
    hf_config.save_pretrained(destination)
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    if adds_bos:
        tokenizer.add_bos_token = False  # the chat template writes it, and prompts must not have two
    own = {**model.config.to_dict(), "conversation_version": mode, ADDS_BOS: adds_bos}
    own.pop("_name_or_path", None)
    (destination / ORIGINAL_CONFIG).write_text(json.dumps(own, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    images = llava_image_processor(tower.image_processor, getattr(model.config, "image_aspect_ratio", None) == "pad")
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(HAS_CLS[tower_type]),
        chat_template=template,
    )
    processor.save_pretrained(destination)
    images.save_pretrained(destination)  # transformers 4 reads preprocessor_config.json
    copy_file(base or source, destination, "tokenizer.model")
    generation_config(tokenizer, conversation).save_pretrained(destination)
    write_model_card(destination, source, base, model.config, mode, tower_type)
    return destination


def require_counterpart(config: Any) -> None:
    """Raises `ValueError` naming the first key of a checkpoint's config that Hugging Face's Llava has no match for."""
    if not getattr(config, "mm_vision_tower", None):
        raise ValueError(f"The checkpoint is not a LLaVA: config.json has no `mm_vision_tower` ({config.model_type}).")
    expected = {
        "mm_projector_type": (getattr(config, "mm_projector_type", "linear"), ("mlp2x_gelu",)),
        "mm_patch_merge_type": (getattr(config, "mm_patch_merge_type", "flat"), ("flat",)),
        "image_aspect_ratio": (getattr(config, "image_aspect_ratio", None), (None, "square", "pad")),
    }
    for key, (found, allowed) in expected.items():
        if found not in allowed:
            raise ValueError(
                f"config.json: {key} is `{found}`, and LlavaForConditionalGeneration can carry only "
                f"{', '.join(f'`{value}`' for value in allowed if value)}. The checkpoint runs with `llava` alone."
            )
    tower_type = build_vision_tower(config, delay_load=True).config.model_type
    if tower_type not in HAS_CLS:
        raise ValueError(
            f"config.json: mm_vision_tower is `{config.mm_vision_tower}`, of model type `{tower_type}`, and "
            f"LlavaForConditionalGeneration selects features as LLaVA does only for {', '.join(sorted(HAS_CLS))}. "
            "The checkpoint runs with `llava` alone."
        )


def add_vocabulary_rows(weights: dict[str, Tensor], needed: int) -> int:
    """Pad both tables `[M, D]` of `weights` to at least `needed` rows. Returns the number of rows.

    New rows are the mean of the others, so that a new token's logit is the mean of all logits and never the greatest.
    """
    tables = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    rows = len(weights[tables[0]])
    if rows >= needed:
        return rows
    padded = -(-needed // ROWS_MULTIPLE_OF) * ROWS_MULTIPLE_OF
    for name in tables:
        mean = weights[name].float().mean(dim=0, keepdim=True).to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], mean.expand(padded - rows, -1)])  # [padded, D]
    return padded


def text_config(model: Any, rows: int, dtype: torch.dtype) -> Any:
    """The config of the LLM alone, of its own class, without LLaVA's keys."""
    config_class = next(c for c in type(model.config).__mro__ if c.__module__.startswith("transformers."))
    model_class = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))
    known = config_class().to_dict().keys() - {"model_type", "_name_or_path"}
    values = {key: value for key, value in model.config.to_dict().items() if key in known}
    return config_class(**{**values, "vocab_size": rows, "architectures": [model_class.__name__], "dtype": dtype})


def generation_config(tokenizer: Any, conversation: Conversation) -> GenerationConfig:
    """End an answer at EOS and at the template's end mark, if that is one token."""
    ends = [tokenizer.eos_token_id]
    mark = tokenizer(conversation.stop_string, add_special_tokens=False).input_ids
    if len(mark) == 1 and mark[0] not in ends and tokenizer.convert_ids_to_tokens(mark[0]) == conversation.stop_string:
        ends.append(mark[0])
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
