"""`--bits 4|8`: the LLM's linear layers are kept in few bits and frozen; what is trained stands beside them (QLoRA)."""

from __future__ import annotations

from typing import Any

import torch

from llava.model.builder import NOT_QUANTISED
from llava.train.arguments import TrainingArguments
from llava.train.extras import require


def quantized_loading(training_args: TrainingArguments, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the LLM's linear layers; none with `--bits 16`.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if training_args.bits == 16:
        return {}
    require("bitsandbytes", f"--bits {training_args.bits}")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=training_args.bits == 4,
        load_in_8bit=training_args.bits == 8,
        llm_int8_skip_modules=NOT_QUANTISED,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=training_args.double_quant,
        bnb_4bit_quant_type=training_args.quant_type,
    )
    return {"quantization_config": quantization, "device_map": {"": training_args.device}}


def freeze_quantized(model: Any) -> None:
    """Freezes a model whose layers were quantised, with its norms in float32."""
    require("peft", "--bits 4|8")
    from peft import prepare_model_for_kbit_training

    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    dtypes = [table.weight.dtype for table in tables]
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for table, dtype in zip(tables, dtypes, strict=True):
        table.to(dtype)  # large and frozen: float32 would cost memory for nothing
    # The Trainer refuses quantised models that carry no adapter, as they could not be trained as a whole. Here the rest
    # is frozen, and the projector is trained in stage 1 just as well as an adapter.
    model.is_quantized = False
