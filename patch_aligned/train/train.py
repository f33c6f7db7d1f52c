"""Stage 1 of any vision-language model from a PAD file: captions, with the patch loss or without it, under TRL."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers.trainer_callback import TrainerState

from llava.command import RunRecord, changed_flags, flags_with_config, read_record
from llava.train.screen import show_steps
from patch_aligned.cells import Layout
from patch_aligned.files import sha256_of
from patch_aligned.images import image_path
from patch_aligned.intervals import Resampling
from patch_aligned.labels import LabelTokenizer
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.reads import PICTURES, Caption, measure_reads, reader_of, reads_metrics
from patch_aligned.models.tokens import image_inputs, visual_tokens
from patch_aligned.models.whole import WholeModel
from patch_aligned.pad import AnnotationIndex
from patch_aligned.train.arguments import PatchArguments, TrainArguments
from patch_aligned.train.objective import open_regions
from patch_aligned.train.publish import stage_1_card
from patch_aligned.train.trainer import PatchAlignment, last_checkpoint, resume_by_name, train_projector_only
from patch_aligned.train.watch import AlignmentWatch, HeldOutCallback, See, held_out_rows, rows_to_watch

# As LLaVA's stage 1, where TRL's defaults are others.
DEFAULTS = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "num_train_epochs": 1}
_WATCH = ("patch_picture_steps", "eval_align_steps", "eval_align_images")
_FEATURES = Features(
    image_id=Value("string"),
    images=List(Image(mode="RGB")),  # decoded when a sample is read, rotated as its EXIF says
    prompt=List({"role": Value("string"), "content": List({"type": Value("string")})}),
    completion=List({"role": Value("string"), "content": Value("string")}),
)


def train(arguments: Sequence[str]) -> Path:
    """Train as a command line says: flags of `TrainArguments`, `PatchArguments` and TRL's `SFTConfig`.

    The last checkpoint in `--output_dir` is resumed. The folder gets the model, a card and `run.json`; beside them
    `projector.safetensors` where the projector alone is trained, and `held_out.jsonl` with `--eval_reads_steps`.

    Raises:
        ImportError: TRL is not installed.
        AnnotationError: the PAD file has broken records, and `--patch_on_error` is `fail`.
        ValueError: images or captions are missing, or the folder has the run of another arm.
    """
    try:
        from trl import SFTConfig, SFTTrainer, TrlParser
    except ImportError as error:
        raise ImportError(f"{error}. Training needs TRL: pip install 'patch-aligned-llava[train]'") from error

    kinds: Any = (TrainArguments, PatchArguments, SFTConfig)
    parser = TrlParser(kinds, prog="patch-aligned train MODEL")
    parser.set_defaults(**DEFAULTS, max_length=None)
    own, patch, args = parser.parse_args_into_dataclasses(flags_with_config(parser, arguments))
    for name in ("patch_data_path", "patch_regions_only_ratio"):
        if getattr(patch, name) is not None:
            raise ValueError(f"--{name} belongs to LLaVA's training and has no effect here. Leave it out.")

    output = Path(args.output_dir)
    index = open_regions(patch, own.data, output)
    arm = asdict(own) | asdict(patch) | {"seed": args.seed}
    record = RunRecord(output, args.to_dict() | arm, {"data": sha256_of(index.source)}, is_writer=args.should_save)
    checkpoint = args.resume_from_checkpoint or last_checkpoint(output)
    changed = changed_flags(read_record(output), record.run)
    if checkpoint and (other := {name: values for name, values in changed.items() if name in arm}):
        raise ValueError(f"{checkpoint}: it was trained with other flags {other} (then, now). Name a new --output_dir.")
    if checkpoint and not {"max_steps", "num_train_epochs"} & changed.keys():
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        if state.global_step >= state.max_steps and (output / "config.json").exists():  # the Trainer would train on
            if args.should_save:
                print(f"{output}: finished, {state.global_step} of {state.max_steps} steps; nothing to do.")
            return output

    held_out: tuple[int, ...] = ()
    if own.eval_reads_steps:
        flag, count = "eval_reads_captions", own.eval_reads_captions
        held_out = held_out_rows(index, flag, count, PICTURES, lambda image: image.caption.strip())
    watched = rows_to_watch(patch, index, Path(own.images))
    data = captioned_images(index, own, {*held_out, *watched})
    trainer: Any = SFTTrainer(model=own.model, args=args, train_dataset=data)
    show_steps(trainer)
    if own.train_what == "projector":
        train_projector_only(trainer.model)
    if own.captions_only:
        resume_by_name(trainer)
    else:
        settings = {name.removeprefix("patch_"): of for name, of in asdict(patch).items() if name not in _WATCH}
        beta = settings.pop("beta_start"), settings.pop("beta_end")
        PatchAlignment(own.data, beta, grids=own.grids, **settings).attach(trainer)
    if held_out:
        captions = [Caption(image.image_id, image.caption.strip()) for image in map(index.__getitem__, held_out)]
        trainer.add_callback(_ReadsCallback(trainer, captions, Path(own.images), own.eval_reads_steps))
    if watched:
        labels, shown = LabelTokenizer(trainer.processing_class.tokenizer), [index[row] for row in watched]
        trainer.add_callback(AlignmentWatch(trainer, patch, shown, Path(own.images), labels, _seen_by(trainer)))
    record.begin()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if own.train_what == "projector":
        trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on all ranks, which may have parts
        if args.should_save:
            kept = {name: weights[name].contiguous() for name in trained}
            save_file(kept, output / "projector.safetensors", {"base_model": own.model, "format": "pt"})
    if args.should_save:
        _card(own, read_record(output), trainer.state.log_history).save(output / "README.md")
    record.end()
    return output


class _ReadsCallback(HeldOutCallback):
    """Logs how much likelier held-out captions are after their own pictures, as `patch-aligned reads` has it."""

    def __init__(self, trainer: Any, captions: Sequence[Caption], image_folder: Path, steps: int) -> None:
        super().__init__(trainer, steps)
        self.captions, self.image_folder = captions, image_folder
        self.read = reader_of(WholeModel(trainer.model, trainer.processing_class, request=""))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            lines = [json.dumps({"image_id": image_id, "caption": text}) for image_id, text in self.captions]
            Path(args.output_dir, "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        super().on_train_begin(args, state, control, **kwargs)

    def measure(self) -> None:
        with self.trainer.compute_loss_context_manager():
            rows = measure_reads(self.read, self.captions, self.image_folder)
        found = reads_metrics(rows, Resampling()).loc["reads_per_caption"]
        logs = {"reads": found["value"], "reads/low": found["low"], "reads/high": found["high"]}
        self.trainer.log({name: float(value) for name, value in logs.items()})


def _seen_by(trainer: Any) -> See:
    """Return how the trainer's model reads an image, without its LLM."""

    def see(image: Any) -> tuple[Layout, Any]:
        [layout] = layouts_of(trainer.processing_class, [image])
        inputs = image_inputs(trainer.processing_class, [[image]]).to(trainer.args.device)
        return layout, lambda: visual_tokens(trainer.model, inputs)

    return see


def captioned_images(index: AnnotationIndex, own: TrainArguments, left_out: Collection[int] = ()) -> Dataset:
    """Return the images of a PAD file with their captions as answers, memory-mapped beside its conversion."""
    if not len(index):
        raise ValueError(f"--data {own.data}: found no records, expected images with captions and regions")
    folder = Path(own.images).resolve()
    if not image_path(folder, index[0].image_id).is_file():
        raise ValueError(f"--images {own.images}: found no {index[0].image_id}, the first image_id of {own.data}")
    made_of = {"index": index, "folder": folder, "captions_only": own.captions_only, "left_out": frozenset(left_out)}
    try:
        return Dataset.from_generator(_samples, features=_FEATURES, gen_kwargs=made_of, cache_dir=str(index.folder))
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _samples(
    index: AnnotationIndex, folder: Path, captions_only: bool, left_out: frozenset[int]
) -> Iterator[dict[str, Any]]:
    for row in sorted(set(range(len(index))) - left_out):
        image = index[row]
        if captions_only and not image.caption.strip():
            where = f"{index.source}: image_id {image.image_id!r}"
            raise ValueError(f"{where}: found an empty caption. With --captions_only leave such records out.")
        yield {
            "image_id": image.image_id,
            "images": [str(image_path(folder, image.image_id))],
            "prompt": [{"role": "user", "content": [{"type": "image"}]}],
            "completion": [{"role": "assistant", "content": image.caption}],
        }


def _card(own: TrainArguments, record: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> ModelCard:
    arm = "captions" if own.captions_only else "captions and the patch loss"
    what = "the projector; vision encoder and LLM are as they were" if own.train_what == "projector" else "all weights"
    shown = (*asdict(own), *DEFAULTS, "max_steps", "seed", "patch_beta_start", "patch_beta_end")
    flags = {name: record["flags"][name] for name in shown}
    return stage_1_card(own.model, f"Stage 1 by {arm}\n\nTrained: {what}.", flags, record, log)
