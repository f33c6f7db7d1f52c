"""Save and resume training: `mm_projector.bin`, full models, and atomic checkpoints.

A `checkpoint-N` folder is written under another name and renamed when all ranks are done, so that a folder of that name
is always complete. deepspeed is imported only if it is in use.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from llava.checkpoint_files import PROJECTOR_FILE
from llava.model.checkpoint import save_config, save_tensors
from llava.model.weights import fill_strictly, maybe_zero_3, read_tensors
from llava.train.lora import RESUMING_HINT, is_adapted, load_adapter, save_adapter

logger = logging.getLogger(__name__)

STAGING_FOLDER = ".unfinished"
PROJECTOR_KEYS = ("mm_projector", "vision_resampler", "image_newline")
EMBEDDING_KEYS = ("embed_tokens", "embed_in")
STATE_FILES = (("optimizer.pt", "latest"), ("trainer_state.json",))
"""A checkpoint to resume from holds one file of each group; `latest` is DeepSpeed's."""

DEEPSPEED_OBJECTS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What DeepSpeed pickles beside tensors and plain values."""


def get_mm_adapter_state_maybe_zero_3(
    named_params: Iterable[tuple[str, Tensor]], keys_to_match: Sequence[str]
) -> dict[str, Tensor]:
    """Copy the parameters whose name contains one of `keys_to_match` to the CPU, gathered under ZeRO-3."""
    return {
        name: maybe_zero_3(param, ignore_status=True)
        for name, param in named_params
        if any(key in name for key in keys_to_match)
    }


def projector_keys(config: Any) -> tuple[str, ...]:
    """Return what names in `mm_projector.bin` contain; word embeddings are among them if stage 1 trains them."""
    return PROJECTOR_KEYS + (EMBEDDING_KEYS if getattr(config, "mm_use_im_start_end", False) else ())


def save_projector(model: nn.Module, path: Path, *, is_writer: bool) -> None:
    """Write the projector as upstream does: a pickled dict of tensors in their own dtype. All ranks must call it."""
    state = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), projector_keys(model.config))
    if is_writer:
        save_tensors(state, path)


def load_projector_weights(model: nn.Module, path: Path) -> None:
    """Load the output of `save_projector` into `model`, strictly."""
    keys = projector_keys(model.config)
    params = {name: param for name, param in model.named_parameters() if any(key in name for key in keys)}
    fill_strictly(params, read_tensors(path), path, RESUMING_HINT)


def missing_from_checkpoint(folder: Path) -> list[str]:
    """Return what a `checkpoint-N` folder lacks to be resumed from; empty for a complete one."""
    missing = [" or ".join(group) for group in STATE_FILES if not any((folder / name).exists() for name in group)]
    weights = [*folder.glob("*.safetensors"), folder / PROJECTOR_FILE, folder / "latest"]
    if not any(file.exists() for file in weights):
        missing.append("weights")
    if not missing:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except ValueError:
            missing.append("a readable trainer_state.json")
    return missing


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the last `checkpoint-N` that a run can resume from, with a warning for each later, incomplete one."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    folders = [folder for folder in Path(output_dir).glob("*") if name.fullmatch(folder.name) and folder.is_dir()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        missing = missing_from_checkpoint(folder)
        if not missing:
            return folder
        logger.warning("%s is skipped: it lacks %s, so a run cannot resume from it.", folder, ", ".join(missing))
    return None


class _StandIn:
    """Replaces DeepSpeed's own objects while its files are checked."""

    def __init__(self, *args: Any) -> None:
        pass


def _enum_member(kind: Any, name: Any) -> _StandIn:
    """Replace `getattr`, with which early releases of Python 3.11 pickle the member of an enum."""
    if kind is not _StandIn or not isinstance(name, str) or name.startswith("_"):
        raise pickle.UnpicklingError("GLOBAL getattr")
    return _StandIn()


def check_state_files(folder: Path) -> None:
    """Raise `ValueError` for a pickle that may run code: DeepSpeed reads its files without a check."""
    files = [file for pattern in ("*.pt", "*.pth") for file in folder.glob(pattern)]
    if (folder / "latest").exists():
        tag = (folder / "latest").read_text().strip()
        if Path(tag).name != tag or tag == "..":
            raise ValueError(f"{folder / 'latest'}: found {tag!r}, expected the name of a folder beside it.")
        files += [file for file in (folder / tag).rglob("*") if file.is_file()]
    stand_ins: list[Any] = [(_enum_member, "builtins.getattr"), *((_StandIn, name) for name in DEEPSPEED_OBJECTS)]
    for file in files:
        try:
            with safe_globals(), torch.serialization.safe_globals(stand_ins):  # the Trainer's are numpy's
                torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            fault = f"holds {found.group(1)}, which may run code" if found else "cannot be read"
            raise ValueError(
                f"{file} {fault}. Give another checkpoint as --resume_from_checkpoint, or --trust_checkpoint True for "
                "a file of DeepSpeed that you trust."
            ) from None


def set_aside_from(output_dir: str | Path, step: int) -> str:
    """Rename the checkpoint of a state that is not finite, so that runs resume from the one before. Returns text."""
    spoiled = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    aside, kept = spoiled.with_name(f"spoiled-{spoiled.name}"), ""
    if spoiled.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        spoiled.rename(aside)
        kept = f" {spoiled} is now {aside}; were it good, --resume_from_checkpoint would name it."
    return f"Last good checkpoint: {last_complete_checkpoint(output_dir) or 'none'}.{kept}"


def checkpoint_to_resume(named: str | None, output_dir: str | Path) -> Path | None:
    """Return the checkpoint to resume from: the one that is named, else the last complete one of the folder, if any.

    A named one must be complete: without a state the Trainer would begin at step 0, without an optimizer at moments of
    zero.
    """
    if not named:
        return last_complete_checkpoint(output_dir)
    if missing := missing_from_checkpoint(Path(named)):
        raise ValueError(
            f"--resume_from_checkpoint {named}: it lacks {', '.join(missing)}. Give a checkpoint-N folder of a run, or "
            "leave the flag out: a run resumes from the last complete checkpoint of its --output_dir."
        )
    return Path(named)


def finished_step(output_dir: str | Path) -> int:
    """Return the step at which a run saved its result in `output_dir` and ended; 0 if it has not."""
    state = Path(output_dir) / "trainer_state.json"
    saved = (PROJECTOR_FILE, "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    if not (state.is_file() and any((state.parent / name).exists() for name in saved)):
        return 0
    return json.loads(state.read_text()).get("global_step", 0)


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Rename a finished checkpoint to its final name, replacing an older one of that name."""
    if final.exists():
        final.replace(staged.with_name(f"replaced-{final.name}"))
    staged.replace(final)
    shutil.rmtree(staged.parent, ignore_errors=True)


def copy_tokenizer_model(tokenizer: Any, output_dir: Path) -> None:
    """Copy the SentencePiece file, which transformers 5 does not save and software for transformers 4 needs."""
    source = getattr(tokenizer, "vocab_file", None)
    if not (source and Path(source).is_file()):
        source = Path(getattr(tokenizer, "name_or_path", "") or "") / "tokenizer.model"
    source, target = Path(source), output_dir / "tokenizer.model"
    if source.is_file() and source.name == target.name and not target.exists():
        shutil.copyfile(source, target)


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Save at the end of a run: in stage 1 the projector and the config, otherwise the full model.

    upstream parity: with `output_dir` named `checkpoint-N`, stage 1 writes `<parent>/mm_projector/checkpoint-N.bin`.
    """
    folder = Path(output_dir)
    if trainer.saves_projector_only and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        path = folder.parent / "mm_projector" / f"{folder.name}.bin"
        save_projector(trainer.model, path, is_writer=trainer.args.should_save)
        return
    trainer.save_model(output_dir)


class CheckpointingTrainer(Trainer):
    """Trainer that writes `checkpoint-N` folders atomically, without frozen weights in stage 1 and with LoRA.

    In stage 1 (`config.tune_mm_mlp_adapter`) a checkpoint contains `mm_projector.bin` and `config.json`, like
    upstream's, and in addition the optimizer, the schedule, random states and the position in the data.
    """

    model: Any
    model_wrapped: Any
    args: Any
    lr_scheduler: Any
    optimizer: Any
    train_dataset: Any

    _run_dir: Path | None = None
    _resumed_from: Path | None = None
    result_is_saved = False

    @property
    def saves_projector_only(self) -> bool:
        """Whether this is stage 1, whose checkpoints omit the frozen weights."""
        return bool(getattr(self.model.config, "tune_mm_mlp_adapter", False))

    @property
    def rank_suffix(self) -> str:
        """Suffix of per-rank files; empty on the first rank."""
        return f"_rank{self.args.process_index}" if self.args.process_index else ""

    def log_state(self) -> dict[str, Any]:
        """Return the state of the current logging window, so that a resumed run logs the same values."""
        return {"loss_sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Restore the output of `log_state`."""
        self._tr_loss += state["loss_sum"]
        self._globalstep_last_logged = state["last_logged_step"]

    def restore_log_state(self) -> None:
        """Load the log state of the checkpoint that the run resumes from, if there is one."""
        if self._resumed_from is not None and self._log_state_file(self._resumed_from).exists():
            self.load_log_state(json.loads(self._log_state_file(self._resumed_from).read_text()))

    def _log_state_file(self, folder: Path) -> Path:
        return folder / f"log_state{self.rank_suffix}.json"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir) if self._run_dir is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a staging folder, and rename it when all ranks are done. The last one comes after the result."""
        output_dir = Path(super()._get_output_dir(trial))
        if self.state.global_step >= self.state.max_steps:
            self.save_result()
            self.model.config.use_cache = False
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._run_dir = output_dir / STAGING_FOLDER
        staged = self._run_dir / name
        try:
            with self._unwritten_named(staged, name, copies=4):  # weights, and the optimizer's in float32
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

    def save_result(self) -> None:
        """Save the result once. Its trainer state comes last, and marks the weights as those of its step.

        Call it before the last checkpoint, which takes three times the room: a full disk must not cost the result.
        """
        if not self.result_is_saved:
            self.model.config.use_cache = True
            with self._unwritten_named(Path(self.args.output_dir), "the result", copies=1):
                safe_save_model_for_hf_trainer(trainer=self, output_dir=self.args.output_dir)
                self.save_state()
            self.result_is_saved = True

    @contextmanager
    def _unwritten_named(self, folder: Path, what: str, copies: int) -> Iterator[None]:
        """Name what cannot be written; `copies` of the trained weights estimate its size."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (isinstance(error, OSError) or re.search("writ|No space|quota|I/O", str(error))):
                raise
            trained = [param for param in self.model.parameters() if param.requires_grad]
            size = sum(getattr(param, "ds_numel", param.numel()) * param.element_size() for param in trained)
            existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
            last = last_complete_checkpoint(self.args.output_dir)
            safe = (
                f"{last} is complete: free some room, and the same command continues from it."
                if last
                else "Nothing is saved yet: free some room, or give another --output_dir."
            )
            raise OSError(
                f"{folder}: {what} cannot be written ({' '.join(str(error).split())[:200]}). It takes about "
                f"{copies * size / 1e9:.1f} GB, and {shutil.disk_usage(existing).free / 1e9:.1f} GB are free. {safe}"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the projector and config (stage 1), the adapter (LoRA, see `llava.train.lora`) or the full model."""
        self.check_state_is_finite()
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

    def check_state_is_finite(self) -> None:
        """Raise `ValueError` before weights or moments that are not finite are saved or trained."""
        state = [getattr(param, "ds_tensor", param) for param in self.model.parameters() if param.requires_grad]
        for moments in (getattr(self.optimizer, "state", None) or {}).values():
            state += [value for value in moments.values() if isinstance(value, Tensor)]
        if not all(tensor.isfinite().all() for tensor in state):
            step = self.state.global_step
            raise ValueError(
                f"Step {step}: weights or the optimizer's moments are not finite, so they are not saved. Lower "
                f"--learning_rate. {set_aside_from(self.args.output_dir, step)}"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.saves_projector_only:
            load_projector_weights(self.model, Path(resume_from_checkpoint) / PROJECTOR_FILE)
        elif is_adapted(self.model):
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *others: Any) -> tuple[int, int]:
        """As the Trainer, but a finished run has no epoch left: the Trainer would train the rest of the last one."""
        reached = super()._init_training_state(max_steps, steps_per_epoch, epochs, *others)
        return (epochs, 0) if self.state.global_step >= max_steps else reached

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import DeepSpeedSchedulerWrapper  # exists only if deepspeed is installed

        # Frozen weights are in their own checkpoints. With them, each save of stage 1 would be as large as the LLM.
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer, but keep a learning rate that was changed: the Trainer would silently restore the old one."""
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        before = list(getattr(self.lr_scheduler, "base_lrs", []))
        if before == rates:
            return
        logger.warning("The learning rate is %s now, it was %s in %s.", rates, before, checkpoint)
        self.lr_scheduler.base_lrs = rates
        for group, rate, old in zip(self.optimizer.param_groups, rates, before, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * (group["lr"] / old if old else 1.0)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Not strict: the checkpoint has no frozen weights.
        deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared
