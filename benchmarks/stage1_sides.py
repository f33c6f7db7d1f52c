"""What `run_all.py` compares: steps of stage 1 under a Trainer, and new tokens, from the same weights and batches.

    python benchmarks/stage1_sides.py FOLDER ours train --bf16 auto

serves the steps of a side to another process. FOLDER is what `write_weights` wrote. `plain` computes all logits and all
of the last layer, and masks padding, as a model in evaluation mode does. `transformers` is `llava-convert to-hf` of the
same checkpoint under transformers' own Trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measured_models import assembled_model, batch_of_transformers, byte_tokenizer, random_batch, random_model
from measuring import command_line
from safetensors.torch import load_file, save_file
from served_steps import Step, serve
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from llava.convert.to_hf import to_hf
from llava.train.llava_trainer import LLaVATrainer

TEXT_TOKENS, NEW_TOKENS = 21, 32
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
Side = Literal["ours", "plain", "transformers"]


def write_weights(shape: str, folder: Path, batch_size: int) -> None:
    """Write random weights as `tower`, `llava` and `transformers`, and a batch as `batch.pt`."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_mm_proj": True,
                "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
                "image_aspect_ratio": "pad", "tokenizer_padding_side": "right",
                "tokenizer_model_max_length": 2048}  # fmt: skip
    model = random_model(shape, "cpu", dtype=torch.float32, tower_folder=folder / "tower", **settings)
    weights = folder / "tower/model.safetensors"  # transformers 4 reads them in a `vision_model`
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": w for name, w in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    model.save_pretrained(folder / "llava")
    byte_tokenizer(model.config.vocab_size - 1).save_pretrained(folder / "llava")  # `<image>` takes the last row
    batch = random_batch(model, batch_size, TEXT_TOKENS, prompt_tokens=2)
    torch.save(batch | {"images": batch["images"].float()}, folder / "batch.pt")
    del model
    to_hf(str(folder / "llava"), folder / "transformers", conv_mode="v1")


class StepClock(TrainerCallback):
    """Keeps the time from a step's begin to its end."""

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds = time.perf_counter() - self.start


def trained(trainer: Any) -> Callable[[], Step]:
    """A step of a trainer of one step: forward, backward, clipping, AdamW."""
    clock = StepClock()
    trainer.add_callback(clock)

    def step() -> Step:
        loss = trainer.train().training_loss
        return Step(clock.seconds, loss)

    return step


def generated(generate: Callable[[], Any]) -> Callable[[], Step]:
    """New tokens of one prompt."""

    def step() -> Step:
        start = time.perf_counter()
        with torch.inference_mode():
            generate()
        return Step(time.perf_counter() - start, math.nan)

    return step


def our_side(folder: Path, task: str, bf16: str, *, is_plain: bool = False) -> Callable[[], Step]:
    """LLaVA of this repository, as its training assembles it."""
    batch = torch.load(folder / "batch.pt", weights_only=True)
    flags = (
        f"--model_name_or_path {folder}/llava --vision_tower {folder}/tower --version plain --data_path none "
        f"--image_folder none --tune_mm_mlp_adapter True --model_max_length 2048 --bf16 {bf16} --max_steps 1 "
        f"--output_dir {folder}/ours --per_device_train_batch_size {len(batch['input_ids'])} --learning_rate 1e-3 "
        "--weight_decay 0 --lr_scheduler_type constant --save_strategy no --logging_strategy no --report_to none "
        "--disable_tqdm True"
    )
    tokenizer, model, _, _, args = assembled_model(flags)
    if task == "generate":
        ids, images = batch["input_ids"][:1], batch["images"][:1]
        return generated(partial(model.eval().generate, ids, images=images, image_sizes=[(336, 336)], **GREEDY))
    if is_plain:
        model.eval().train = lambda mode=True: model
    rows: list[dict] = [{}] * len(batch["input_ids"])
    batch["image_sizes"] = [(336, 336)] * len(rows)
    return trained(
        LLaVATrainer(model, args, lambda samples: dict(batch), train_dataset=rows, processing_class=tokenizer)
    )


def transformers_side(folder: Path, task: str, bf16: str) -> Callable[[], Step]:
    """transformers' own LLaVA with SDPA attention; in bfloat16 all of it, under autocast."""
    batch = torch.load(folder / "batch.pt", weights_only=True)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder / "transformers", attn_implementation="sdpa", dtype=torch.float32 if bf16 == "False" else torch.bfloat16
    )
    inputs = batch_of_transformers(batch, model.config.image_token_index, model.config.image_seq_length)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if task == "generate":
        first = {name: value[:1] for name, value in inputs.items() if name != "labels"}
        return generated(partial(model.eval().generate, **first, **GREEDY))
    rows: list[dict] = [{}] * len(inputs["input_ids"])
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    args = TrainingArguments(
        str(folder / "theirs"), use_cpu=True, bf16=bf16 != "False", max_steps=1, per_device_train_batch_size=len(rows),
        learning_rate=1e-3, weight_decay=0.0, lr_scheduler_type="constant", save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    return trained(Trainer(model, args, lambda samples: dict(inputs), train_dataset=rows))


def side_of(folder: Path, side: Side, task: str, bf16: str) -> Callable[[], Step]:
    """The step of a side: of `train` or `generate`."""
    if side == "transformers":
        return transformers_side(folder, task, bf16)
    return our_side(folder, task, bf16, is_plain=side == "plain")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the steps of a side."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("side", choices=("ours", "plain", "transformers"))
    parser.add_argument("task", choices=("train", "generate"))
    parser.add_argument("--bf16", default="False")
    args = parser.parse_args(arguments)
    serve(side_of(args.folder, args.side, args.task, args.bf16))


if __name__ == "__main__":
    main()
