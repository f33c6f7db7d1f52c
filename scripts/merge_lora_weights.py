"""Merges a LoRA run into its base: the result is a whole checkpoint that loads without `--model-base`.

usage: python scripts/merge_lora_weights.py --model-path CHECKPOINT --model-base LLM --save-model-path FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.checkpoint_files import Form, checkpoint_form, whose_weights
from llava.command import run_command
from llava.mm_utils import get_model_name_from_path


def merge_lora(model_path: str, model_base: str, save_model_path: str) -> None:
    """Writes the merged model and its tokenizer, in the dtype of the base, to `save_model_path`.

    Args:
        model_path: output folder of a run with `--lora_enable True`, or one of its checkpoints.
        model_base: folder or hub name of the LLM that the run started from.
        save_model_path: folder to write.

    Raises:
        FileExistsError: `save_model_path` holds files.
        FileNotFoundError: there is nothing at one of the paths.
        ImportError: peft is not installed.
        ValueError: `model_path` holds no adapter, or one that does not fit `model_base`.
    """
    form = checkpoint_form(model_path)
    if form is not Form.ADAPTER:
        raise ValueError(f"--model-path {model_path} holds {form.value}; expected {Form.ADAPTER.value}.")
    from llava.model.builder import load_pretrained_model, read_config  # after what needs no torch
    from llava.model.checkpoint import require_new_folder
    from llava.train.checkpointing import copy_tokenizer_model

    require_new_folder(Path(save_model_path))  # an adapter left in it would be read instead of the merged model
    name = get_model_name_from_path(model_path)
    dtype = read_config(whose_weights(form, model_path, model_base)).dtype
    tokenizer, model, _, _ = load_pretrained_model(
        model_path, model_base, name, device_map="cpu", device="cpu", dtype=dtype
    )
    model.save_pretrained(save_model_path)
    tokenizer.save_pretrained(save_model_path)
    copy_tokenizer_model(tokenizer, Path(save_model_path))


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, help="output folder of a LoRA run, or one of its checkpoints")
    parser.add_argument("--model-base", required=True, help="the LLM that the run started from")
    parser.add_argument("--save-model-path", required=True, help="folder for the merged checkpoint")
    return parser


def main(args: argparse.Namespace) -> None:
    """Merges what `args` name."""
    merge_lora(args.model_path, args.model_base, args.save_model_path)
    print(f"Next: python -m llava.serve.cli --model-path {args.save_model_path} --image-file IMAGE")


if __name__ == "__main__":
    run_command(main, argument_parser())
