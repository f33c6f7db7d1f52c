"""Convert a folder of `LlavaForConditionalGeneration` to a LLaVA checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava.checkpoint_files import find_file, require_place
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import template_named
from llava.convert.to_hf import ADDS_BOS, HAS_CLS, ORIGINAL_CONFIG, OUR_TOWER, image_settings, name_of_module_tensor
from llava.model.checkpoint import VOCABULARY_TABLES, copy_file, require_new_folder, save_weights
from llava.model.language_model.families import FAMILIES, llava_config, llava_model_class
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.utils import follow_umask

IMAGE_PROCESSOR_OF_TOWER = {
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "dinov2": "BitImageProcessor",
}
OWN_TOWER = "vision_tower"
"""Folder of the tower inside the checkpoint, and its name there: it stays true when the checkpoint is moved."""


def from_hf(
    source: str,
    destination: str | Path,
    vision_tower: str | None = None,
    image_aspect_ratio: str | None = None,
    conv_mode: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a full checkpoint to the new folder `destination` and return its path.

    Arguments are the options of `llava-convert from-hf`. Raises `ValueError` if the source is another kind of model, or
    `vision_tower` has other weights.
    """
    destination = Path(destination)
    require_new_folder(destination)
    if conv_mode is not None:
        template_named(conv_mode)
    require_place(source)
    config: Any = AutoConfig.from_pretrained(source)
    require_llava(config)

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    model: Any = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    weights = {name_of_module_tensor(name): tensor for name, tensor in model.state_dict().items()}
    tower_weights = {name.removeprefix(OUR_TOWER): weights.pop(name) for name in list(weights) if OUR_TOWER in name}

    original = find_file(source, ORIGINAL_CONFIG)
    if original is not None:
        recorded = json.loads(Path(original).read_text(encoding="utf-8"))
        if recorded.pop(ADDS_BOS, False):
            tokenizer.add_bos_token = True
        own: Any = AutoConfig.for_model(**recorded)
    else:
        own = llava_config_of(config, tokenizer, getattr(image_processor, "do_pad", False))
        own.vocab_size = vocabulary_rows(tokenizer, config.image_token_index)
    own.dtype = model.dtype
    own.image_aspect_ratio = image_aspect_ratio or own.image_aspect_ratio
    if conv_mode:
        own.conversation_version = conv_mode
    for name in VOCABULARY_TABLES:
        weights[name] = weights[name][: own.vocab_size].clone()  # [M, D]; a view would be saved with all its rows
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]

    if vision_tower is None:
        folder = destination / OWN_TOWER
        model.model.vision_tower.save_pretrained(folder)
        follow_umask(folder)
        settings = {"image_processor_type": IMAGE_PROCESSOR_OF_TOWER[config.vision_config.model_type]}
        settings |= image_settings(image_processor)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        own.mm_vision_tower = OWN_TOWER
    else:
        own.mm_vision_tower = vision_tower
        require_same_tower(own, tower_weights)

    save_weights(weights, destination, max_shard_size)
    own.architectures = [llava_model_class(own).__name__]
    own.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    forget_image_token(destination, own.vocab_size)
    for name in ("tokenizer.model", "generation_config.json"):
        copy_file(source, destination, name)
    return destination


def require_llava(config: Any) -> None:
    """Raises `ValueError` naming what of a Hugging Face config LLaVA-1.5 has no counterpart for."""
    if config.model_type != "llava" or not hasattr(config, "text_config"):
        raise ValueError(
            f"config.json: model_type is `{config.model_type}`, expected `llava` (LlavaForConditionalGeneration). "
            "LLaVA-NeXT, OneVision and others are different models."
        )
    tower, llm = config.vision_config.model_type, config.text_config.model_type
    found: dict[str, tuple[Any, list[Any]]] = {
        "vision_config.model_type": (tower, list(HAS_CLS)),
        "text_config.model_type": (llm, list(FAMILIES)),
        "projector_hidden_act": (config.projector_hidden_act, ["gelu"]),
        "multimodal_projector_bias": (config.multimodal_projector_bias, [True]),
        "vision_feature_layer": (type(config.vision_feature_layer).__name__, ["int"]),
    }
    for key, (value, allowed) in found.items():
        if value not in allowed:
            raise ValueError(f"config.json: {key} is {value!r}, expected {' or '.join(map(repr, allowed))}.")
    if config.vision_feature_select_strategy == "default" and not HAS_CLS[tower]:
        raise ValueError(
            f"config.json: vision_feature_select_strategy `default` drops the first patch of `{tower}`, which has no "
            "CLS token; LLaVA keeps all patches. Expected `full`."
        )


def llava_config_of(config: Any, tokenizer: Any, pads: bool) -> Any:
    """LLaVA's config of a folder that was not written by `to_hf`."""
    own = llava_config(config.text_config)
    keeps_cls = config.vision_feature_select_strategy == "full" and HAS_CLS[config.vision_config.model_type]
    values = {
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if keeps_cls else "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if pads else "square",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": min(tokenizer.model_max_length, own.max_position_embeddings),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    for key, value in values.items():
        setattr(own, key, value)
    return own


def vocabulary_rows(tokenizer: Any, image_id: int) -> int:
    """Count the rows of the word embeddings without `<image>` and a `<pad>` that was added right after it."""
    added = {image_id}
    if tokenizer.convert_ids_to_tokens(image_id + 1) == "<pad>":
        added.add(image_id + 1)
    return max(set(tokenizer.get_vocab().values()) - added) + 1


def require_same_tower(config: Any, weights: dict[str, Tensor]) -> None:
    """Raises `ValueError` unless the tower that the config names has these very weights, in their dtype."""
    tower = build_vision_tower(config)
    named = tower.vision_tower.state_dict()
    for name in sorted(named.keys() | weights.keys()):
        is_same = name in named and name in weights and torch.equal(named[name].to(weights[name].dtype), weights[name])
        if not is_same:
            raise ValueError(
                f"--vision-tower {config.mm_vision_tower}: its {name} is not that of the folder, whose tower was "
                "perhaps trained. Leave --vision-tower out: the folder's own tower is written beside the checkpoint."
            )


def forget_image_token(folder: Path, rows: int) -> None:
    """Remove `<image>` and tokens without an embedding from a saved tokenizer: LLaVA splits prompts at `<image>`."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    gone = {token["content"] for token in tokenizer["added_tokens"] if token["id"] >= rows} | {DEFAULT_IMAGE_TOKEN}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in gone]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("processor_class", "image_token"):
        settings.pop(key, None)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(settings.get(key), list):
            settings[key] = [token for token in settings[key] if token not in gone]
    if settings.get("pad_token") in gone:
        settings["pad_token"] = settings.get("unk_token") or settings.get("eos_token")
    settings["padding_side"] = "right"
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
