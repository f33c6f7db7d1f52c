"""The Trainer's side of checkpoints: written atomically, in every stage, without the weights that are not trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from llava.train.checkpointing import (
    PROJECTOR_FILE,
    STAGING_FOLDER,
    copy_tokenizer_model,
    load_projector_weights,
    publish_checkpoint,
    save_config,
    save_projector,
)
from llava.train.lora import is_adapted, load_adapter, save_adapter

logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """A Trainer whose `checkpoint-N` folders are always complete, and small in stage 1 and with LoRA.

    In stage 1 (`config.tune_mm_mlp_adapter`) a checkpoint holds `mm_projector.bin` and `config.json`, as upstream's,
    and besides them the optimizer, the schedule, random states and the position in the data.
    """

    model: Any
    model_wrapped: Any
    args: Any
    lr_scheduler: Any
    train_dataset: Any

    _run_dir: Path | None = None
    _resumed_from: Path | None = None

    @property
    def saves_projector_only(self) -> bool:
        """Whether this is stage 1, whose checkpoints hold the projector and not the frozen rest."""
        return bool(getattr(self.model.config, "tune_mm_mlp_adapter", False))

    @property
    def rank_suffix(self) -> str:
        """Tells the files of ranks apart; empty on the first."""
        return f"_rank{self.args.process_index}" if self.args.process_index else ""

    def log_state(self) -> dict[str, Any]:
        """What was logged in part only, so that a resumed run logs what an uninterrupted one does."""
        return {"loss_sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Takes over what `log_state` returned in the interrupted run."""
        self._tr_loss += state["loss_sum"]
        self._globalstep_last_logged = state["last_logged_step"]

    def restore_log_state(self) -> None:
        """Reads the log state of the checkpoint that the run resumes from, if there is one."""
        if self._resumed_from is not None and self._log_state_file(self._resumed_from).exists():
            self.load_log_state(json.loads(self._log_state_file(self._resumed_from).read_text()))

    def _log_state_file(self, folder: Path) -> Path:
        return folder / f"log_state{self.rank_suffix}.json"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir) if self._run_dir is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes beside the finished checkpoints, and renames when all ranks are done."""
        output_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._run_dir = output_dir / STAGING_FOLDER
        staged = self._run_dir / name
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        staged.mkdir(parents=True, exist_ok=True)
        self._log_state_file(staged).write_text(json.dumps(self.log_state()))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(staged, output_dir / name)
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Stage 1: `mm_projector.bin` and `config.json`. LoRA: see `llava.train.lora`. Otherwise the whole model."""
        folder = Path(output_dir or self.args.output_dir)
        if self.saves_projector_only:
            save_projector(self.model, folder / PROJECTOR_FILE, is_writer=self.args.should_save)
            if self.args.should_save:
                save_config(self.model.config, folder)
            return
        if is_adapted(self.model):
            save_adapter(self.model, folder, is_writer=self.args.should_save)
            return
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            copy_tokenizer_model(self.processing_class, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.saves_projector_only:
            load_projector_weights(self.model, Path(resume_from_checkpoint) / PROJECTOR_FILE)
        elif is_adapted(self.model):
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import DeepSpeedSchedulerWrapper  # there only where deepspeed is installed

        # Frozen weights come from their own checkpoints; they would make each save of stage 1 as large as the LLM.
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Not strict, as the frozen weights are not in it.
        deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared
