"""Load any kind of checkpoint that LLaVA training writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from llava.checkpoint_files import NON_LORA_FILE, PROJECTOR_FILE, Form, checkpoint_form, find_file, whose_weights
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.conversation import conv_templates
from llava.model.checkpoint import (
    IMAGE_NEWLINE,
    PROJECTOR,
    TOWER,
    CheckpointTensors,
    apply_adapter,
    choose_config,
    context_length,
    fill_trained,
    read_config,
    read_trained_tensors,
)
from llava.model.language_model.families import llava_model_class
from llava.model.weights import fill_strictly, from_pretrained_strictly

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """Result of `load_pretrained_model`; unpacks like upstream's tuple."""

    tokenizer: Any
    model: Any
    image_processor: Any
    context_len: int


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    multimodal: bool = True,
    customized_config: Any = None,
    overwrite_config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> LoadedModel:
    """Load tokenizer, model and image processor.

    The files in `model_path` and its config determine the kind of checkpoint, not its name:

    - a full LLaVA (stage 2): `config.json` names a vision tower, and the weights are beside it. The tower's weights
      among them are used only if they were trained (`unfreeze_mm_vision_tower` in the config).
    - a projector (stage 1): `mm_projector.bin` and `config.json`. The LLM comes from `model_base`.
    - a LoRA adapter: `adapter_config.json`, the adapter's weights and `non_lora_trainables.bin`. The LLM, or the LLaVA
      that training started from, comes from `model_base`. The adapter is merged unless the weights are quantised.
    - a plain LLM: no vision tower in the config. The image processor is None.

    Args:
        model_path: folder or hub name of the checkpoint.
        model_base: folder or hub name of the base of a projector or adapter; None for a full model.
        model_name: unused; accepted for upstream's callers.
        load_8bit: quantise the LLM to 8 bits (needs bitsandbytes).
        load_4bit: quantise the LLM to 4 bits, nf4 (needs bitsandbytes).
        device_map: as in transformers; used if `device` is "cuda".
        device: "cuda", "cpu", ...; without a CUDA device, "cuda" means that `device_map` decides.
        use_flash_attn: use flash_attention_2.
        multimodal: unused; accepted for lmms-eval. The config decides.
        customized_config: replaces the checkpoint's config: a JSON file, a folder or a config object.
        overwrite_config: values to set in the config.
        **kwargs: passed to `from_pretrained`. `dtype` (or `torch_dtype`) overrides the default, float16 on CUDA and
            float32 elsewhere.

    Raises:
        FileNotFoundError: there is nothing at `model_path`, or a file is missing.
        ValueError: `model_base` is missing, weights do not match (the message names them), or the device is unknown.
    """
    require_device(device)
    form = checkpoint_form(model_path)
    kwargs = model_kwargs(load_8bit, load_4bit, device_map, device, use_flash_attn, kwargs)
    weights_path = whose_weights(form, model_path, model_base)
    config = choose_config(model_path, weights_path, customized_config, overwrite_config or {})
    has_tokenizer = find_file(model_path, "tokenizer_config.json") is not None
    tokenizer = AutoTokenizer.from_pretrained(model_path if has_tokenizer else weights_path)
    is_quantised = "quantization_config" in kwargs

    if not getattr(config, "mm_vision_tower", None):
        if form is Form.PROJECTOR:
            raise ValueError(f"{model_path} holds a projector, but its config.json names no vision tower.")
        text_model, _ = from_pretrained_strictly(AutoModelForCausalLM, weights_path, config=config, **kwargs)
        if form is Form.ADAPTER:
            text_model = apply_adapter(text_model, model_path, merge=not is_quantised)
        return LoadedModel(tokenizer, text_model.eval(), None, context_length(config))

    vocabulary = config.vocab_size
    if form is not Form.WHOLE_MODEL:
        config.vocab_size = read_config(weights_path).vocab_size  # load the base's tables in their own size
    model, to_come = from_pretrained_strictly(
        llava_model_class(config),
        weights_path,
        may_come_later if form is not Form.WHOLE_MODEL else None,
        config=config,
        **kwargs,
    )
    add_image_tokens(tokenizer, model)
    trained: dict[str, Tensor] = {}
    if form is not Form.WHOLE_MODEL:
        fit_vocabulary(model, vocabulary, len(tokenizer))
        source = find_file(model_path, PROJECTOR_FILE if form is Form.PROJECTOR else NON_LORA_FILE)
        trained = read_trained_tensors(source) if source is not None else {}
        fill_trained(model, trained, to_come, source or f"{model_path}, which has no {NON_LORA_FILE},")
    if form is Form.ADAPTER:
        model = apply_adapter(model, model_path, merge=not is_quantised)
        if (version := getattr(config, "conversation_version", None)) in conv_templates:
            stop_at_end_mark(tokenizer, model, version)  # generation's ends came with the base
    load_tower(model, trained, weights_path)
    return LoadedModel(tokenizer, model.eval(), model.get_vision_tower().image_processor, context_length(config))


def stop_at_end_mark(tokenizer: Any, model: Any, version: str) -> None:
    """Add the template's end mark to the tokens that end generation.

    A base LLM knows only its end of text, and callers of `generate` need not know the template. Marks of several tokens
    (`###`) are left to the caller's stopping criteria.
    """
    mark = tokenizer.get_added_vocab().get(conv_templates[version].stop_string)
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if mark is not None and mark not in ends:
        model.generation_config.eos_token_id = [*ends, mark]


def require_device(device: str) -> None:
    """Raise `ValueError` if torch does not know the device, or the machine has fewer CUDA devices."""
    try:
        named = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: found {device!r}, expected cuda, cuda:N, cpu or another that torch knows") from None
    count = torch.cuda.device_count()
    if named.type == "cuda" and named.index is not None and named.index >= count:
        raise ValueError(f"device: found {device!r}, but there are {count} CUDA devices here, counted from 0")


def model_kwargs(
    load_8bit: bool, load_4bit: bool, device_map: Any, device: str, use_flash_attn: bool, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Convert arguments of `load_pretrained_model` to those of `from_pretrained`."""
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if dtype is None:
        is_cuda = device.startswith("cuda") and torch.cuda.is_available() and device_map not in ("cpu", {"": "cpu"})
        dtype = torch.float16 if is_cuda else torch.float32
    resolved = {"dtype": dtype, "device_map": device_map if device == "cuda" else {"": device}, **kwargs}
    if load_8bit:
        resolved["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif load_4bit:
        resolved["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float16 if dtype == "auto" else dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        )
    if use_flash_attn and not is_flash_attn_2_available():
        logger.warning("use_flash_attn: the package flash-attn is not installed; the same attention runs without it.")
    elif use_flash_attn:
        resolved["attn_implementation"] = "flash_attention_2"
    return resolved


def may_come_later(name: str) -> bool:
    """Whether a weight may be missing from a base because the checkpoint on top of it has it."""
    return name.startswith(PROJECTOR) or name == IMAGE_NEWLINE


def add_image_tokens(tokenizer: Any, model: Any) -> None:
    """Add the image tokens that the checkpoint was trained with, according to its config."""
    added = []
    if getattr(model.config, "mm_use_im_patch_token", True):  # upstream parity: true if the key is missing
        added.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        added += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))


def fit_vocabulary(model: Any, vocabulary: int, tokens: int) -> None:
    """Resize the base's tables, of the base's or the tokenizer's size, to `vocabulary`, their rows in training."""
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = min(tokens, rows)  # some tokenizers know more tokens than their LLM
    if vocabulary < tokens:
        raise ValueError(
            f"The checkpoint was trained with {vocabulary} words (vocab_size in config.json), the base has {tokens}. "
            "Pass as --model-base the LLM it was trained on."
        )
    if vocabulary != rows:
        model.resize_token_embeddings(vocabulary)


def load_tower(model: Any, trained: dict[str, Tensor], weights_path: str) -> None:
    """Load the vision tower from its own folder.

    A trained tower is in `trained`, the weights on top of a base, or in the full model at `weights_path` if its config
    says `unfreeze_mm_vision_tower`.
    """
    tower = model.get_vision_tower()
    tower.load_model()
    tower.to(device=model.device, dtype=model.dtype)
    if any(name.startswith(TOWER) for name in trained):
        fill_tower(tower, trained, weights_path)
    elif getattr(model.config, "unfreeze_mm_vision_tower", False):
        fill_tower(tower, CheckpointTensors(weights_path), weights_path)


def fill_tower(tower: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy a trained tower's weights from a checkpoint's `tensors` into `tower`."""
    # Older versions of transformers also saved `position_ids`.
    own = {name: tensors[name] for name in tensors if name.startswith(TOWER) and not name.endswith("position_ids")}
    parameters = {tower.checkpoint_name(TOWER + name): p for name, p in tower.named_parameters()}
    hint = "Its config.json says `unfreeze_mm_vision_tower`: a tower that was trained is read from the checkpoint."
    fill_strictly(parameters, own, f"The vision tower in {source}", hint)
