"""A training run: its record, and its phases. A warm-up of the projector by the plugin's losses may come first."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from llava.command import RUN_FILE, RunRecord, changed_flags, read_record
from llava.plugin import TrainingPlugin
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.checkpointing import (
    PROJECTOR_FILE,
    check_state_files,
    checkpoint_to_resume,
    finished_step,
    load_projector_weights,
)
from llava.train.llava_trainer import LLaVATrainer
from llava.train.stopping import stop_request
from llava.utils import sha256

logger = logging.getLogger(__name__)

SAME_IN_A_RUN = ("seed", "data_seed", "global_batch_size", "group_by_modality_length", "train_sampling_strategy",
                 "lora_alpha")  # fmt: skip
"""What a resumed run must not change, beside the model's and the data's flags and the files that flags name."""
MAY_CHANGE = {"attn_implementation", "image_folder", "on_error", "lazy_preprocess", "is_multimodal"}
"""Flags of model and data that a resumed run may change."""
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir", "local_rank", "trust_checkpoint",
                "profile")  # fmt: skip
"""Flags of a run that say nothing about what it trains."""

RAMP = 0.03
"""Share of a warm-up's steps in which the learning rate rises; then it is constant."""


def describe_run(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, plugin_args: Any, resumes: bool
) -> RunRecord:
    """Return the `run.json` of a training. Only the first rank hashes the files that flags name, and writes."""
    of_plugin = {} if plugin_args is None else dataclasses.asdict(plugin_args)
    flags = {**dataclasses.asdict(model_args), **dataclasses.asdict(data_args), **args.to_dict(), **of_plugin}
    named, is_first = {}, args.process_index == 0
    if is_first:
        named = {name: flags[name] for name in ("data_path", "pretrain_mm_mlp_adapter", *of_plugin)}
        for name in ("model_name_or_path", "vision_tower"):
            with suppress(OSError, ValueError):  # loading it says what is wrong
                named[name] = flags[name] and cached_file(flags[name], "config.json", cache_dir=args.cache_dir)
    hashes = {
        name: sha256(Path(file)) for name, file in named.items() if isinstance(file, str) and Path(file).is_file()
    }
    flags["global_batch_size"] = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    flags["frozen_in_bf16"] = args.frozen_in_bf16  # what `--bf16 auto` chose
    return RunRecord(Path(args.output_dir), flags, hashes, resumes=resumes, is_writer=is_first)


def check_same_run(record: RunRecord, checkpoint: Path) -> None:
    """Compare a run with the record beside the checkpoint that it resumes from, and name what has changed."""
    before = read_record(checkpoint.parent) if record.is_writer else {}
    changed = {
        name: f"{name}: {was} before, {now} now"
        for name, (was, now) in changed_flags(before, record.run).items()
        if name not in NOT_COMPARED
    }
    of_model_and_data = {field.name for kind in (ModelArguments, DataArguments) for field in dataclasses.fields(kind)}
    fixed = {*before.get("sha256", ()), *SAME_IN_A_RUN, *of_model_and_data} - MAY_CHANGE
    refused = "; ".join(text for name, text in changed.items() if name in fixed)
    if refused and checkpoint.resolve().parent == record.folder.resolve():
        raise ValueError(
            f"{record.folder} holds another run, up to {checkpoint.name}. {refused}. Give what its run.json has, or "
            f"another --output_dir; with --resume_from_checkpoint {checkpoint} too, that run starts from this one."
        )
    if changed:
        logger.warning("Changed since %s: %s.", checkpoint.parent / RUN_FILE, "; ".join(changed.values()))


def steps_of_run(args: Any, samples: int) -> int:
    """Return the optimizer steps of a run over `samples`, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    rows = args.train_batch_size * args.world_size
    batches = samples // rows if args.dataloader_drop_last else math.ceil(samples / rows)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def run_phase(trainer: LLaVATrainer, checkpoint: Path | None, record: RunRecord) -> None:
    """Train to the last step, from a checkpoint if one is given, and save. `record` is told where a signal stops it."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.was_stopped:
        record.end()
        logger.info(
            "Stopped after step %d of %d, saved as %s. The same command continues from there: %s",
            trainer.state.global_step,
            trainer.state.max_steps,
            Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}",
            shlex.join(sys.orig_argv),
        )
        trainer.accelerator.wait_for_everyone()  # launchers end the other ranks when the first one exits
        raise SystemExit(stop_request.exit_status)
    trainer.save_result()
    trainer.save_state()  # with the figures of the whole run


def log_end(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Log what a run has written, and a command that uses it."""
    written = sorted(path.name for path in Path(args.output_dir).iterdir() if not path.name.startswith("checkpoint-"))
    logger.info("Wrote %s: %s.", args.output_dir, ", ".join(written))
    needs_base = model_args.tune_mm_mlp_adapter or args.lora_enable
    base = ["--model-base", str(model_args.model_name_or_path)] if needs_base else []
    chat = ["python", "-m", "llava.serve.cli", "--model-path", args.output_dir, *base, "--image-file", "IMAGE"]
    logger.info("Next, an answer about an image: %s", shlex.join(chat))


def begun_warm_up(output_dir: str, plugin: TrainingPlugin | None) -> Path | None:
    """Return the folder of the warm-up if the run has one and has begun it."""
    folder = Path(output_dir) / plugin.warmup_folder if plugin is not None and plugin.warmup_steps else None
    return folder if folder is not None and folder.is_dir() else None


def warm_up(
    model: Any,
    tokenizer: Any,
    training_args: TrainingArguments,
    plugin: TrainingPlugin,
    data: dict[str, Any],
    record: RunRecord,
) -> TrainingArguments:
    """Train the projector by the plugin's losses on all images that it supervises, without text and LLM.

    It is a run of its own in a folder of the run's, with its own checkpoints, so that it resumes and ends as any other.
    The run then starts from the projector in that folder. Returns its arguments, built again: accelerate has one engine
    for each set of arguments.
    """
    folder = Path(training_args.output_dir) / plugin.warmup_folder
    if finished_step(folder) < plugin.warmup_steps:
        checkpoint = checkpoint_to_resume(None, folder)
        if checkpoint is not None and not training_args.trust_checkpoint:
            check_state_files(checkpoint)
        arguments = replace(
            training_args,
            output_dir=str(folder),
            max_steps=plugin.warmup_steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=RAMP,
        )
        logger.info("Warm-up in %s, %s.", folder, f"from {checkpoint}" if checkpoint else "from the first step")
        data = data | {"train_dataset": data["train_dataset"].without_text()}
        trainer = LLaVATrainer(
            model=model, processing_class=tokenizer, args=arguments, plugin=plugin, phase="warm-up", **data
        )
        run_phase(trainer, checkpoint, record)
        model.config.use_cache = False
        trainer.release_engine()
    load_projector_weights(model, folder / PROJECTOR_FILE)
    logger.info("The projector starts from %s.", folder / PROJECTOR_FILE)
    return replace(training_args)
