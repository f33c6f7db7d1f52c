"""Command-line arguments of training: LLaVA's flags, with LLaVA's names and defaults, in addition to the Trainer's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_tf32_available

from llava.command import flags_with_config
from llava.conversation import conv_templates

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
"""Old name -> new name of flags whose value has the same meaning."""


def _flag(default: Any = None) -> Any:
    return field(default=default, metadata={"help": "Flag of transformers 4; see llava/train/arguments.py."})


@dataclass
class RetiredFlags:
    """Flags of transformers 4.37 that 5 has removed, kept for launch scripts of LLaVA and its forks."""

    evaluation_strategy: str | None = _flag()
    warmup_ratio: float | None = _flag()
    overwrite_output_dir: bool = _flag(False)
    per_gpu_train_batch_size: int | None = _flag()
    per_gpu_eval_batch_size: int | None = _flag()
    logging_dir: str | None = _flag()
    no_cuda: bool | None = _flag()
    adafactor: bool = _flag(False)


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


ATTENTION_CHOICES = ("auto", "flash_attention_2", "sdpa", "eager")
ASPECT_RATIOS = ("square", "pad", "anyres")

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
class ModelArguments:
    """Parts of the model, and which of them are trained."""

    model_name_or_path: str | None = field(
        default="facebook/opt-125m", metadata={"help": "Folder or hub name of the language model."}
    )
    version: str | None = field(
        default=None,
        metadata={
            "help": "Conversation template: `plain` in stage 1. In stage 2 `v1` for Vicuna, `llava_llama_3` for Llama "
            "3, `mistral_instruct` for Mistral, `qwen_2` for Qwen2 and Qwen2.5, `qwen_3` for Qwen3."
        },
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Stage 2: keep the LLM frozen."})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Stage 1: train only the projector."})
    vision_tower: str | None = field(default=None, metadata={"help": "Folder or hub name of the vision tower."})
    mm_vision_select_layer: int = field(default=-1, metadata={"help": "Hidden layer of the tower; LLaVA-1.5 uses -2."})
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "mm_projector.bin to initialise the projector from."}
    )
    mm_projector_type: str | None = field(
        default="linear", metadata={"help": "`linear`, `mlpNx_gelu`, `cabstractor` or `identity`."}
    )
    mm_projector_num_queries: int = field(
        default=256, metadata={"help": "Number of visual tokens per image of a C-Abstractor; a square number."}
    )
    mm_projector_depth: int = field(
        default=3, metadata={"help": "Number of blocks of a C-Abstractor before its pooling, and again after it."}
    )
    mm_projector_hidden_size: int = field(default=1024, metadata={"help": "Width of a C-Abstractor's convolutions."})
    mm_use_im_start_end: bool = field(default=False, metadata={"help": "Put marks around images."})
    mm_use_im_patch_token: bool = field(default=True, metadata={"help": "Add a token that marks patches."})
    mm_patch_merge_type: str | None = field(default="flat", metadata={"help": "`flat`, or `spatial_unpad`."})
    mm_vision_select_feature: str | None = field(default="patch", metadata={"help": "`cls_patch` keeps CLS in front."})
    unfreeze_mm_vision_tower: bool = field(default=False, metadata={"help": "Stage 2: also train the vision tower."})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": "Attention implementation of the language model.", "choices": list(ATTENTION_CHOICES)},
    )


@dataclass
class DataArguments:
    """Training data."""

    data_path: str | None = field(default=None, metadata={"help": "Training JSON."})
    lazy_preprocess: bool = field(default=False, metadata={"help": "No effect: samples are always prepared lazily."})
    is_multimodal: bool = field(default=False, metadata={"help": "No effect: a vision tower says so."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    image_aspect_ratio: str = field(
        default="square",
        metadata={"help": "`square` crops the centre, `pad` pads the image to a square, `anyres` adds tiles."},
    )
    image_grid_pinpoints: str | None = field(
        default=None,
        metadata={"help": "With anyres: possible sizes, such as '[[336, 672], [672, 336], [672, 672]]'."},
    )
    on_error: str = field(
        default="fail",
        metadata={
            "help": "What to do with a sample that cannot be read: `fail` stops, `skip` lists it.",
            "choices": ["fail", "skip"],
        },
    )
    independent_turns: bool = field(
        default=False,
        metadata={
            "help": "Train each question of a dialogue about an image as if it was the only one: it sees the image and "
            "no other question. Same gradients as one sample a question; the image is read once."
        },
    )
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the outputs of the frozen vision tower: computed once, then read in place of images."
        },
    )
    mm_use_im_start_end: bool = field(default=False, init=False)
    """Copy of the model's flag of that name, used when `<image>` is inserted into the text."""


@dataclass
class TrainingArguments(RetiredFlags, transformers.TrainingArguments):
    """The Trainer's arguments with LLaVA's additions and defaults, and retired flags of launch scripts.

    Raises:
        ValueError: a value is not supported; the message names the flag and says what to do.
    """

    output_dir: str = field(default="", metadata={"help": "Output folder of checkpoints and trained weights."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for weights from the hub."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Refused: it drops images."})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Stage 2: keep the projector frozen."})
    mpt_attn_impl: str | None = field(default="triton", metadata={"help": "No effect."})
    model_max_length: int = field(
        default=512, metadata={"help": "Maximum sequence length, including visual tokens. Longer ones are truncated."}
    )
    double_quant: bool = field(default=True, metadata={"help": "With --bits 4: also quantise the scales."})
    quant_type: str = field(
        default="nf4", metadata={"help": "With --bits 4: the number format.", "choices": ["fp4", "nf4"]}
    )
    bits: int = field(
        default=16, metadata={"help": "4 or 8: quantise and freeze the LLM, as in QLoRA.", "choices": [4, 8, 16]}
    )
    lora_enable: bool = field(
        default=False, metadata={"help": "Train LoRA adapters on the LLM's linear layers instead of the LLM."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale is this number over the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_weight_path: str = field(default="", metadata={"help": "Output folder of a LoRA run to start from."})
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Biases of the LLM to train in addition."}
    )
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Learning rate of the projector alone."})
    group_by_modality_length: bool = field(default=False, metadata={"help": "Batches of like length and kind."})
    dataloader_timeout: int = field(default=1800, metadata={"help": "Seconds to wait for a batch of a worker."})
    trust_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from DeepSpeed's files without looking for code in them."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing: give the folder for checkpoints and trained weights.")
        map_retired_flags(self)
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
    templates = ", ".join(sorted(conv_templates))
    if model_args.version is None:
        raise ValueError(
            "--version is missing: it names the conversation template. "
            f"Pass `--version plain` for stage 1 or `--version v1` for stage 2 of LLaVA-1.5 (known: {templates})."
        )
    if model_args.version not in conv_templates:
        raise ValueError(f"--version {model_args.version}: unknown conversation template; known are {templates}.")
    if data_args.data_path is None:
        raise ValueError("--data_path is missing: pass the training JSON.")
    if model_args.vision_tower is not None and data_args.image_folder is None:
        raise ValueError("--image_folder is missing: pass the folder that image paths in --data_path are relative to.")
    if data_args.image_aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(
            f"--image_aspect_ratio {data_args.image_aspect_ratio}: training supports {', '.join(ASPECT_RATIOS)}."
        )
    if data_args.image_aspect_ratio == "anyres" and not data_args.image_grid_pinpoints:
        raise ValueError(
            "--image_grid_pinpoints is missing: anyres needs the possible sizes of tiled images, multiples of the "
            "tower's side, such as '[[336, 672], [672, 336], [672, 672]]'."
        )
    if data_args.cache_features and (
        model_args.vision_tower is None
        or model_args.unfreeze_mm_vision_tower
        or data_args.image_aspect_ratio == "anyres"
    ):
        raise ValueError(
            f"--cache_features {data_args.cache_features}: expected a frozen --vision_tower and --image_aspect_ratio "
            "square or pad; tiles of anyres and a trained tower cannot be cached. Drop the flag."
        )
    if data_args.independent_turns and model_args.attn_implementation == "flash_attention_2":
        raise ValueError(
            "--independent_turns needs a mask that flash attention cannot take; use --attn_implementation sdpa."
        )
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
