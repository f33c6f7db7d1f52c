"""LoRA: low-rank adapters on the LLM's linear layers, and the folders that such a run saves and resumes from.

A folder holds what was trained and no more: the adapter in peft's format (`adapter_model.safetensors`,
`adapter_config.json`), all else that the base lacks in `non_lora_trainables.bin`, and the whole model's `config.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.checkpoint_files import ADAPTER_FILES, NON_LORA_FILE, find_file
from llava.model.checkpoint import save_config, save_tensors
from llava.model.weights import fill_strictly, maybe_zero_3, read_tensors
from llava.train.arguments import TrainingArguments
from llava.utils import follow_umask, require_package

RESUMING_HINT = "Give the flags that its run was started with; to start a new run, give another --output_dir."
VISION_PARTS = ("mm_projector", "vision_tower", "vision_resampler")
ADAPTER = "default"
"""peft's name of the one adapter, part of the names of parameters, but not of those in files."""


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Return the names of the LLM's linear layers, which LoRA adapts: without vision modules and the lm_head."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in VISION_PARTS)
    }
    return sorted(names - {"lm_head"})


def add_lora(model: Any, training_args: TrainingArguments) -> Any:
    """Freeze the LLM, add adapters to its linear layers, and return it in peft's wrapper. Vision modules come later.

    Adapters are float32, as trained weights are, except under DeepSpeed, which keeps its own float32 copy and wants one
    dtype.
    """
    require_package("peft", "--lora_enable True")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=find_all_linear_names(model),
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=not training_args.deepspeed)


def is_adapted(model: Any) -> bool:
    """Whether `add_lora` has wrapped the model."""
    return hasattr(model, "peft_config")


def get_peft_state_maybe_zero_3(named_params: Iterable[tuple[str, Tensor]], bias: str) -> dict[str, Tensor]:
    """Copy LoRA's parameters to the CPU, with the biases `none`, `all` or `lora_only` (of layers with LoRA weights)."""
    if bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"lora_bias {bias!r}: expected 'none', 'all' or 'lora_only'.")
    params = dict(named_params)
    adapted = {name.split("lora_")[0] for name in params if "lora_" in name}

    def is_wanted(name: str) -> bool:
        if "lora_" in name or bias == "none":
            return "lora_" in name
        layer = name.removesuffix("bias").removesuffix("base_layer.")
        return name.endswith("bias") and (bias == "all" or layer in adapted)

    return {name: maybe_zero_3(param, ignore_status=True) for name, param in params.items() if is_wanted(name)}


def get_peft_state_non_lora_maybe_zero_3(
    named_params: Iterable[tuple[str, Tensor]], require_grad_only: bool = True
) -> dict[str, Tensor]:
    """Copy the parameters that are not LoRA's to the CPU; by default only the trained ones."""
    return {
        name: maybe_zero_3(param, ignore_status=True)
        for name, param in named_params
        if "lora_" not in name and (param.requires_grad or not require_grad_only)
    }


def save_adapter(model: Any, folder: Path, *, is_writer: bool) -> None:
    """Write the adapter, other trained weights, and the config. All ranks must call it; `is_writer` writes."""
    named = list(model.named_parameters())
    of_llm = [(name, param) for name, param in named if not any(part in name for part in VISION_PARTS)]
    adapter = get_peft_state_maybe_zero_3(of_llm, model.peft_config[ADAPTER].bias)
    rest = get_peft_state_non_lora_maybe_zero_3([(name, param) for name, param in named if name not in adapter])
    for name, table in tables_of_image_marks(model).items():
        rest[name] = maybe_zero_3(table, ignore_status=True)
    if is_writer:
        model.save_pretrained(folder, state_dict=adapter, save_embedding_layers=False)
        follow_umask(folder)
        save_tensors({name_in_file(model, name): tensor for name, tensor in rest.items()}, folder / NON_LORA_FILE)
        save_config(model.config, folder)


def load_adapter(model: Any, folder: Path) -> None:
    """Load the output of `save_adapter` (or of upstream's training) into a model in training, strictly."""
    weights = next((path for name in ADAPTER_FILES if (path := find_file(str(folder), name))), None)
    rest = find_file(str(folder), NON_LORA_FILE)
    if weights is None or rest is None:
        raise FileNotFoundError(
            f"No {NON_LORA_FILE if weights else ADAPTER_FILES[0]} in {folder}: give the output folder of a run with "
            "--lora_enable True."
        )
    trained = {name_in_file(model, name): param for name, param in model.named_parameters() if param.requires_grad}
    state = read_tensors(weights) | read_tensors(rest)
    for name, table in tables_of_image_marks(model).items():
        if name_in_file(model, name) in state:  # upstream's training does not save them
            trained[name_in_file(model, name)] = table
    fill_strictly(trained, state, folder, RESUMING_HINT)


def tables_of_image_marks(model: Any) -> dict[str, nn.Parameter]:
    """Return word embeddings and lm_head, by name, if they have rows for the marks around an image.

    No base has these rows: they come from stage 1 or from the start of this run. So the tables are saved, though LoRA
    does not train them.
    """
    if not getattr(model.config, "mm_use_im_start_end", False):
        return {}
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return {name: param for name, param in model.named_parameters() if any(param is table for table in tables)}


def name_in_file(model: Any, name: str) -> str:
    """Return the name in files of the parameter that the wrapped model calls `name`."""
    tower = model.get_vision_tower()
    name = name.replace(f".{ADAPTER}.", ".") if "lora_" in name else name
    return tower.checkpoint_name(name) if tower is not None else name


# `--bits 4|8` (QLoRA): the LLM's linear layers are quantised and frozen; trained weights are beside them.


def quantized_loading(training_args: TrainingArguments, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise the LLM's linear layers; none with `--bits 16`."""
    if training_args.bits == 16:
        return {}
    require_package("bitsandbytes", f"--bits {training_args.bits}")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=training_args.bits == 4,
        load_in_8bit=training_args.bits == 8,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=training_args.double_quant,
        bnb_4bit_quant_type=training_args.quant_type,
    )
    return {"quantization_config": quantization, "device_map": {"": training_args.device}}


def freeze_quantized(model: Any) -> None:
    """Freezes a model whose layers were quantised, with its norms in float32."""
    require_package("peft", "--bits 4|8")
    from peft import prepare_model_for_kbit_training

    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    dtypes = [table.weight.dtype for table in tables]
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for table, dtype in zip(tables, dtypes, strict=True):
        table.to(dtype)  # large and frozen: float32 would cost memory for nothing
    # The Trainer refuses quantised models that carry no adapter, as they could not be trained as a whole. Here the rest
    # is frozen, and the projector is trained in stage 1 just as well as an adapter.
    model.is_quantized = False
