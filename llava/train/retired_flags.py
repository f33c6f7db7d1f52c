"""Flags that `transformers` 4.37 took and 5 does not, kept so that launch scripts written for LLaVA run unedited.

Each flag is mapped to its present name, or refused with the reason. A flag whose old default is given (or that never
changed what a LLaVA run computes) passes in silence.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "no_cuda": "use_cpu",
}
"""Old name -> present name, where the value means the same."""

REFUSED = {
    "use_ipex": "the Intel extension is not used any more; plain torch runs on these processors",
    "jit_mode_eval": "evaluation through torch.jit is gone; use --torch_compile",
    "tpu_num_cores": "training on TPUs is not supported",
    "tpu_metrics_debug": "training on TPUs is not supported",
    "mp_parameters": "SageMaker model parallelism is not supported; use --deepspeed scripts/zero3.json",
    "group_by_length": "batches are grouped by --group_by_modality_length True",
    "push_to_hub_organization": "give the whole name, as --hub_model_id organization/name",
    "fsdp_min_num_params": "sharding is DeepSpeed's; use --deepspeed scripts/zero3.json",
    "fsdp_transformer_layer_cls_to_wrap": "sharding is DeepSpeed's; use --deepspeed scripts/zero3.json",
    "use_legacy_prediction_loop": "the old prediction loop is gone; leave the flag out",
}
"""Old name -> why a value other than its default cannot be honoured."""


def _flag(default: Any = None) -> Any:
    return field(default=default, metadata={"help": "Flag of transformers 4; see llava/train/retired_flags.py."})


@dataclass
class RetiredFlags:
    """The retired flags as fields. `None` means "not given" where the old default would hide that."""

    evaluation_strategy: str | None = _flag()
    warmup_ratio: float | None = _flag()
    overwrite_output_dir: bool = _flag(False)
    per_gpu_train_batch_size: int | None = _flag()
    per_gpu_eval_batch_size: int | None = _flag()
    logging_dir: str | None = _flag()
    save_safetensors: bool | None = _flag(True)
    no_cuda: bool | None = _flag()
    use_mps_device: bool = _flag(False)
    jit_mode_eval: bool = _flag(False)
    use_ipex: bool = _flag(False)
    fp16_opt_level: str = _flag("O1")
    half_precision_backend: str = _flag("auto")
    fp16_backend: str = _flag("auto")
    tpu_num_cores: int | None = _flag()
    tpu_metrics_debug: bool = _flag(False)
    past_index: int = _flag(-1)
    fsdp_min_num_params: int = _flag(0)
    fsdp_transformer_layer_cls_to_wrap: str | None = _flag()
    adafactor: bool = _flag(False)
    group_by_length: bool = _flag(False)
    use_legacy_prediction_loop: bool = _flag(False)
    include_inputs_for_metrics: bool = _flag(False)
    push_to_hub_model_id: str | None = _flag()
    push_to_hub_organization: str | None = _flag()
    push_to_hub_token: str | None = _flag()
    mp_parameters: str = _flag("")
    torchdynamo: str | None = _flag()
    ray_scope: str | None = _flag("last")
    dispatch_batches: bool | None = _flag()
    split_batches: bool | None = _flag(False)
    include_tokens_per_second: bool | None = _flag(False)


def map_retired_flags(arguments: Any) -> None:
    """Carries the retired flags of `arguments` over to their present names, in place.

    To be called before `transformers.TrainingArguments.__post_init__`.

    Raises:
        ValueError: a flag asks for something that is gone; the message says what to do instead.
    """
    defaults = {name: spec.default for name, spec in RetiredFlags.__dataclass_fields__.items()}
    for name, reason in REFUSED.items():
        if getattr(arguments, name) not in (defaults[name], None):
            raise ValueError(f"--{name} {getattr(arguments, name)}: {reason}.")
    for old, new in RENAMED.items():
        value = getattr(arguments, old)
        if value is not None:
            setattr(arguments, new, value)
            setattr(arguments, old, None)
    _map_schedule_and_precision(arguments)
    _map_data_and_engine(arguments)


def _map_schedule_and_precision(arguments: Any) -> None:
    ratio = arguments.warmup_ratio
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"--warmup_ratio {ratio}: expected a share of all steps, between 0 and 1.")
        if not arguments.warmup_steps:
            # transformers 5 reads a fraction here as the share of all steps; 1.0 would be read as one step.
            arguments.warmup_steps = min(ratio, 1 - 1e-12)
        arguments.warmup_ratio = None
    if arguments.adafactor:
        arguments.optim = "adafactor"
    for name in ("half_precision_backend", "fp16_backend"):
        if getattr(arguments, name) not in ("auto", "amp", "cuda_amp", "cpu_amp"):
            raise ValueError(
                f"--{name} {getattr(arguments, name)}: only torch's own mixed precision is left; use 'auto'."
            )
    if arguments.save_safetensors is False:
        raise ValueError("--save_safetensors False: full models are written as safetensors only; leave the flag out.")
    if arguments.past_index >= 0:
        raise ValueError(f"--past_index {arguments.past_index}: no supported model returns such states; leave it out.")


def _map_data_and_engine(arguments: Any) -> None:
    if arguments.overwrite_output_dir:
        # upstream parity: the flag never emptied the folder, and a run with checkpoints in it resumed all the same.
        logger.info("--overwrite_output_dir has no effect: a run resumes if its output_dir holds checkpoint-* folders.")
    if arguments.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = arguments.logging_dir
    if arguments.include_inputs_for_metrics:
        arguments.include_for_metrics = [*(arguments.include_for_metrics or []), "inputs"]
    batching = {}
    if arguments.dispatch_batches is not None:
        batching["dispatch_batches"] = arguments.dispatch_batches
    if arguments.split_batches:
        batching["split_batches"] = True
    if batching:
        arguments.accelerator_config = {**(arguments.accelerator_config or {}), **batching}
