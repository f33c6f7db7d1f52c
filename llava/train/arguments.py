"""Command-line arguments of training: LLaVA's flags, with LLaVA's names and defaults, in addition to the Trainer's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.hf_argparser import string_to_bool
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_tf32_available

from llava.command import flags_with_config
from llava.train.flags import DataArguments, ModelArguments, TrainingFlags, check_model_and_data

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
"""Old name -> new name of flags whose value has the same meaning."""


def map_retired_flags(arguments: Any) -> None:
    """Map the retired flags of `arguments` to their new names, in place.

    Call it before `transformers.TrainingArguments.__post_init__`.
    """
    for old, new in RENAMED.items():
        value = getattr(arguments, old)
        if value is not None:
            setattr(arguments, new, value)
            setattr(arguments, old, None)
    ratio = arguments.warmup_ratio
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"--warmup_ratio {ratio}: expected a fraction of all steps, between 0 and 1.")
        if not arguments.warmup_steps:
            # transformers 5 interprets a value below 1 as a fraction of all steps, but 1.0 as one step.
            arguments.warmup_steps = min(ratio, 1 - 1e-12)
        arguments.warmup_ratio = None
    if arguments.adafactor:
        arguments.optim = "adafactor"
    if arguments.overwrite_output_dir:
        # upstream parity: the flag never emptied the folder, and a run with checkpoints in it resumed anyway.
        logger.info("--overwrite_output_dir has no effect: a run resumes if its output_dir holds checkpoint-* folders.")
    if arguments.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = arguments.logging_dir


PASSED_OVER: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "the loss is cross entropy without smoothing; drop the flag"),
    "neftune_noise_alpha": ((None,), "noise on word embeddings is not supported; drop the flag"),
    "train_sampling_strategy": (("random", "sequential"), "batches are grouped by --group_by_modality_length True"),
    "use_liger_kernel": (
        (False,),
        "Liger has no kernels for LLaVA's models. Computing logits at supervised positions only already saves most of "
        "the memory that its loss would save; drop the flag",
    ),
}
"""The Trainer's flags that would have no effect or fail in the first step: accepted values, and the reason."""


@dataclass
class TrainingArguments(TrainingFlags, transformers.TrainingArguments):  # type: ignore[misc]
    """The Trainer's arguments with LLaVA's additions and defaults, and retired flags of launch scripts.

    Raises:
        ValueError: a value is not supported; the message names the flag and says what to do.
    """

    frozen_in_bf16: bool = field(default=False, init=False)  # and all else in float32: `--bf16 auto` on some CPUs

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing: give the folder for checkpoints and trained weights.")
        map_retired_flags(self)
        self._choose_bf16()
        if self.tf32 and (self.use_cpu or not is_torch_tf32_available()):
            # The official scripts set it. It affects speed only, so a run can continue without it.
            logger.warning("--tf32 True is ignored: there is no GPU with TF32 here (Ampere or newer).")
            self.tf32 = None
        for name, (accepted, reason) in PASSED_OVER.items():
            if getattr(self, name, accepted[0]) not in accepted:
                raise ValueError(f"--{name} {getattr(self, name)}: {reason}.")
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns True would drop the images of every batch; leave it False.")
        self._choose_gradient_checkpointing()
        super().__post_init__()

    def _choose_bf16(self) -> None:
        """Resolve `--bf16`, which is a bool from here on, as transformers has it."""
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        wanted: Any = self.bf16
        if wanted == "auto":
            self.frozen_in_bf16 = not has_gpu and not self.deepspeed and cpu_multiplies_bf16()
            wanted = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = string_to_bool(wanted)

    def _choose_gradient_checkpointing(self) -> None:
        """Disable re-entrant checkpointing, which loses gradients if a layer's input needs none, as in stage 1."""
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
            # The Trainer's own choice with checkpointing ends in step 2 where a trained weight gets no gradient, as
            # those of a tower's layers behind --mm_vision_select_layer.
            if self.ddp_find_unused_parameters is None:
                self.ddp_find_unused_parameters = True
        if hasattr(self, "activation_checkpointing"):  # the new name, since about transformers 5.23
            for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
                new = old.replace("gradient", "activation")
                if getattr(self, new) is None:
                    setattr(self, new, getattr(self, old))


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, without which they take longer than float32's."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def parse_arguments(
    argv: Sequence[str] | None = None, plugin_arguments_class: type | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments, Any]:
    """Parse the command line (or `argv`), and the file of `--config FILE.yaml` before it.

    Returns:
        model, data and training arguments, and an instance of `plugin_arguments_class` (`None` without one).

    Raises:
        ValueError: an unknown flag or an invalid combination.
        OSError: the file of `--config` cannot be read.
    """
    classes: list[Any] = [ModelArguments, DataArguments, TrainingArguments]
    if plugin_arguments_class is not None:
        classes.append(plugin_arguments_class)
    parser = transformers.HfArgumentParser(classes, allow_abbrev=False)
    parsed = parser.parse_args_into_dataclasses(flags_with_config(parser, sys.argv[1:] if argv is None else argv))
    model_args, data_args, training_args = parsed[:3]
    check_arguments(model_args, data_args, training_args)
    return model_args, data_args, training_args, parsed[3] if plugin_arguments_class is not None else None


def check_arguments(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Reject combinations that would fail, or silently go wrong, after loading."""
    check_model_and_data(model_args, data_args)
    if training_args.eval_strategy != "no":
        strategy = IntervalStrategy(training_args.eval_strategy).value
        raise ValueError(
            f"--evaluation_strategy {strategy}: there is no evaluation during training. Pass --evaluation_strategy no, "
            "and score checkpoints with scripts/v1_5/eval."
        )
    if training_args.fsdp:
        raise ValueError(
            f"--fsdp {training_args.fsdp}: not supported; shard with --deepspeed scripts/zero3.json instead."
        )
    if model_args.tune_mm_mlp_adapter and model_args.vision_tower is None:
        raise ValueError("--tune_mm_mlp_adapter True trains the projector, but there is none without --vision_tower.")
    if model_args.tune_mm_mlp_adapter and training_args.freeze_mm_mlp_adapter:
        raise ValueError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter together leave nothing to train.")
    if model_args.tune_mm_mlp_adapter and model_args.unfreeze_mm_vision_tower:
        raise ValueError(
            "--tune_mm_mlp_adapter saves only the projector, so a trained tower would be lost: "
            "drop --unfreeze_mm_vision_tower, or --tune_mm_mlp_adapter."
        )
    check_projector_rate(training_args)
    check_adapter_arguments(model_args, training_args)


def check_projector_rate(training_args: TrainingArguments) -> None:
    """Reject `--mm_projector_lr` with a DeepSpeed optimizer, which has one learning rate and would ignore it."""
    engine = getattr(training_args, "hf_deepspeed_config", None)
    if training_args.mm_projector_lr is not None and engine is not None and "optimizer" in engine.config:
        raise ValueError(
            f"--mm_projector_lr {training_args.mm_projector_lr}: {training_args.deepspeed} sets an `optimizer`, which "
            "has one learning rate for all weights. Remove that section, as in scripts/zero3_offload.json."
        )


def check_adapter_arguments(model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """Reject combinations of LoRA and quantised weights that would train nothing, or the wrong weights."""
    bits = f"--bits {training_args.bits}"
    if training_args.lora_enable and model_args.tune_mm_mlp_adapter:
        raise ValueError(
            "--tune_mm_mlp_adapter trains and saves only the projector, --lora_enable adapts the LLM: drop one."
        )
    if training_args.lora_weight_path and not training_args.lora_enable:
        raise ValueError("--lora_weight_path initialises LoRA adapters: add --lora_enable True, or drop it.")
    if training_args.bits == 16:
        return
    if not (training_args.lora_enable or model_args.tune_mm_mlp_adapter):
        raise ValueError(
            f"{bits}: quantised weights cannot be trained. Add --lora_enable True (scripts/v1_5/finetune_qlora.sh), "
            "train only the projector with --tune_mm_mlp_adapter True, or drop it."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{bits}: ZeRO-3 cannot shard quantised weights. They fit on each GPU: pass --deepspeed scripts/zero2.json."
        )
