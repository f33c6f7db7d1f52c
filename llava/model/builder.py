"""Loads a checkpoint of any of the forms that LLaVA training leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.language_model.families import llava_config, llava_model_class
from llava.model.multimodal_projector.weights import load_projector, read_projector_file

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 2048


class LoadedModel(NamedTuple):
    """What `load_pretrained_model` returns; unpacks as upstream's tuple."""

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
    **kwargs: Any,
) -> LoadedModel:
    """Loads tokenizer, model and image processor.

    What is loaded is decided by the files in `model_path`, not by its name:

    - a full LLaVA checkpoint (stage 2): `config.json` names a vision tower, weights lie beside it;
    - a projector alone (stage 1): `mm_projector.bin` and `config.json`; the LLM comes from `model_base`;
    - a plain LLM: no vision tower in the config; the image processor is then None.

    Args:
        model_path: folder or hub name of the checkpoint.
        model_base: folder or hub name of the LLM that a projector belongs to; None for a full checkpoint.
        model_name: kept for upstream's callers; not needed.
        load_8bit: quantise the LLM to 8 bits (needs bitsandbytes and CUDA).
        load_4bit: quantise the LLM to 4 bits, nf4 (needs bitsandbytes and CUDA).
        device_map: as in transformers; used where `device` is "cuda".
        device: "cuda", "cpu", ...
        use_flash_attn: ask for flash_attention_2.
        **kwargs: passed to `from_pretrained`. `dtype` (or `torch_dtype`) wins over the default, float16 on CUDA and
            float32 elsewhere.

    Raises:
        FileNotFoundError: there is nothing at `model_path`, or a projector's weights are missing.
        ValueError: a projector folder comes without `model_base`, or weights do not fit.
    """
    kwargs = model_kwargs(load_8bit, load_4bit, device_map, device, use_flash_attn, kwargs)
    config = read_config(model_path)
    is_projector_alone = find_file(model_path, "mm_projector.bin") is not None and not has_llm_weights(model_path)
    if is_projector_alone and model_base is None:
        raise ValueError(
            f"{model_path} holds a projector alone (mm_projector.bin), as stage 1 writes it. "
            "Name the LLM it was trained with: --model-base FOLDER_OR_HUB_NAME."
        )
    if find_file(model_path, "adapter_config.json") is not None:
        raise ValueError(
            f"{model_path} holds a LoRA adapter (adapter_config.json), which this version cannot load. "
            "Merge it into its base first and pass the merged folder."
        )

    weights_path = model_base if is_projector_alone and model_base is not None else model_path
    tokenizer = AutoTokenizer.from_pretrained(weights_path)
    if not getattr(config, "mm_vision_tower", None):
        text_model = AutoModelForCausalLM.from_pretrained(weights_path, **kwargs)
        return LoadedModel(tokenizer, text_model, None, context_length(config))

    model = load_strictly(weights_path, llava_config(config), "mm_projector" if is_projector_alone else None, kwargs)
    if is_projector_alone:
        source = find_file(model_path, "mm_projector.bin")
        assert source is not None
        load_projector(model.get_model().mm_projector, read_projector_file(source), source)
    add_image_tokens(tokenizer, model)
    tower = model.get_vision_tower()
    tower.load_model(device_map=None)
    tower.to(device=model.device, dtype=kwargs["dtype"])
    return LoadedModel(tokenizer, model.eval(), tower.image_processor, context_length(config))


def model_kwargs(
    load_8bit: bool, load_4bit: bool, device_map: Any, device: str, use_flash_attn: bool, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that follow from those of `load_pretrained_model`."""
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    if dtype is None:
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
    resolved = {"dtype": dtype, "device_map": device_map if device == "cuda" else {"": device}, **kwargs}
    if load_8bit:
        resolved["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["mm_projector"])
    elif load_4bit:
        resolved["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["mm_projector", "lm_head"],
        )
    if use_flash_attn:
        resolved["attn_implementation"] = "flash_attention_2"
    return resolved


def load_strictly(weights_path: str, config: Any, comes_later: str | None, kwargs: dict[str, Any]) -> Any:
    """A LLaVA model whose weights all come from `weights_path`.

    Args:
        comes_later: part of the names of weights that the caller fills in.

    Raises:
        ValueError: weights are missing, or there are some that the model has no place for.
    """
    model_class = llava_model_class(config)
    loaded: Any = model_class.from_pretrained(weights_path, config=config, output_loading_info=True, **kwargs)
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if comes_later is None or comes_later not in name)
    unexpected = sorted(report["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(
            f"The weights in {weights_path} do not fit its config. Missing: {missing[:10]} ({len(missing)}). "
            f"Unexpected: {unexpected[:10]} ({len(unexpected)}). Check that config.json belongs to these weights."
        )
    return model


def read_config(model_path: str) -> Any:
    """The config at `model_path`.

    Raises:
        FileNotFoundError: there is no folder with a config, and no such name on the hub.
    """
    try:
        return AutoConfig.from_pretrained(model_path)
    except OSError as error:
        raise FileNotFoundError(
            f"No checkpoint at {model_path}: expected a folder with config.json, or a name on the hub. "
            f"{str(error).splitlines()[0]}"
        ) from error


def find_file(model_path: str, name: str) -> str | None:
    """Path of a file of a checkpoint, in a local folder or fetched from the hub; None where there is none."""
    if Path(model_path).is_dir():
        path = Path(model_path) / name
        return str(path) if path.is_file() else None
    from transformers.utils import cached_file

    return cached_file(
        model_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def has_llm_weights(model_path: str) -> bool:
    """Whether the checkpoint holds weights of an LLM, in one file or in shards."""
    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return any(find_file(model_path, name) is not None for name in names)


def add_image_tokens(tokenizer: Any, model: Any) -> None:
    """Adds the tokens that the checkpoint's config says it was trained with."""
    added = []
    if getattr(model.config, "mm_use_im_patch_token", True):  # upstream parity: true where the key is missing
        added.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        added += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))


def context_length(config: Any) -> int:
    """`max_sequence_length` of the config, else 2048, upstream's rule."""
    return getattr(config, "max_sequence_length", None) or DEFAULT_CONTEXT_LENGTH
