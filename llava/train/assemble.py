"""Assemble model, tokenizer, vision modules and data for training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from llava.checkpoint_files import require_whole_model
from llava.conversation import conv_templates
from llava.data.collate import check_sequence_budget
from llava.data.dataset import auxiliary_only, held_out, make_supervised_data_module
from llava.data.records import open_records
from llava.data.sampler import micro_steps_of_kinds
from llava.mm_utils import parse_grid_pinpoints
from llava.model.builder import fill_tower, may_come_later, read_config
from llava.model.checkpoint import TOWER, CheckpointTensors, own_name, save_config
from llava.model.language_model.families import llava_config, llava_model_class
from llava.model.llava_arch import start_at_mean
from llava.model.multimodal_projector.builder import C_ABSTRACTOR_SETTINGS
from llava.model.weights import differences, from_pretrained_strictly
from llava.plugin import TrainingPlugin
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.lora import freeze_quantized, quantized_loading

logger = logging.getLogger(__name__)

FLASH = "flash_attention_2"
FALLBACK = "sdpa"
LLAMA_3_PADDING = "<|finetune_right_pad_id|>"


def show_log_of_first_rank() -> None:
    """Log to stderr: everything on the first rank, warnings from the others."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format=f"[rank {rank}] %(message)s" if rank else "%(message)s")
    for package in ("llava", "patch_aligned"):
        logging.getLogger(package).setLevel(logging.WARNING if rank else logging.INFO)


def start_engine(training_args: TrainingArguments) -> None:
    """Set up DeepSpeed's process group, which the Trainer omits on CPUs and ZeRO-3 needs to load models."""
    if training_args.deepspeed and "RANK" not in os.environ:
        raise ValueError(
            "--deepspeed needs a launcher: start the script with `deepspeed` or `torchrun --nproc_per_node 1` in place "
            "of `python`."
        )
    if training_args.deepspeed and training_args.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def flash_attention_obstacle(training_args: TrainingArguments) -> str | None:
    """Return why flash attention cannot be used here, or None."""
    if training_args.use_cpu or not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    if not (training_args.bf16 or training_args.fp16):
        return "it needs --bf16 True or --fp16 True"
    return None


def choose_attention(flag: str, asked: str | None, training_args: TrainingArguments) -> str:
    """Return the attention implementation: `flag` unless it is `auto`, else what the entry point `asked` for.

    Flash attention that is only asked for is replaced where it cannot be used; a flag that demands it raises.
    """
    wanted = flag if flag != "auto" else asked
    if wanted not in (None, FLASH):
        return str(wanted)
    obstacle = flash_attention_obstacle(training_args)
    if obstacle is None:
        return FLASH
    if flag == FLASH:
        raise ValueError(f"--attn_implementation {FLASH}: {obstacle}. Use --attn_implementation {FALLBACK}.")
    if asked == FLASH:
        logger.info("Attention: %s in place of %s, as %s.", FALLBACK, FLASH, obstacle)
    return FALLBACK


def weights_dtype(model_args: ModelArguments, training_args: TrainingArguments) -> torch.dtype:
    """Return the dtype to load the language model in: that of mixed precision, if it is frozen or under DeepSpeed.

    DeepSpeed keeps a float32 copy of what it trains. Without it, trained weights stay in float32: steps of 2e-5 are
    lost in bfloat16's eight bits, and float16 gradients cannot be unscaled.
    """
    is_frozen = model_args.tune_mm_mlp_adapter or training_args.lora_enable
    return frozen_dtype(training_args) if is_frozen or training_args.deepspeed else torch.float32


def mixed_precision_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Return the dtype of mixed precision; float32 without it."""
    if training_args.bf16:
        return torch.bfloat16
    return torch.float16 if training_args.fp16 else torch.float32


def frozen_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Return the dtype of what is frozen: that of mixed precision, unless `--bf16 auto` chose bfloat16 for it alone."""
    return torch.bfloat16 if training_args.frozen_in_bf16 else mixed_precision_dtype(training_args)


def load_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    """Load the language model's tokenizer, padding on the right. Raises `ValueError` for a projector or an adapter."""
    require_whole_model(str(model_args.model_name_or_path))
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
        use_fast=False,
    )


def give_padding_token(tokenizer: Any, model: PreTrainedModel, version: str | None) -> None:
    """Pad with `<unk>`, as upstream's checkpoints do (template `v0`: with a new `[PAD]` if there is no padding token).

    A vocabulary without `<unk>` keeps its padding token, or takes the one that Llama 3.1 has but does not name, or the
    end of text.
    """
    if version == "v0":
        if tokenizer.pad_token is None:
            smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = LLAMA_3_PADDING if LLAMA_3_PADDING in vocabulary else tokenizer.eos_token


def load_language_model(model_args: ModelArguments, training_args: TrainingArguments, attention: str) -> Any:
    """Load the language model with LLaVA's forward pass; without vision modules yet, unless it is a LLaVA already."""
    config = llava_config(read_config(str(model_args.model_name_or_path), cache_dir=training_args.cache_dir))
    if getattr(config, "mm_vision_tower", None):
        check_continued(config, model_args)
    model, _ = from_pretrained_strictly(
        llava_model_class(config),
        str(model_args.model_name_or_path),
        may_come_later if model_args.pretrain_mm_mlp_adapter else None,
        config=config,
        cache_dir=training_args.cache_dir,
        attn_implementation=attention,
        dtype=weights_dtype(model_args, training_args),
        **quantized_loading(training_args, mixed_precision_dtype(training_args)),
    )
    model.config.use_cache = False
    if training_args.bits < 16:
        freeze_quantized(model)
    if model_args.freeze_backbone:
        model.model.requires_grad_(False)  # upstream parity: the lm_head is still trained
    return model


def check_continued(config: Any, model_args: ModelArguments) -> None:
    """Raise `ValueError` for flags that contradict the LLaVA to train further: its projector was trained for these."""
    checkpoint = model_args.model_name_or_path
    if model_args.vision_tower is None:
        raise ValueError(f"{checkpoint} is a LLaVA: add --vision_tower {config.mm_vision_tower}.")
    keys = ["mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"]
    if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
        keys.append("mm_patch_merge_type")  # decides whether the `image_newline` among the weights is read
    if model_args.mm_projector_type == "cabstractor":
        keys += C_ABSTRACTOR_SETTINGS
    for key in keys:
        flag = getattr(model_args, key)
        trained = getattr(config, key, flag)
        if flag != trained:
            raise ValueError(f"--{key} {flag}: {checkpoint} was trained with {trained}. Give --{key} {trained}.")


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: dict[str, str], tokenizer: Any, model: PreTrainedModel
) -> None:
    """Add special tokens, and rows for them that start as the mean of the others."""
    added = tokenizer.add_special_tokens(special_tokens_dict)
    model.resize_token_embeddings(len(tokenizer))
    tables: list[Any] = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    start_at_mean(tables, added)


def add_vision(
    model: Any, tokenizer: Any, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> None:
    """Build tower and projector, freeze what the stage does not train, and record all of it in the config."""
    model.get_model().initialize_vision_modules(model_args=model_args)
    model.get_model().packs_samples = data_args.pack_samples
    tower, adapter = model.get_vision_tower(), adapter_weights(model.get_model())
    for weight in adapter:  # ZeRO-3 wants one dtype
        weight.data = weight.data.to(mixed_precision_dtype(training_args) if training_args.deepspeed else torch.float32)
    tower_is_trained = model_args.unfreeze_mm_vision_tower and not training_args.deepspeed
    tower.to(dtype=torch.float32 if tower_is_trained else frozen_dtype(training_args), device=training_args.device)
    if getattr(model.config, "unfreeze_mm_vision_tower", False):  # the LLM is a LLaVA that trained its tower
        checkpoint = str(model_args.model_name_or_path)
        fill_tower(tower, CheckpointTensors(checkpoint), checkpoint)

    if model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    for weight in adapter:
        weight.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    tower.requires_grad_(model_args.unfreeze_mm_vision_tower)

    config = model.config
    config.image_aspect_ratio = data_args.image_aspect_ratio
    if data_args.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = parse_grid_pinpoints(data_args.image_grid_pinpoints)
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = tokenizer.model_max_length
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.mm_projector_lr = training_args.mm_projector_lr
    config.conversation_version = model_args.version  # so that a chat uses the template of training
    if model_args.unfreeze_mm_vision_tower:
        config.unfreeze_mm_vision_tower = True  # tells readers that the checkpoint's own tower is the one to use
    model.initialize_vision_tokenizer(model_args, tokenizer=tokenizer)


def adapter_weights(decoder: Any) -> list[nn.Parameter]:
    """Return what stage 1 trains: the projector, and the vector that ends rows of tiles if there is one."""
    newline = getattr(decoder, "image_newline", None)
    return [*decoder.mm_projector.parameters(), *([] if newline is None else [newline])]


def log_trained_parts(model: Any) -> None:
    """Log for each module how many of its weights are trained."""
    decoder = model.get_model()
    parts: dict[str, Iterable[nn.Parameter]] = {
        "word embeddings": model.get_input_embeddings().parameters(),
        "decoder layers": [*decoder.layers.parameters(), *decoder.norm.parameters()],
        "lm_head": model.get_output_embeddings().parameters(),
    }
    if model.get_vision_tower() is not None:
        parts["mm_projector"] = decoder.mm_projector.parameters()
        parts["vision tower"] = model.get_vision_tower().parameters()
    for name, parameters in parts.items():
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters]
        total, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
        state = "trained" if trained and trained == total else "frozen" if not trained else f"{trained:,} trained"
        logger.info("%-16s %s, %s weights", name, state, f"{total:,}")


def check_reads_back(model: Any) -> None:
    """Raise `ValueError` before the first step if the config to be saved does not describe the weights to be saved."""
    with TemporaryDirectory() as folder:
        save_config(model.config, Path(folder))
        config = read_config(folder)
    with torch.device("meta"):
        reader = llava_model_class(config)(config)
    expected, found = _shapes_beside_layers(reader), _shapes_beside_layers(model)
    if expected != found:
        raise ValueError(
            "What this run saves could not be loaded: its config.json describes another model than its weights. "
            f"{differences(expected, found)}. Give the flags that --model_name_or_path was trained with."
        )


def _shapes_beside_layers(model: Any) -> dict[str, tuple[int, ...]]:
    """Return shapes by name, without adapters, the tower, and the LLM's layers, which were read with this config."""
    named = {own_name(name): weight for name, weight in model.named_parameters(remove_duplicate=False)}
    shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in named.items()}
    return {name: shape for name, shape in shapes.items() if not name.startswith(("model.layers.", TOWER))}


def count_samples(data_args: DataArguments, training_args: TrainingArguments, plugin: TrainingPlugin | None) -> int:
    """Count the samples of an epoch, before the model is loaded."""
    records = open_records(str(data_args.data_path))
    is_auxiliary, is_kept = auxiliary_only(records, plugin), ~held_out(records, plugin)  # [rows]
    is_text = ~is_auxiliary & is_kept
    broken = sum(is_text[row] for row in records.problems()) if data_args.on_error == "skip" else 0
    auxiliary, text = int((is_auxiliary & is_kept).sum()), int(is_text.sum()) - broken
    if plugin is None or not auxiliary:
        return text
    size = training_args.train_batch_size * training_args.world_size
    return size * sum(micro_steps_of_kinds(text, auxiliary, size, plugin.auxiliary_only_ratio))


def make_data(
    tokenizer: Any,
    model: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    plugin: TrainingPlugin | None,
) -> dict[str, Any]:
    """Return training set and collator, as keyword arguments of the trainer."""
    tower, of_tower = model.get_vision_tower(), {}
    if tower is not None:
        of_tower = {
            "grid": model.visual_grid,
            "seen_side": tower.seen_side,
            "image_processor": tower.image_processor,
            "visual_tokens_of": model.visual_tokens_of,
        }
        sizes = getattr(model.config, "image_grid_pinpoints", None) or [(1, 1)]
        most_visual_tokens = max(model.visual_tokens_of(tuple(size)) for size in sizes)
        check_sequence_budget(training_args.model_max_length, most_visual_tokens)
    data_args.is_multimodal = data_args.is_multimodal or tower is not None
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end
    data = make_supervised_data_module(
        tokenizer,
        data_args,
        plugin=plugin,
        conversation=conv_templates[str(model_args.version)],
        output_dir=training_args.output_dir,
        **of_tower,
    )
    auxiliary = np.flatnonzero(data["train_dataset"].is_auxiliary)
    found = f"{len(auxiliary)} records without text" if len(auxiliary) else "a warm-up"
    is_used = len(auxiliary) or (plugin is not None and plugin.warmup_steps)
    if is_used and not (model_args.tune_mm_mlp_adapter and not model_args.mm_use_im_start_end):
        raise ValueError(
            f"{data_args.data_path}: found {found}, which trains the projector alone; expected --tune_mm_mlp_adapter "
            "True and --mm_use_im_start_end False. Pass both, or train with text alone."
        )
    return data
