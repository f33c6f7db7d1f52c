"""LLaVA's Trainer: parameter groups, data order, plugin losses, and checkpoints in every stage."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.dataset import LARGEST_SHARE, too_many_are_lost
from llava.data.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    micro_steps_of_kinds,
    mix_kinds,
    split_to_even_chunks,
)
from llava.model.weights import gathered
from llava.plugin import TrainingPlugin
from llava.train.checkpointing import (
    PROJECTOR_FILE,
    STAGING_FOLDER,
    copy_tokenizer_model,
    get_mm_adapter_state_maybe_zero_3,
    last_complete_checkpoint,
    load_projector_weights,
    publish_checkpoint,
    safe_save_model_for_hf_trainer,
    save_config,
    save_projector,
    set_aside_from,
)
from llava.train.lora import is_adapted, load_adapter, save_adapter
from llava.train.stopping import start_worker, stop_request
from llava.utils import unwritten_named

logger = logging.getLogger(__name__)


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
        """Save what the run has trained, once; its state last, to say that the weights beside it are those of its step.

        A checkpoint takes three times as much room, and is not needed any more: a full disk must not cost the result.
        """
        if not self.result_is_saved:
            self.model.config.use_cache = True
            with self._unwritten_named(Path(self.args.output_dir), "the result", copies=1):
                safe_save_model_for_hf_trainer(trainer=self, output_dir=self.args.output_dir)
                self.save_state()
            self.result_is_saved = True

    def _unwritten_named(self, folder: Path, what: str, copies: int) -> AbstractContextManager[None]:
        """Name what cannot be written; `copies` of the trained weights estimate its size."""
        trained = [param for param in self.model.parameters() if param.requires_grad]
        size = sum(getattr(param, "ds_numel", param.numel()) * param.element_size() for param in trained)
        last = last_complete_checkpoint(self.args.output_dir)
        safe = (
            f"{last} is complete: free some room, and the same command continues from it."
            if last
            else ("Nothing is saved yet: free some room, or give another --output_dir.")
        )
        return unwritten_named(folder, what, copies * size, safe)

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
        """Stops before weights or moments that are not finite are saved, or trained on.

        Raises:
            ValueError: some are not; the message names the last good checkpoint.
        """
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
        """As the Trainer does, but no epoch is left once all steps are done: it would train the last epoch's rest."""
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
        """As the Trainer does, but a rate that has changed since counts: the checkpoint's would, without a word."""
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


FIRST_BATCH = "first_batch"


def undo_normalisation(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Convert the tower's input `[N, 3, H, W]` back to 0..1."""
    shift, scale = (torch.tensor(channel, dtype=torch.float32).view(1, 3, 1, 1) for channel in (mean, std))
    return (images.detach().float().cpu() * scale + shift).clamp(0, 1)


def save_first_batch(trainer: LLaVATrainer, inputs: dict[str, Any]) -> None:
    """Pass the first micro-batch of the first rank to the plugin's `describe_first_batch`.

    The picture reveals a wrong geometry before hours are spent on it. anyres: base tiles only. Batches without images
    have no picture.
    """
    images = inputs.get("images")
    if trainer.plugin is None or not trainer.args.should_save or images is None:
        return
    if trainer.model.reads_features:  # no pixels are at hand
        if trainer.epoch_sampler is None:
            return
        uncached = copy(trainer.train_dataset)
        uncached.features = None
        first = trainer.epoch_sampler.order(0)[: trainer.args.train_batch_size]
        inputs = trainer.data_collator([uncached[index] for index in first])
        images = inputs["images"]
    images = torch.stack([image if image.dim() == 3 else image[0] for image in images])  # [N, 3, H, W]
    tower = trainer.model.get_vision_tower()
    processor, side = tower.image_processor, tower.seen_side
    path = Path(trainer.args.output_dir) / FIRST_BATCH
    pixels = undo_normalisation(images[..., :side, :side], processor.image_mean, processor.image_std)
    trainer.plugin.describe_first_batch(pixels, trainer.model.visual_grid, inputs.get("plugin_batch") or {}, path)
    logger.info("The first batch as the plugin sees it: %s.*", path)


Sums = dict[str, tuple[float, float]]


class MetricWindow:
    """Running means of named scalars over a logging window. NaN means "nothing to report" and is skipped.

    Values stay on their device until the window is read, so that adding them does not synchronise.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # each [2]: sum and count

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one value per name."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double().reshape(())
            present = ~value.isnan()
            entry = torch.stack([value.nan_to_num(posinf=torch.inf, neginf=-torch.inf), present.double()])
            before = self._sums.get(name)
            self._sums[name] = entry if before is None else before.to(entry.device) + entry

    def sums(self) -> Sums:
        """Return sum and count of each name on this rank."""
        return {name: (entry[0].item(), entry[1].item()) for name, entry in self._sums.items()}

    def restore(self, sums: Sums) -> None:
        """Restore the output of `sums`."""
        self._sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}

    def drain(self, gather: Callable[[Sums], list[Sums]]) -> dict[str, float]:
        """Empty the window and return means over all ranks, in order of first appearance, without empty names.

        Args:
            gather: gathers the sums of all ranks (a collective call).
        """
        totals: Sums = {}
        for sums in gather(self.sums()):
            for name, (total, count) in sums.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items() if count}


# Counts samples that contribute nothing to the loss, and stops a run that has too many of them.


def supervised_tokens(input_ids: Tensor, labels: Tensor, visual_tokens: Tensor, max_length: int | None) -> Tensor:
    """Count the labelled tokens of each row after images are inserted and the row is truncated, `[B]`.

    Args:
        input_ids: `[B, T]`, right-padded, IMAGE_TOKEN_INDEX for an image.
        labels: `[B, T]`.
        visual_tokens: `[N]`, number of visual tokens of each image, in the order of the rows.
        max_length: length to which the model truncates rows, if it does.
    """
    supervised = labels != IGNORE_INDEX  # [B, T]
    if max_length is not None:
        lengths = (input_ids != IMAGE_TOKEN_INDEX).long()
        lengths[input_ids == IMAGE_TOKEN_INDEX] = visual_tokens
        supervised = supervised & (lengths.cumsum(1) <= max_length)
    return supervised[:, 1:].sum(1)  # [B]; the first position is not predicted


class UnsupervisedSamples:
    """Tracks samples that contribute nothing to the loss, and stops a run that has too many of them.

    A sample is lost if none of its tokens has a label, or if `--on_error skip` skipped it. Those without labels are
    listed in `path` as JSON lines (the dataset lists the others), and both are counted.

    Args:
        path: the list of this rank; created with the first entry.
        sum_over_ranks: sums a list of counts over all ranks.
    """

    def __init__(self, path: Path, sum_over_ranks: Callable[[list[int]], list[int]]):
        self.path = path
        self.sum_over_ranks = sum_over_ranks
        self.seen = 0
        self.unsupervised = 0
        self._step = [0, 0]  # samples, and lost ones

    def add(self, sample_ids: list[str], supervised_tokens: list[int], step: int, skipped: int = 0) -> None:
        """Record one micro-batch: its samples, the number of labelled tokens of each, and how many were skipped."""
        empty = [name for name, count in zip(sample_ids, supervised_tokens, strict=True) if count == 0]
        self._step[0] += len(sample_ids) + skipped
        self._step[1] += len(empty) + skipped
        if empty:
            logger.warning("No supervised token in %s; listed in %s.", ", ".join(empty), self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps({"step": step, "id": name}) + "\n" for name in empty)

    def close_step(self, step: int) -> None:
        """Check all samples so far, after the last micro-batch of a step. All ranks must call it.

        Raises:
            ValueError: too large a share of them contributes nothing.
        """
        seen, lost = self.sum_over_ranks(self._step)
        self._step = [0, 0]
        self.seen += seen
        self.unsupervised += lost
        if too_many_are_lost(self.unsupervised, self.seen):
            raise ValueError(f"Step {step}: {self.summary()}, more than {LARGEST_SHARE:.0%}. {self._advice()}")

    def close_run(self) -> None:
        """Log how many samples a run has lost.

        Raises:
            ValueError: all of them.
        """
        if self.seen and self.unsupervised == self.seen:
            raise ValueError(f"{self.summary()}, so nothing was trained and nothing is saved. {self._advice()}")
        if self.unsupervised:
            logger.warning("%s. They are listed in %s.", self.summary(), self.path.parent)

    def summary(self) -> str:
        """Describe the counts in one sentence."""
        return f"{self.unsupervised} of {self.seen} samples were skipped or have no supervised token"

    def _advice(self) -> str:
        return (
            f"They are listed in {self.path.parent}. Check --image_folder, that --version fits the LLM, that "
            "answers are not empty and --model_max_length leaves room for them; or take them out of --data_path."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, to be saved in a checkpoint."""
        return {"seen": self.seen, "unsupervised": self.unsupervised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts of a checkpoint."""
        self.seen, self.unsupervised = state["seen"], state["unsupervised"]


class EpochSampler(Sampler[int]):
    """Samples in an order that depends on seed and epoch only, so it is equal on all ranks and after a restart.

    Args:
        draw_order: draws an order from torch's global generator, which is seeded before and restored afterwards.
        length: number of samples.
        seed: seed of the data order.
    """

    def __init__(self, draw_order: Callable[[], list[int]], length: int, seed: int):
        self.draw_order = draw_order
        self.length = length
        self.seed = seed
        self.epoch = 0
        self._drawn: tuple[int, list[int]] | None = None  # of one epoch: drawing half a million takes seconds

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """Return the sample indices of an epoch, in order."""
        if self._drawn is None or self._drawn[0] != epoch:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + epoch)  # torch.manual_seed would also seed the GPUs
                self._drawn = (epoch, self.draw_order())
        return self._drawn[1]

    def fingerprint(self, epoch: int) -> str:
        """Return a short hash of an epoch's order."""
        return hashlib.sha256(" ".join(map(str, self.order(epoch))).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))


__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_mm_adapter_state_maybe_zero_3",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]


def run_progress(step: int, max_steps: int) -> float:
    """Return the progress at zero-based optimizer step `step`: 0 at the first, 1 at the last (and in a 1-step run)."""
    return min(step / (max_steps - 1), 1.0) if max_steps > 1 else 1.0


class RunBookkeeping(TrainerCallback):
    """Callback that sets the sampler's epoch and restores logging windows on resume."""

    def __init__(self, trainer: LLaVATrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove unfinished checkpoints of a killed run, and restore the checkpoint's logging windows."""
        if args.should_save:
            shutil.rmtree(Path(args.output_dir) / STAGING_FOLDER, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.restore_log_state()
        self.trainer.check_state_is_finite()
        if state.global_step == 0:
            self.trainer.record_initial_metrics()

        stop_request.can_save = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves and ends the run after a signal, at the step on which the ranks agreed."""
        if self.trainer.is_told_to_stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.trainer.was_stopped = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the sampler's epoch: accelerate does not set it on several ranks after a restart."""
        sampler, epoch = self.trainer.epoch_sampler, int(state.epoch or 0)
        if sampler is not None:
            sampler.set_epoch(epoch)
            logger.info("Epoch %d: order of the data %s.", epoch, sampler.fingerprint(epoch))


class LLaVATrainer(CheckpointingTrainer):
    """Trainer for both stages of LLaVA.

    Args:
        *args: as for `transformers.Trainer`.
        plugin: adds losses to the caption loss; `None` is plain LLaVA.
        phase: what a checkpoint says that it is of: "run", or "warm-up", in which the plugin's losses have weight 1.
        tokenizer: upstream's name of `processing_class`.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: one process sees several GPUs (each needs its own process).
    """

    loss_is_scaled_for_ga = False  # losses are means over a micro-batch; the Trainer divides by their number

    def __init__(
        self,
        *args: Any,
        plugin: TrainingPlugin | None = None,
        tokenizer: Any = None,
        phase: Literal["run", "warm-up"] = "run",
        **kwargs: Any,
    ):
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        self.epoch_sampler: EpochSampler | None = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs. Start one process per GPU with `deepspeed` or `torchrun "
                "--nproc_per_node`, or select one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        self.plugin, self.phase = plugin, phase
        if plugin is not None:
            self.model.attach_plugin(plugin)
        self.is_told_to_stop = self.was_stopped = False
        self.window = MetricWindow()
        self.unsupervised = UnsupervisedSamples(
            Path(self.args.output_dir) / f"unsupervised_samples{self.rank_suffix}.jsonl", self._sum_over_ranks
        )
        self._first_batch_pending = plugin is not None
        self.add_callback(RunBookkeeping(self))

    def save_result(self) -> None:
        """As `CheckpointingTrainer` does, if the run has trained on anything."""
        if not self.result_is_saved:
            self.unsupervised.close_run()
        super().save_result()

    def _sum_over_ranks(self, counts: list[int]) -> list[int]:
        counts = [*counts, int(stop_request.signum is not None)]
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum").tolist()
        self.is_told_to_stop = counts.pop() > 0
        return counts

    # Losses

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted sum of a micro-batch's losses, and record each of them for logging.

        Raises:
            ValueError: a loss is not finite, an image does not fit into `model_max_length`, or too many samples have no
                supervised token; the message names the samples.
        """
        ids = inputs.get("sample_ids") or [f"row {row}" for row in range(len(inputs["input_ids"]))]
        if self._first_batch_pending and self.state.global_step == 0:
            self._first_batch_pending = False
            save_first_batch(self, inputs)
        skipped = inputs.pop("skipped", 0)
        outputs = model(**inputs)
        loss, logs = self._weighted_sum(outputs, "auxiliary_only" not in inputs)
        if model.training:
            self._check_samples(inputs, ids, loss, logs, skipped)
            self.window.add({**logs, **(outputs.auxiliary_metrics or {})})
        return (loss, outputs) if return_outputs else loss

    def record_initial_metrics(self) -> None:
        """Log what the plugin says of the run before its first step. All ranks must call it."""
        if self.plugin is not None:
            table = self.model.get_input_embeddings().weight
            with gathered([table]), torch.no_grad():
                embed_words = lambda ids: F.embedding(ids.to(table.device), table).cpu()  # noqa: E731
                self.window.add(self.plugin.initial_metrics(embed_words))

    def _weighted_sum(self, outputs: Any, has_text: bool) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the total loss, and its named terms and weights for logging."""
        total = outputs.loss
        logs: dict[str, Tensor | float] = {"loss/caption": outputs.loss} if has_text else {}
        auxiliary = outputs.auxiliary_losses or {}
        weights = dict.fromkeys(auxiliary, 1.0)
        if self.plugin is not None and self.phase == "run":
            weights = self.plugin.loss_weights(run_progress(self.state.global_step, self.state.max_steps))
        for name, value in auxiliary.items():
            if name not in weights:
                raise ValueError(f"{type(self.plugin).__name__}.loss_weights() gives no weight for its loss {name!r}.")
            logs |= {f"loss/{name}": value, f"{name}/beta": weights[name]}
            if weights[name]:  # weight 0 adds nothing, so that the step equals plain LLaVA's bit for bit
                total = total + weights[name] * value
        return total, logs

    def _check_samples(
        self, inputs: dict[str, Any], ids: list[str], loss: Tensor, logs: dict[str, Any], skipped: int
    ) -> None:
        """Raise if the loss is not finite, and track samples that contribute nothing."""
        config = self.model.config
        has_tower = self.model.get_vision_tower() is not None
        sizes = [self.model.visual_tokens_of(size) for size in inputs.get("image_sizes", [])] if has_tower else []
        visual_tokens = torch.tensor(sizes, dtype=torch.long, device=inputs["input_ids"].device)  # [N]
        max_length = getattr(config, "tokenizer_model_max_length", None) if has_tower else None
        counts = supervised_tokens(inputs["input_ids"], inputs["labels"], visual_tokens, max_length)
        if "auxiliary_only" in inputs:
            counts = torch.ones_like(counts)  # the plugin supervises them
        is_finite = loss.detach().isfinite().long().reshape(1)
        finite, *tokens = torch.cat([is_finite, counts]).tolist()  # the only GPU synchronisation
        step = self.state.global_step
        if not finite:
            terms = ", ".join(f"{name} {torch.as_tensor(value).item():g}" for name, value in logs.items())
            raise ValueError(
                f"Step {step}: the loss is {loss.item()} ({terms}). Samples: {', '.join(ids)}. Check these samples, "
                "lower --learning_rate, or train with --bf16 True instead of --fp16. "
                f"{set_aside_from(self.args.output_dir, step)}"
            )
        is_placeholder = skipped and inputs["input_ids"].shape[1] == 1  # a single token, for a batch that was skipped
        self.unsupervised.add(*([], []) if is_placeholder else (ids, tokens), step=step, skipped=skipped)
        if self.accelerator.sync_gradients:
            self.unsupervised.close_step(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means over micro-batches and ranks to the Trainer's logs."""
        if "loss" in logs:
            logs |= self.window.drain(lambda sums: gather_object([sums]) if self.args.world_size > 1 else [sums])
        super().log(logs, start_time)

    # Data order and optimizer

    def get_train_dataloader(self) -> Any:
        """As the Trainer does; a signal to all processes leaves the workers alone."""
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)  # accelerate iterates over the loader that it wraps
        base.worker_init_fn = partial(start_worker, base.worker_init_fn)
        base.timeout = self.args.dataloader_timeout if self.args.dataloader_num_workers else 0
        return loader

    def get_batch_samples(self, *arguments: Any) -> Any:
        """As the Trainer does; says what the workers of the data loader were reading where one is lost or stopped.

        Raises:
            RuntimeError: a worker died, or brought nothing within `--dataloader_timeout` seconds.
        """
        try:
            return super().get_batch_samples(*arguments)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            reading = [f"worker {number}: {name}" for number, name in self.train_dataset.being_read().items()]
            raise RuntimeError(f"{error}. Last read, {'; '.join(reading)}") from None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        is_auxiliary = getattr(dataset, "is_auxiliary", np.zeros(len(dataset), dtype=bool))
        text, auxiliary = np.flatnonzero(~is_auxiliary), np.flatnonzero(is_auxiliary)
        count = length = len(text)
        draw_text: Callable[[], list[int]] = lambda: torch.randperm(count).tolist()  # noqa: E731
        if getattr(args, "train_sampling_strategy", "random") == "sequential":
            if not len(auxiliary):
                return super()._get_train_sampler(dataset)
            draw_text = lambda: list(range(count))  # noqa: E731
        elif args.group_by_modality_length:
            grouped = LengthGroupedSampler(
                args.train_batch_size,
                world_size=args.world_size * args.gradient_accumulation_steps,
                lengths=[int(length) for length in dataset.modality_lengths[text]],
                group_by_modality=True,
            )
            draw_text = lambda: list(grouped)  # noqa: E731
        draw_order = draw_text
        if len(auxiliary):
            assert self.plugin is not None
            mixing = args.train_batch_size * args.world_size, self.plugin.auxiliary_only_ratio
            length = mixing[0] * sum(micro_steps_of_kinds(count, len(auxiliary), *mixing))

            def draw_order() -> list[int]:
                others = auxiliary[torch.randperm(len(auxiliary)).numpy()].tolist()
                return mix_kinds(text[draw_text()].tolist(), others, *mixing)

        seed = args.seed if args.data_seed is None else args.data_seed
        self.epoch_sampler = EpochSampler(draw_order, length, seed)
        return self.epoch_sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; with `mm_projector_lr`, the projector gets its own parameter groups."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.mm_projector_lr
        if is_new and rate is not None:
            named = (self.model if model is None else model).named_parameters()
            projector = {param for name, param in named if "mm_projector" in name}
            optimizer.param_groups = [
                group
                | {"params": [param for param in group["params"] if (param in projector) is of_projector]}
                | ({"lr": rate} if of_projector else {})
                for of_projector in (False, True)
                for group in optimizer.param_groups
            ]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Prepare as the Trainer does, but keep the dtype of buffers.

        DeepSpeed before 0.19.2 casts buffers to half precision together with the weights. With the rotary embedding's
        frequencies in bfloat16, position 600 would be rotated by up to 0.7 rad too far, in training only.
        """
        exact = {name: buffer.clone() for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        for name, buffer in self.model.named_buffers():
            if name in exact and buffer.dtype != exact[name].dtype:
                buffer.data = exact[name].to(buffer.device)
        return prepared

    def release_engine(self) -> None:
        """Take the model out of its engine and free that, so that another trainer can train it."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        self.model_wrapped = self.model
        self.accelerator.free_memory()

    # State saved in checkpoints

    def log_state(self) -> dict[str, Any]:
        """Extend `CheckpointingTrainer`'s with the metric window, unsupervised samples and the data order."""
        return super().log_state() | {
            "phase": self.phase,
            "window": self.window.sums(),
            "unsupervised": self.unsupervised.state_dict(),
            "data": self.data_order(),
        }

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Restore `log_state`, and warn if the data's order differs from the checkpoint's.

        Raises:
            ValueError: the checkpoint is of another phase.
        """
        if (phase := state.get("phase", "run")) != self.phase:
            raise ValueError(
                f"{self._resumed_from}: found a checkpoint of the {phase}, expected one of the {self.phase}. Leave "
                "--resume_from_checkpoint out: each phase resumes from its last one."
            )
        super().load_log_state(state)
        self.window.restore(state["window"])
        self.unsupervised.load_state_dict(state["unsupervised"])
        before, now = state.get("data") or {}, self.data_order()
        if any(now[key] != before.get(key, now[key]) for key in now) and self.is_world_process_zero():
            logger.warning(
                "The checkpoint was trained with %s, this run has %s: some samples will be repeated, others skipped. "
                "To continue the same run, pass --data_path, --seed and the global batch size as before.",
                before,
                now,
            )

    def data_order(self) -> dict[str, Any]:
        """Return what identifies the position in the data: samples per step, and a hash of the order."""
        args, sampler = self.args, self.epoch_sampler
        return {
            "samples_per_step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "order": None if sampler is None else sampler.fingerprint(int(self.state.epoch or 0)),
        }
