"""Train LLaVA: stage 1 (`--tune_mm_mlp_adapter True`, the projector alone) and stage 2 (all but the vision tower, or
with `--lora_enable True` adapters on the LLM).

`train` is the complete recipe, from the command line to the saved weights. Names that forks import from this module are
re-exported.
"""

from __future__ import annotations

import logging
from pathlib import Path

from llava.command import errors_as_sentences
from llava.train.flags import check_command_line

if __name__ == "__main__":
    check_command_line()  # before the imports below, which take seconds

from transformers import set_seed

from llava.data.collate import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset, make_supervised_data_module
from llava.data.tokenization import (
    preprocess,
    preprocess_llama_2,
    preprocess_mpt,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v1,
)
from llava.model.builder import stop_at_end_mark
from llava.model.weights import maybe_zero_3
from llava.plugin import TrainingPlugin
from llava.train import assemble
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.train.assemble import smart_tokenizer_and_embedding_resize
from llava.train.cache_features import cache_features
from llava.train.checkpointing import (
    check_state_files,
    checkpoint_to_resume,
    finished_step,
    get_mm_adapter_state_maybe_zero_3,
    safe_save_model_for_hf_trainer,
)
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import (
    add_lora,
    find_all_linear_names,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    load_adapter,
)
from llava.train.phases import begun_warm_up, check_same_run, describe_run, log_end, run_phase, steps_of_run, warm_up
from llava.train.profiling import StepProfile
from llava.train.stopping import stop_request
from llava.utils import rank0_print

logger = logging.getLogger("llava.train")  # also where this file is the program

__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LLaVATrainer",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "find_all_linear_names",
    "get_mm_adapter_state_maybe_zero_3",
    "get_peft_state_maybe_zero_3",
    "get_peft_state_non_lora_maybe_zero_3",
    "make_supervised_data_module",
    "maybe_zero_3",
    "preprocess",
    "preprocess_llama_2",
    "preprocess_mpt",
    "preprocess_multimodal",
    "preprocess_plain",
    "preprocess_v1",
    "rank0_print",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "train",
]


@stop_request
def train(attn_implementation: str | None = None, plugin: TrainingPlugin | None = None) -> LLaVATrainer | None:
    """Run one stage of training, as the command line says.

    A run whose `--output_dir` has checkpoints resumes from the last complete one; a finished run does nothing.

    Args:
        attn_implementation: the entry point's choice of attention; `--attn_implementation` takes precedence, and flash
            attention is replaced where it cannot be used.
        plugin: adds losses and the flags of its `arguments_class`; None is plain LLaVA.

    Returns:
        the trainer, after saving; None if the run had finished before.

    Raises:
        SystemExit: a signal stopped the run, which was saved; status 143, or 130 after Ctrl-C.
        ValueError: arguments, data or a step of training are at fault; the message says which and what to do.
    """
    assemble.show_log_of_first_rank()
    model_args, data_args, training_args, plugin_args = parse_arguments(
        plugin_arguments_class=None if plugin is None else plugin.arguments_class
    )
    tokenizer = assemble.load_tokenizer(model_args, training_args)
    if plugin is not None:
        plugin.setup(
            plugin_args,
            tokenizer,
            data_path=data_args.data_path,
            image_folder=data_args.image_folder,
            output_dir=Path(training_args.output_dir),
        )
    checkpoint = checkpoint_to_resume(training_args.resume_from_checkpoint, training_args.output_dir)
    begun = checkpoint or begun_warm_up(training_args.output_dir, plugin)
    record = describe_run(model_args, data_args, training_args, plugin_args, resumes=begun is not None)
    if begun is not None:
        check_same_run(record, begun)
    if checkpoint is not None:
        done = finished_step(training_args.output_dir)
        steps = steps_of_run(training_args, assemble.count_samples(data_args, training_args, plugin))
        if done >= steps and not training_args.resume_from_checkpoint:
            logger.info("%s: finished, %d of %d steps; nothing to do.", training_args.output_dir, done, steps)
            return None
        logger.info("Resuming from %s.", checkpoint)
        if not training_args.trust_checkpoint:
            check_state_files(checkpoint)
    record.begin()
    assemble.start_engine(training_args)
    set_seed(training_args.seed)  # the Trainer seeds too, but only after the projector got its random weights

    # Flash attention takes no mask that keeps questions apart.
    asked = assemble.FALLBACK if data_args.independent_turns else attn_implementation
    attention = assemble.choose_attention(model_args.attn_implementation, asked, training_args)
    model = assemble.load_language_model(model_args, training_args, attention)
    assemble.give_padding_token(tokenizer, model, model_args.version)
    stop_at_end_mark(tokenizer, model, str(model_args.version))
    if training_args.lora_enable:
        model = add_lora(model, training_args)
    if model_args.vision_tower is not None:
        assemble.add_vision(model, tokenizer, model_args, data_args, training_args)
    if training_args.lora_weight_path:
        load_adapter(model, Path(training_args.lora_weight_path))
    assemble.log_trained_parts(model)
    assemble.check_reads_back(model)

    data = assemble.make_data(tokenizer, model, model_args, data_args, training_args, plugin)
    if data_args.cache_features:
        cache_features(model, data["train_dataset"], data_args, training_args)
    if plugin is not None and plugin.warmup_steps and checkpoint is None:
        training_args = warm_up(model, tokenizer, training_args, plugin, data, record)
    trainer = LLaVATrainer(model=model, processing_class=tokenizer, args=training_args, plugin=plugin, **data)
    if training_args.profile:
        trainer.add_callback(StepProfile(trainer, training_args.profile))

    run_phase(trainer, checkpoint, record)
    record.end()
    log_end(model_args, training_args)
    return trainer


if __name__ == "__main__":
    with errors_as_sentences():
        train()
