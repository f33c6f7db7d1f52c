"""LLaVA's flags of training, with LLaVA's names and defaults, and what can be checked of a command line before torch is
imported: importing the Trainer's arguments takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llava.checkpoint_files import require_place, require_whole_model
from llava.command import errors_as_sentences, names_config, parse_known_flags, require_files
from llava.conversation import conv_templates

_OF_TRANSFORMERS_4 = "Flag of transformers 4; see llava/train/arguments.py."


def _flag(default: Any = None, help_text: str = _OF_TRANSFORMERS_4, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


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


ASPECT_RATIOS = ("square", "pad", "anyres")


@dataclass
class ModelArguments:
    """Parts of the model, and which of them are trained."""

    model_name_or_path: str | None = _flag("facebook/opt-125m", "Folder or hub name of the language model.")
    version: str | None = _flag(
        None,
        "Conversation template: `plain` in stage 1. In stage 2 `v1` for Vicuna, `llava_llama_3` for Llama "
        "3, `mistral_instruct` for Mistral, `qwen_2` for Qwen2 and Qwen2.5, `qwen_3` for Qwen3.",
    )
    freeze_backbone: bool = _flag(False, "Stage 2: keep the LLM frozen.")
    tune_mm_mlp_adapter: bool = _flag(False, "Stage 1: train only the projector.")
    vision_tower: str | None = _flag(None, "Folder or hub name of the vision tower.")
    mm_vision_select_layer: int = _flag(-1, "Hidden layer of the tower; LLaVA-1.5 uses -2.")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "mm_projector.bin to initialise the projector from.")
    mm_projector_type: str | None = _flag("linear", "`linear`, `mlpNx_gelu`, `cabstractor` or `identity`.")
    mm_projector_num_queries: int = _flag(256, "Number of visual tokens per image of a C-Abstractor; a square number.")
    mm_projector_depth: int = _flag(3, "Number of blocks of a C-Abstractor before its pooling, and again after it.")
    mm_projector_hidden_size: int = _flag(1024, "Width of a C-Abstractor's convolutions.")
    mm_use_im_start_end: bool = _flag(False, "Put marks around images.")
    mm_use_im_patch_token: bool = _flag(True, "Add a token that marks patches.")
    mm_patch_merge_type: str | None = _flag("flat", "`flat`, or `spatial_unpad`.")
    mm_vision_select_feature: str | None = _flag("patch", "`cls_patch` keeps CLS in front.")
    unfreeze_mm_vision_tower: bool = _flag(False, "Stage 2: also train the vision tower.")
    attn_implementation: str = _flag(
        "auto",
        "Attention implementation of the language model.",
        choices=["auto", "flash_attention_2", "sdpa", "eager"],
    )


@dataclass
class DataArguments:
    """Training data."""

    data_path: str | None = _flag(None, "Training JSON.")
    lazy_preprocess: bool = _flag(False, "No effect: samples are always prepared lazily.")
    is_multimodal: bool = _flag(False, "No effect: a vision tower says so.")
    image_folder: str | None = _flag(None, "Folder that image paths are relative to.")
    image_aspect_ratio: str = _flag(
        "square", "`square` crops the centre, `pad` pads the image to a square, `anyres` adds tiles."
    )
    image_grid_pinpoints: str | None = _flag(
        None, "With anyres: possible sizes, such as '[[336, 672], [672, 336], [672, 672]]'."
    )
    on_error: str = _flag(
        "fail", "What to do with a sample that cannot be read: `fail` stops, `skip` lists it.", choices=["fail", "skip"]
    )
    independent_turns: bool = _flag(
        False,
        "Train each question of a dialogue about an image as if it was the only one: it sees the image and "
        "no other question. Same gradients as one sample a question; the image is read once.",
    )
    pack_samples: bool = _flag(
        False,
        "Stage 2: put the samples of a batch one after another into rows as long as the longest, in place "
        "of padding. Each sees itself alone, so losses and gradients stay the same.",
    )
    cache_features: str | None = _flag(
        None, "Folder for the outputs of the frozen vision tower: computed once, then read in place of images."
    )
    mm_use_im_start_end: bool = field(default=False, init=False)
    """Copy of the model's flag of that name, used when `<image>` is inserted into the text."""


@dataclass
class TrainingFlags(RetiredFlags):
    """What LLaVA adds to the Trainer's arguments, and where its defaults differ."""

    output_dir: str = _flag("", "Output folder of checkpoints and trained weights.")
    cache_dir: str | None = _flag(None, "Folder for weights from the hub.")
    optim: str = _flag("adamw_torch", "The optimizer.")
    remove_unused_columns: bool = _flag(False, "Refused: it drops images.")
    bf16: str = _flag(
        "False",
        "Mixed precision in bfloat16. `auto`: True on a GPU that has it, False on a CPU, where what is "
        "frozen is in bfloat16 if the CPU multiplies it (AVX512-BF16, AMX).",
        choices=["auto", "True", "False", "true", "false"],
        nargs="?",
        const="True",
    )
    freeze_mm_mlp_adapter: bool = _flag(False, "Stage 2: keep the projector frozen.")
    mpt_attn_impl: str | None = _flag("triton", "No effect.")
    model_max_length: int = _flag(512, "Maximum sequence length, including visual tokens. Longer ones are truncated.")
    double_quant: bool = _flag(True, "With --bits 4: also quantise the scales.")
    quant_type: str = _flag("nf4", "With --bits 4: the number format.", choices=["fp4", "nf4"])
    bits: int = _flag(16, "4 or 8: quantise and freeze the LLM, as in QLoRA.", choices=[4, 8, 16])
    lora_enable: bool = _flag(False, "Train LoRA adapters on the LLM's linear layers instead of the LLM.")
    lora_r: int = _flag(64, "Rank of the adapters.")
    lora_alpha: int = _flag(16, "Their scale is this number over the rank.")
    lora_dropout: float = _flag(0.05, "Dropout before the adapters.")
    lora_weight_path: str = _flag("", "Output folder of a LoRA run to start from.")
    lora_bias: Literal["none", "all", "lora_only"] = _flag("none", "Biases of the LLM to train in addition.")
    mm_projector_lr: float | None = _flag(None, "Learning rate of the projector alone.")
    group_by_modality_length: bool = _flag(False, "Batches of like length and kind.")
    dataloader_timeout: int = _flag(1800, "Seconds to wait for a batch of a worker.")
    profile: int = _flag(0, "Steps to profile: OUTPUT_DIR/profile gets a table and a trace.")
    trust_checkpoint: bool = _flag(False, "Resume from DeepSpeed's files without looking for code in them.")


def check_model_and_data(model_args: Any, data_args: Any) -> None:
    """Reject combinations of both that would fail, or silently go wrong, after loading."""
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


def check_command_line(*plugin_classes: type, argv: Sequence[str] | None = None) -> None:
    """End a training whose command line is wrong, before torch is imported. `--help` ends here too.

    `plugin_classes` are dataclasses of a plugin's flags; `argv` is the command line, by default that of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    # The first process of a machine says it once. The keys of a file of flags are read with all flags.
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 or names_config(argv):
        return
    with errors_as_sentences():
        classes = (ModelArguments, DataArguments, TrainingFlags, *plugin_classes)
        flags = parse_known_flags(classes, argv, transformers=["training_args.py"])
        check_model_and_data(flags, flags)
        hint = ". What data is missing, and where it comes from: bash scripts/prepare_data.sh --check"
        require_files(flags, ("data_path", "image_folder", "pretrain_mm_mlp_adapter", "patch_data_path"), hint)
        require_whole_model(str(flags.model_name_or_path))
        if flags.vision_tower is not None:
            require_place(flags.vision_tower)
