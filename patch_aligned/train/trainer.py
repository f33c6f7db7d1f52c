"""Train any vision-language model of transformers with the patch loss, under `Trainer` or TRL's `SFTTrainer`."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DefaultFlowCallback, PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from patch_aligned.labels import LabelTokenizer
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.tokens import PROJECTORS, VisualTokenHook, image_token_id
from patch_aligned.train.arguments import Grids, PatchArguments
from patch_aligned.train.objective import PatchObjective, open_regions
from patch_aligned.train.regions import TARGETS, RegionCollator, listed

logger = logging.getLogger(__name__)

WARMUP_FOLDER = "patch_warmup"
# Arguments of a warm-up. Its learning rate rises in 3% of the steps.
_WARMUP: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.03,
    "ddp_find_unused_parameters": True,
}
_WARMUP |= {"push_to_hub": False, "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}


class PatchAlignment:
    """Adds the patch loss to a trainer: `L = L_caption + beta * L_patch`.

    Args:
        regions: a PAD file, or the column of the data set with a list of regions for each sample: `tag`, `rle_mask` or
            `bbox`, and `image`, the number of the region's image (default 0). The `labels` of a PAD record fit.
        beta: weight of the patch loss at the first and at the last step; it changes linearly in between.
        image_id: with a PAD file, the column with the path of each sample's image (of several, a list) as that file has
            it.
        grids: which grids of tokens are trained, where a model sees an image in tiles and as a whole.
        **settings: `min_coverage`, `loss`, `nce_weight`, `nce_temperature`, `warmup_steps`, `on_error` and `cache_dir`,
            the fields of `PatchArguments` without their prefix.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        regions: str | Path = "regions",
        beta: tuple[float, float] = (0.0, 5.0),
        *,
        image_id: str = "image_id",
        grids: Grids = "all",
        **settings: Any,
    ) -> None:
        if grids not in ("all", "whole", "tiles"):
            raise ValueError(f"grids: found {grids!r}; expected 'all', 'whole' or 'tiles'")
        flags = {"beta_start": beta[0], "beta_end": beta[1], **settings}
        self.arguments = PatchArguments(**{f"patch_{name}": value for name, value in flags.items()})
        self.regions, self.image_id, self.grids = str(regions), image_id, grids

    def attach(self, trainer: Any) -> None:
        """Attach to a `transformers.Trainer`, or one that descends from it, before `train()`.

        Its `data_collator`, `compute_loss` and `log` are wrapped, and how it loads the weights of checkpoints; the
        model's code is not touched.

        Raises:
            ValueError: the data set lacks regions or image ids, nothing that the loss reaches is trained, the model's
                tokens have no place, or the trainer splits samples over devices.
            AnnotationError: the PAD file has broken records, and `on_error` is `fail`.
        """
        if hasattr(trainer, "patch_alignment"):
            raise ValueError("The trainer has a PatchAlignment already. Make the trainer again to attach another.")
        args, model, processor = trainer.args, _base_model(trainer.model), trainer.processing_class
        layouts_of(processor, [(64, 64)])  # raises if the processor is unknown
        _check_devices(trainer)
        _check_trained(model)
        is_file = Path(self.regions).suffix in (".json", ".jsonl", ".gz", ".parquet")
        index = open_regions(self.arguments, self.regions, Path(args.output_dir)) if is_file else None
        labels = LabelTokenizer(getattr(processor, "tokenizer", processor))
        self._objective = PatchObjective(self.arguments, labels, index, self.grids)
        self._check_data(trainer)
        self._trainer, self._is_warm_up, self._metrics = trainer, False, list[dict[str, Any]]()
        self._hook = _PatchLossHook(model, self._objective)
        picture = Path(args.output_dir) / "first_batch" if args.should_save else None
        sources = (None if is_file else self.regions, self.image_id)
        self._collator = trainer.data_collator = RegionCollator(
            trainer.data_collator, processor, self._objective, image_token_id(model.config), *sources, picture
        )
        trainer.compute_loss = partial(self._compute_loss, trainer.compute_loss)
        trainer.log = partial(self._log, trainer.log)
        resume_by_name(trainer)
        if self.arguments.patch_warmup_steps:
            trainer.train = partial(self._train, trainer.train)
        trainer.patch_alignment = self

    def _check_data(self, trainer: Any) -> None:
        """Check that samples have regions, and let the trainer keep the columns, which `forward` does not name."""
        data, index = trainer.train_dataset, self._objective.index
        sample = next(iter(data))
        needed = self.regions if index is None else self.image_id
        if needed not in sample:
            raise ValueError(
                f"The trainer's data set has the columns {sorted(sample)}, expected {needed!r} among them: pass "
                "regions=PAD_FILE or regions=COLUMN, and for a PAD file image_id=COLUMN. If your data set has it, the "
                "trainer has dropped it while it prepared the data."
            )
        if trainer.args.remove_unused_columns:
            trainer._set_signature_columns_if_needed()
            if not set(sample) & set(trainer._signature_columns):
                raise ValueError(f"The trainer would drop {sorted(sample)}. Pass remove_unused_columns=False to it.")
            trainer._signature_columns = [*trainer._signature_columns, needed, "size"]
        if index is not None and hasattr(data, "num_rows"):  # a table, not a stream
            ids = [name for row in data.select_columns([needed]) for name in listed(row[needed])]
            images, with_regions = index.count_images_with_regions(ids)
            if not with_regions:
                raise ValueError(
                    f"{index.source}: found none of the {images} images of the data set, such as {ids[:1]}; expected "
                    "the same paths in both."
                )
            logger.info("%d of %d images (%.1f%%) have regions", with_regions, images, 100 * with_regions / images)

    # Losses

    def _compute_loss(
        self,
        own: Callable[..., Any],
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the trainer's own loss, in training with the patch loss added."""
        trainer, targets = self._trainer, inputs.pop(TARGETS, None)
        if not trainer.model.training:
            return own(model, inputs, return_outputs, num_items_in_batch)
        self._collator.picture, self._hook.targets = None, targets
        # Ranks do not know of each other's batches, and where weights are sharded they must run the same layers.
        is_alone = self._is_warm_up or (not targets["has_text"] and trainer.args.world_size == 1)
        caption: Any = None
        if is_alone:
            given = {name: inputs[name] for name in inputs if name != "labels"} | {"use_cache": False}
            own_model = _base_model(trainer.model)
            if "logits_to_keep" in inspect.signature(own_model.forward).parameters:
                given["logits_to_keep"] = 1  # the head would cost more than all else
            with _without_layers(own_model.get_decoder()):
                outputs = model(**given)
        else:
            caption = own(model, inputs, return_outputs, num_items_in_batch)
            caption, outputs = caption if return_outputs else (caption, None)
        patch, metrics = self._hook.take()
        self._check_batch(patch, targets)

        has_text = targets["has_text"] and not is_alone
        progress = min(trainer.state.global_step / max(trainer.state.max_steps - 1, 1), 1.0)
        beta = 1.0 if self._is_warm_up else self.arguments.beta(progress if trainer.state.max_steps > 1 else 1.0)
        steps = trainer.current_gradient_accumulation_steps if _is_scaled(trainer, num_items_in_batch) else 1
        total = 0 * patch if is_alone else caption if has_text else caption.nan_to_num()  # a mean over no tokens
        if beta:  # weight 0 adds nothing, so that the step equals one without the patch loss, bit for bit
            total = total + beta * patch / steps
        losses = {"loss/caption": caption * steps if has_text else torch.nan, "loss/patch": patch, "patch/beta": beta}
        row = (losses | metrics).items()
        self._metrics.append({name: torch.as_tensor(value, device=patch.device).detach() for name, value in row})
        return (total, outputs) if return_outputs else total

    def _check_batch(self, patch: Tensor, targets: Mapping[str, Any]) -> None:
        names = ", ".join(targets["samples"])
        if not patch.isfinite():
            raise ValueError(
                f"Step {self._trainer.state.global_step}: the patch loss is {patch.item()}. Samples: {names}. Check "
                "these samples, lower the learning rate, or train in bf16 instead of fp16."
            )
        if not targets["visual_tokens"] and not any(_trained(_base_model(self._trainer.model), of_llm=True)):
            raise ValueError(
                f"A batch of text alone trains nothing, since the LLM is frozen. Samples: {names}. Leave out samples "
                "without image, or train a part of the LLM too."
            )

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log means over micro-batches and ranks too. NaN, such as a cosine of no regions, is left out."""
        if "loss" in logs and self._metrics:
            names, rows, self._metrics = list(self._metrics[0]), self._metrics, []
            table = torch.stack([torch.stack([row[name].double() for name in names]) for row in rows])  # [rows, names]
            sums = torch.stack([table.nansum(dim=0), (~table.isnan()).sum(dim=0).double()])
            totals, counts = self._trainer.accelerator.reduce(sums, "sum").tolist()
            logs |= {name: total / n for name, total, n in zip(names, totals, counts, strict=True) if n}
            logs |= self._hook.floor
            self._hook.floor = {}
        log(logs, *args, **kwargs)

    # Warm-up

    def _train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train by the patch loss alone first, without the layers of the LLM: a run of its own, resumed as any."""
        trainer, handler = self._trainer, self._trainer.callback_handler
        folder, found = Path(trainer.args.output_dir, WARMUP_FOLDER), resume_from_checkpoint
        if found is True:
            found = last_checkpoint(trainer.args.output_dir)
        if not resume_from_checkpoint or (found and Path(found).parent.name == WARMUP_FOLDER):
            changed = _WARMUP | {"max_steps": self.arguments.patch_warmup_steps, "output_dir": str(folder)}
            kept = {name: getattr(trainer.args, name) for name in changed}
            callbacks, optimizers = handler.callbacks, (trainer.optimizer, trainer.lr_scheduler)
            shown = (DefaultFlowCallback, ProgressCallback, PrinterCallback)
            handler.callbacks = [callback for callback in callbacks if isinstance(callback, shown)] + [_SkipLastSave()]
            vars(trainer.args).update(changed)
            self._is_warm_up = True
            try:
                train(resume_from_checkpoint=found or None)
            finally:  # after an error too, so that the trainer of a notebook stays what it was
                self._is_warm_up = False
                vars(trainer.args).update(kept)
                handler.callbacks, (trainer.optimizer, trainer.lr_scheduler) = callbacks, optimizers
            resume_from_checkpoint = None
            if trainer.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                trainer.state.save_to_json(str(folder / "trainer_state.json"))
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            trainer.model_wrapped = trainer.model
        return train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class _SkipLastSave(TrainerCallback):
    """Leaves the last step unsaved: the Trainer would take one more from there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save and state.global_step < state.max_steps

    on_epoch_end = on_step_end


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last checkpoint of a run; of its warm-up where the run itself has none yet."""
    folders = (Path(output_dir), Path(output_dir, WARMUP_FOLDER))
    return next((found for folder in folders if folder.is_dir() and (found := get_last_checkpoint(folder))), None)


def resume_by_name(trainer: Any) -> None:
    """Let a Trainer read the weights of its checkpoints as `from_pretrained` does.

    Families such as InternVL and Qwen2.5-VL are saved under other names than their modules have. The Trainer takes the
    names in the file for those of the modules, warns, and would keep the weights from before the first step.
    """
    trainer._load_from_checkpoint = partial(_load_weights, trainer, trainer._load_from_checkpoint)


@torch.random.fork_rng(devices=[])
def _load_weights(trainer: Any, load: Callable[..., None], checkpoint: str, model: Any = None) -> None:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not isinstance(trainer.model, PreTrainedModel):
        load(checkpoint, model)  # the engine's own files, or adapters
    else:
        widest = max((weight.dtype for weight in trainer.model.parameters()), key=lambda dtype: dtype.itemsize)
        saved = type(trainer.model).from_pretrained(checkpoint, dtype=widest)
        trainer.model.load_state_dict(saved.state_dict())


class PatchAlignedMixin:
    """Mixin of trainers: `class MyTrainer(PatchAlignedMixin, SFTTrainer)`, made with `patch_alignment=`."""

    def __init__(self, *args: Any, patch_alignment: PatchAlignment, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patch_alignment.attach(self)


def train_projector_only(model: Any, modules: Sequence[str] | None = None) -> dict[str, int]:
    """Freeze a vision-language model but for its projector, and print what is trained.

    Args:
        model: of transformers.
        modules: names of the projector's modules within the base model; None for those in `PROJECTORS`.

    Returns:
        The number of parameters of each module.

    Raises:
        ValueError: the model has none of these modules.
    """
    base = model.base_model
    names = PROJECTORS.get(model.config.model_type, ()) if modules is None else modules
    model.requires_grad_(False)
    sizes: dict[str, int] = {}
    for parameter_name, parameter in base.named_parameters():
        for name in names:
            if f"{parameter_name}.".startswith(f"{name}."):
                parameter.requires_grad_(True)
                sizes[name] = sizes.get(name, 0) + getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 splits it
    if not sizes:
        raise ValueError(
            f"model_type {model.config.model_type!r}: found no projector {list(names)}. Pass modules=[...], names "
            f"within {type(base).__name__}: {[name for name, _ in base.named_children()]}"
        )
    if os.environ.get("RANK", "0") == "0":
        for name, size in sizes.items():
            print(f"Training {name}: {size:,} parameters")  # people call this in notebooks
    return sizes


class _PatchLossHook(VisualTokenHook):
    """Computes the patch loss inside `forward`, where engines that split weights gather them.

    It does so in the pass after `targets` was set, and in no other: not in evaluation, nor in a second one of a step.
    """

    def __init__(self, model: Any, objective: PatchObjective) -> None:
        super().__init__(model)
        self.objective = objective
        self.targets: Mapping[str, Any] | None = None
        self.floor: dict[str, float] = {}
        self._has_floor = objective.index is None
        self._result: tuple[Tensor, dict[str, Tensor]] | None = None

    def take(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of the pass."""
        if self._result is None:
            raise ValueError("The language model did not run, so there are no visual tokens to align.")
        result, self._result = self._result, None
        return result

    def _read_tokens(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets, self.targets = self.targets, None
        if targets is None:
            return
        super()._read_tokens(module, args, kwargs)
        tokens, self.tokens = self.tokens, None
        assert tokens is not None
        if len(tokens) != targets["visual_tokens"]:
            raise ValueError(
                f"Found {len(tokens)} visual tokens in the LLM's input, expected {targets['visual_tokens']} as the "
                "collator has counted. Do not change the batch after it."
            )
        self._result = self.objective.loss(tokens, targets["image_row"], targets, self._embed)
        if not self._has_floor:
            floor = self.objective.constant_vector_floor(lambda ids: self._embed(ids.to(tokens.device)))
            self.floor, self._has_floor = {"patch/floor": floor}, True


def _check_devices(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"One process sees {trainer.args.n_gpu} GPUs. Start one process per GPU with `accelerate launch` or "
            "`torchrun --nproc_per_node`, or select one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("Context and sequence parallelism split an image's visual tokens over ranks: turn them off.")


def _check_trained(model: Any) -> None:
    trained = list(_trained(model, of_llm=False))
    if not trained:
        raise ValueError(
            f"model_type {model.config.model_type!r}: everything that the patch loss reaches is frozen. Call "
            "train_projector_only(model) before making the trainer, or name the projector in PEFT's modules_to_save: "
            f"{list(PROJECTORS.get(model.config.model_type, ()))}"
        )
    zero = [name for name, parameter in trained if parameter.ndim > 1 and parameter.numel() and not parameter.any()]
    if zero:
        logger.warning(
            "%s: all zero, so the patch loss has no gradient until the caption loss has moved it. Better initialise "
            "it: torch.nn.init.normal_(parameter, std=0.02).",
            ", ".join(zero),
        )


def _trained(model: Any, of_llm: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters of the LLM, or those of what makes its visual tokens."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    llm = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (id(parameter) in llm) == of_llm:
            yield name, parameter


def _base_model(model: Any) -> Any:
    """Return the model within PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether a micro-batch's loss is its part of the accumulated batch's, as `Trainer.training_step` decides."""
    if (stated := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
        return stated
    is_counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return is_counted or trainer.compute_loss_func is not None


@contextmanager
def _without_layers(decoder: Any) -> Iterator[None]:
    """Let an LLM run without its layers: visual tokens are read before them."""
    layers = decoder._modules.get("layers")
    if layers is not None:
        decoder._modules["layers"] = nn.ModuleList()
    try:
        yield
    finally:
        if layers is not None:
            decoder._modules["layers"] = layers
