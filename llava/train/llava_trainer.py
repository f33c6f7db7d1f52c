"""LLaVA's Trainer: losses, data order, parameter groups, and what it tracks over a logging window and a run.

What it saves is in `llava.train.checkpointing`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from llava.data.dataset import LARGEST_SHARE, too_many_are_lost
from llava.data.sampler import (
    EpochSampler,
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
    STAGING_FOLDER,
    CheckpointingTrainer,
    get_mm_adapter_state_maybe_zero_3,
    set_aside_from,
)
from llava.train.screen import show_steps
from llava.train.stopping import start_worker, stop_request

logger = logging.getLogger(__name__)

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


class LLaVATrainer(CheckpointingTrainer):
    """Trainer for both stages of LLaVA.

    `plugin` adds losses to the caption loss; None is plain LLaVA. `phase` is what a checkpoint says that it is of: in a
    "warm-up" the plugin's losses have weight 1. `tokenizer` is upstream's name of `processing_class`. All else is as
    for `transformers.Trainer`.
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
        for callback in plugin.callbacks(self) if plugin is not None and phase == "run" else ():
            self.add_callback(callback)
        show_steps(self)

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

        Raises `ValueError` naming the samples if a loss is not finite, or too many samples have no supervised token.
        """
        ids = inputs.get("sample_ids") or [f"row {row}" for row in range(len(inputs["input_ids"]))]
        if self._first_batch_pending and self.state.global_step == 0:
            self._first_batch_pending = False
            self._describe_first_batch(inputs)
        skipped = inputs.pop("skipped", 0)
        outputs = model(**inputs)
        loss, logs = self._weighted_sum(outputs, "auxiliary_only" not in inputs)
        if model.training:
            is_placeholder = skipped and inputs["input_ids"].shape[1] == 1  # of a batch that was skipped as a whole
            self._check_samples([] if is_placeholder else ids, outputs.supervised_tokens, loss, logs, skipped)
            self.window.add({**logs, **(outputs.auxiliary_metrics or {})})
        return (loss, outputs) if return_outputs else loss

    def _describe_first_batch(self, inputs: dict[str, Any]) -> None:
        """Pass the first micro-batch of the first rank to the plugin, whose picture of it reveals a wrong geometry.

        anyres: base tiles only. Batches without images have no picture.
        """
        if self.plugin is None or not self.args.should_save or inputs.get("images") is None:
            return
        if self.model.reads_features:  # no pixels are at hand
            if self.epoch_sampler is None:
                return
            uncached = copy(self.train_dataset)
            uncached.features = None
            first = self.epoch_sampler.order(0)[: self.args.train_batch_size]
            inputs = self.data_collator([uncached[index] for index in first])
        tower = self.model.get_vision_tower()
        processor, side = tower.image_processor, tower.seen_side
        base_tiles = [image if image.dim() == 3 else image[0] for image in inputs["images"]]
        pixels = torch.stack(base_tiles)[..., :side, :side].detach().float().cpu()  # [N, 3, H, W]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
        path = Path(self.args.output_dir) / "first_batch"
        plugin_batch = inputs.get("plugin_batch") or {}
        self.plugin.describe_first_batch((pixels * std + mean).clamp(0, 1), self.model.visual_grid, plugin_batch, path)
        logger.info("The first batch as the plugin sees it: %s.*", path)

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
        self, ids: list[str], counts: Tensor | None, loss: Tensor, logs: dict[str, Any], skipped: int
    ) -> None:
        """Raise if the loss is not finite, and track samples that contribute nothing: their count of labels is 0."""
        is_finite = loss.detach().isfinite().long().reshape(1)
        counts = is_finite.new_ones(len(ids)) if counts is None else counts  # [B]; the plugin supervises its own batch
        finite, *tokens = torch.cat([is_finite, counts]).tolist()  # the only GPU synchronisation
        step = self.state.global_step
        if not finite:
            terms = ", ".join(f"{name} {torch.as_tensor(value).item():g}" for name, value in logs.items())
            raise ValueError(
                f"Step {step}: the loss is {loss.item()} ({terms}). Samples: {', '.join(ids)}. Check these samples, "
                "lower --learning_rate, or train with --bf16 True instead of --fp16. "
                f"{set_aside_from(self.args.output_dir, step)}"
            )
        self.unsupervised.add(ids, tokens[: len(ids)], step=step, skipped=skipped)
        if self.accelerator.sync_gradients:
            self.unsupervised.close_step(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means over micro-batches and ranks to the Trainer's logs."""
        if "loss" in logs:
            logs |= self.window.drain(lambda sums: gather_object([sums]) if self.args.world_size > 1 else [sums])
        super().log(logs, start_time)

    # Data order and optimizer

    def get_train_dataloader(self) -> Any:
        """As the Trainer, with workers that ignore SIGTERM and a timeout for batches."""
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)  # accelerate iterates over the loader that it wraps
        base.worker_init_fn = partial(start_worker, base.worker_init_fn)
        base.timeout = self.args.dataloader_timeout if self.args.dataloader_num_workers else 0
        return loader

    def get_batch_samples(self, *arguments: Any) -> Any:
        """As the Trainer, but name what the workers were reading if one died or exceeded `--dataloader_timeout`."""
        try:
            return super().get_batch_samples(*arguments)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            reading = [f"worker {number}: {name}" for number, name in self.train_dataset.being_read().items()]
            raise ChildProcessError(f"{error}. Last read, {'; '.join(reading)}") from None

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
        """Restore `log_state`, and warn if the data's order differs from the checkpoint's."""
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
        """Save and end the run after a signal, at the step on which the ranks agreed."""
        if self.trainer.is_told_to_stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.trainer.was_stopped = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the sampler's epoch: accelerate does not set it on several ranks after a restart."""
        sampler, epoch = self.trainer.epoch_sampler, int(state.epoch or 0)
        if sampler is not None:
            sampler.set_epoch(epoch)
            logger.info("Epoch %d: order of the data %s.", epoch, sampler.fingerprint(epoch))


Sums = dict[str, tuple[float, float]]
"""Sum and count of each name."""


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
        """Empty the window and return means over all ranks, which `gather` collects, without empty names."""
        totals: Sums = {}
        for sums in gather(self.sums()):
            for name, (total, count) in sums.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items() if count}


class UnsupervisedSamples:
    """Tracks samples that contribute nothing to the loss, and stops a run that has too many of them.

    A sample is lost if none of its tokens has a label, or if `--on_error skip` skipped it. Those without labels are
    listed in `path`, one file per rank, as JSON lines (the dataset lists the others), and both are counted.
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
        """Check all samples so far, after the last micro-batch of a step. All ranks must call it."""
        seen, lost = self.sum_over_ranks(self._step)
        self._step = [0, 0]
        self.seen += seen
        self.unsupervised += lost
        if too_many_are_lost(self.unsupervised, self.seen):
            raise ValueError(f"Step {step}: {self.summary()}, more than {LARGEST_SHARE:.0%}. {self._advice()}")

    def close_run(self) -> None:
        """Log how many samples a run has lost."""
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
