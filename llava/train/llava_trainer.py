"""The Trainer with LLaVA's parameter groups and data order, a plugin's losses, and checkpoints in every stage."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from llava.data.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava.plugin import TrainingPlugin
from llava.train.checkpointing import STAGING_FOLDER, get_mm_adapter_state_maybe_zero_3
from llava.train.checkpointing_trainer import CheckpointingTrainer
from llava.train.data_order import EpochSampler
from llava.train.first_batch import save_first_batch
from llava.train.metrics import MetricWindow
from llava.train.supervision import UnsupervisedSamples, supervised_tokens

__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_mm_adapter_state_maybe_zero_3",
    "get_modality_length_grouped_indices",
    "split_to_even_chunks",
]

logger = logging.getLogger(__name__)


def run_progress(step: int, max_steps: int) -> float:
    """How far a run is at the zero-based optimizer step `step`: 0 at the first, 1 at the last (and in a run of one)."""
    return step / (max_steps - 1) if max_steps > 1 else 1.0


class RunBookkeeping(TrainerCallback):
    """Sets the epoch of the data order, and carries logging windows over a restart."""

    def __init__(self, trainer: LLaVATrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clears what a killed run left half written, and takes over the windows of the checkpoint."""
        if args.should_save:
            shutil.rmtree(Path(args.output_dir) / STAGING_FOLDER, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.restore_log_state()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the sampler its epoch: accelerate does not reach it on several ranks after a restart."""
        sampler, epoch = self.trainer.epoch_sampler, int(state.epoch or 0)
        if sampler is not None:
            sampler.set_epoch(epoch)
            logger.info("Epoch %d: order of the data %s.", epoch, sampler.fingerprint(epoch))


class LLaVATrainer(CheckpointingTrainer):
    """Trains LLaVA in both stages.

    Args:
        *args: as for `transformers.Trainer`.
        plugin: adds losses to the caption loss; `None` is plain LLaVA.
        tokenizer: upstream's name of `processing_class`.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: one process sees several GPUs (each needs a process of its own).
    """

    loss_is_scaled_for_ga = False  # losses are means of a micro-batch; the Trainer divides by their number

    def __init__(self, *args: Any, plugin: TrainingPlugin | None = None, tokenizer: Any = None, **kwargs: Any):
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        self.epoch_sampler: EpochSampler | None = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs. Start one process a GPU with `deepspeed` or `torchrun "
                "--nproc_per_node`, or choose one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        self.plugin = plugin
        if plugin is not None:
            self.model.attach_plugin(plugin)
        self.window = MetricWindow()
        self.unsupervised = UnsupervisedSamples(
            Path(self.args.output_dir) / f"unsupervised_samples{self.rank_suffix}.jsonl", self._sum_over_ranks
        )
        self._first_batch_pending = plugin is not None
        self.add_callback(RunBookkeeping(self))

    def _sum_over_ranks(self, counts: list[int]) -> list[int]:
        if self.args.world_size == 1:
            return counts
        return self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum").tolist()

    # Losses

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weights, sums and takes down the losses of one micro-batch: the only place where that happens.

        Raises:
            ValueError: a loss is not finite, an image does not fit into `model_max_length`, or too many samples have no
                supervised token; the message names the samples.
        """
        ids = inputs.get("sample_ids") or [f"row {row}" for row in range(len(inputs["input_ids"]))]
        if self._first_batch_pending and self.state.global_step == 0:
            self._first_batch_pending = False
            save_first_batch(self, inputs)
        outputs = model(**inputs)
        loss, logs = self._weighted_sum(outputs)
        if model.training:
            self._check_samples(inputs, ids, loss, logs)
            self.window.add({**logs, **(outputs.auxiliary_metrics or {})})
        return (loss, outputs) if return_outputs else loss

    def _weighted_sum(self, outputs: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Total loss, and the named terms and weights to log."""
        total = outputs.loss
        logs: dict[str, Tensor | float] = {"loss/caption": outputs.loss}
        auxiliary = outputs.auxiliary_losses or {}
        weights = {}
        if self.plugin is not None:
            weights = self.plugin.loss_weights(run_progress(self.state.global_step, self.state.max_steps))
        for name, value in auxiliary.items():
            if name not in weights:
                raise ValueError(f"{type(self.plugin).__name__}.loss_weights() gives no weight for its loss {name!r}.")
            logs |= {f"loss/{name}": value, f"{name}/beta": weights[name]}
            if weights[name]:  # at 0 nothing is added, so that the step is plain LLaVA's to the last bit
                total = total + weights[name] * value
        return total, logs

    def _check_samples(self, inputs: dict[str, Any], ids: list[str], loss: Tensor, logs: dict[str, Any]) -> None:
        """Stops on a loss that is not finite, and keeps the book of samples without supervised tokens."""
        config = self.model.config
        has_tower = self.model.get_vision_tower() is not None
        sizes = [self.model.visual_tokens_of(size) for size in inputs.get("image_sizes", [])] if has_tower else []
        visual_tokens = torch.tensor(sizes, dtype=torch.long, device=inputs["input_ids"].device)  # [N]
        max_length = getattr(config, "tokenizer_model_max_length", None) if has_tower else None
        counts = supervised_tokens(inputs["input_ids"], inputs["labels"], visual_tokens, max_length)
        is_finite = loss.detach().isfinite().long().reshape(1)
        finite, *tokens = torch.cat([is_finite, counts]).tolist()  # the one wait for the GPU
        step = self.state.global_step
        if not finite:
            terms = ", ".join(f"{name} {torch.as_tensor(value).item():g}" for name, value in logs.items())
            raise ValueError(
                f"Step {step}: the loss is {loss.item()} ({terms}). Samples: {', '.join(ids)}. Look at these samples; "
                "else lower --learning_rate, or train with --bf16 True in place of --fp16."
            )
        if inputs["input_ids"].shape[1] > 1:  # one token alone stands for samples that were skipped
            self.unsupervised.add(ids, tokens, step)
        if self.accelerator.sync_gradients:
            self.unsupervised.close_step(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's means, over micro-batches and ranks, to what the Trainer logs."""
        if "loss" in logs:
            logs |= self.window.drain(lambda sums: gather_object([sums]) if self.args.world_size > 1 else [sums])
        super().log(logs, start_time)

    # Data order and optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args, count = self.args, len(dataset)
        if getattr(args, "train_sampling_strategy", "random") == "sequential":
            return super()._get_train_sampler(dataset)
        draw_order = lambda: torch.randperm(count).tolist()  # noqa: E731
        if args.group_by_modality_length:
            grouped = LengthGroupedSampler(
                args.train_batch_size,
                world_size=args.world_size * args.gradient_accumulation_steps,
                lengths=[int(length) for length in dataset.modality_lengths],
                group_by_modality=True,
            )
            draw_order = lambda: list(grouped)  # noqa: E731
        seed = args.seed if args.data_seed is None else args.data_seed
        self.epoch_sampler = EpochSampler(draw_order, count, seed)
        return self.epoch_sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer does; with `mm_projector_lr` the projector's weights and biases are groups of their own."""
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
        """As the Trainer does, but buffers stay as exact as they were.

        DeepSpeed before 0.19.2 rounds them to half precision with the weights. With the rotary embedding's frequencies
        in bfloat16, position 600 would be turned by up to 0.7 rad too far, in training alone.
        """
        exact = {name: buffer.clone() for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        for name, buffer in self.model.named_buffers():
            if name in exact and buffer.dtype != exact[name].dtype:
                buffer.data = exact[name].to(buffer.device)
        return prepared

    # State that outlives a restart

    def log_state(self) -> dict[str, Any]:
        """See `CheckpointingTrainer`; with the window of the losses, unsupervised samples and the order of the data."""
        return super().log_state() | {
            "window": self.window.sums(),
            "unsupervised": self.unsupervised.state_dict(),
            "data": self.data_order(),
        }

    def load_log_state(self, state: dict[str, Any]) -> None:
        """See `CheckpointingTrainer`; says so where the data are not what the checkpoint was trained on."""
        super().load_log_state(state)
        self.window.restore(state["window"])
        self.unsupervised.load_state_dict(state["unsupervised"])
        before, now = state.get("data"), self.data_order()
        if before not in (None, now) and self.is_world_process_zero():
            logger.warning(
                "The checkpoint was trained with %s, this run has %s: some samples will come twice, others not at all. "
                "To go on as begun, give the --data_path, --seed and global batch of before.",
                before,
                now,
            )

    def data_order(self) -> dict[str, Any]:
        """What the place in the data means: samples of an optimizer step, and a hash of the epoch's order."""
        args, sampler = self.args, self.epoch_sampler
        return {
            "samples_per_step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "order": None if sampler is None else sampler.fingerprint(int(self.state.epoch or 0)),
        }
