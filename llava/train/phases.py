"""Phases of a training: the run itself, and before it a warm-up of the projector by the plugin's losses alone."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.command import RunRecord
from llava.plugin import TrainingPlugin
from llava.train.arguments import TrainingArguments
from llava.train.checkpointing import (
    PROJECTOR_FILE,
    check_state_files,
    checkpoint_to_resume,
    finished_step,
    load_projector_weights,
)
from llava.train.llava_trainer import LLaVATrainer
from llava.train.stopping import stop_request

logger = logging.getLogger(__name__)

RAMP = 0.03
"""Share of a warm-up's steps in which the learning rate rises; then it is constant."""


def run_phase(trainer: LLaVATrainer, checkpoint: Path | None, record: RunRecord) -> None:
    """Train to the last step, from a checkpoint if one is given, and save. `record` is told where a signal stops it.

    Raises:
        SystemExit: a signal stopped the phase, which was saved.
    """
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
    The run then starts from the projector in that folder.

    Returns:
        The run's arguments, made again: accelerate has one engine for each set of arguments.
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
