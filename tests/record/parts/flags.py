"""Flags of every command, and the signatures of LLaVA's public names.

A command is started up to where it reads its command line, and its parser is asked there: argparse's, transformers'
or click's. So it does not matter in which module a parser is made, or with which library.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import inspect
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest import mock

from product import Facts, Product

ARGPARSE_COMMANDS = (
    *(f"llava.eval.{name}" for name in ("run_llava", "model_vqa", "model_vqa_loader", "model_vqa_mmbench",
      "model_vqa_science", "eval_pope", "eval_science_qa", "eval_textvqa")),
    "llava.serve.cli", "llava.model.consolidate", "llava.model.apply_delta", "llava.model.make_delta",
    "eval.run", "eval.prefetch", "eval.captions", "eval.captions.score", "eval.rec.convert",
    "scripts/extract_mm_projector.py", "scripts/merge_lora_weights.py", "scripts/check_training_data.py",
    "playground.mini.make_scenes", "playground.mini.evaluation_set", "playground.mini.prepare_models",
)  # fmt: skip
TRAINING = ("llava/train/train_mem.py", "patch_aligned/train_mem.py")
APPS = {"patch-aligned": "patch_aligned.cli", "llava-convert": "llava.convert.cli"}

PUBLIC = {
    "llava": "LlavaLlamaForCausalLM",
    "llava.model": "LlavaLlamaForCausalLM LlavaConfig LlavaMistralForCausalLM LlavaMistralConfig",
    "llava.constants": "IGNORE_INDEX IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IMAGE_PATCH_TOKEN "
    "DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN IMAGE_PLACEHOLDER LOGDIR CONTROLLER_HEART_BEAT_EXPIRATION "
    "WORKER_HEART_BEAT_INTERVAL",
    "llava.conversation": "SeparatorStyle Conversation default_conversation conv_templates",
    "llava.mm_utils": "select_best_resolution resize_and_pad_image divide_to_patches get_anyres_image_grid_shape "
    "process_anyres_image load_image_from_base64 expand2square process_images tokenizer_image_token "
    "get_model_name_from_path KeywordsStoppingCriteria",
    "llava.model.builder": "load_pretrained_model",
    "llava.model.llava_arch": "LlavaMetaModel unpad_image LlavaMetaForCausalLM",
    "llava.model.multimodal_encoder.builder": "build_vision_tower",
    "llava.model.multimodal_encoder.clip_encoder": "CLIPVisionTower",
    "llava.model.multimodal_projector.builder": "build_vision_projector IdentityMap SimpleResBlock",
    "llava.train.train": "ModelArguments DataArguments TrainingArguments preprocess preprocess_multimodal "
    "preprocess_plain preprocess_v1 preprocess_llama_2 preprocess_mpt LazySupervisedDataset "
    "DataCollatorForSupervisedDataset make_supervised_data_module find_all_linear_names "
    "safe_save_model_for_hf_trainer smart_tokenizer_and_embedding_resize get_peft_state_maybe_zero_3 "
    "get_peft_state_non_lora_maybe_zero_3 get_mm_adapter_state_maybe_zero_3 maybe_zero_3 rank0_print train",
    "llava.train.llava_trainer": "LLaVATrainer LengthGroupedSampler split_to_even_chunks "
    "get_modality_length_grouped_indices get_length_grouped_indices get_mm_adapter_state_maybe_zero_3",
    "llava.utils": "disable_torch_init build_logger violates_moderation pretty_print_semaphore",
}
"""What upstream LLaVA v1.2.2 has, by module."""


class ParserMet(BaseException):
    """Ends a command where it would read its command line; no handler of the product catches it."""


def record(product: Product) -> Facts:
    """Flags by command, and signatures by module."""
    sys.path.insert(0, str(product.tree))
    commands = {name: product.stable(_argparse_flags(product.tree, name)) for name in ARGPARSE_COMMANDS}
    training = {name: _training_flags(product.tree, name) for name in TRAINING}
    apps = {name: product.stable(dict(_click_flags(_click_command(module)))) for name, module in APPS.items()}
    public = {module: _signatures(module, names.split()) for module, names in PUBLIC.items()}
    return {"commands": commands, "training": training, "apps": apps, "public": product.stable(public)}


def _argparse_flags(tree: Path, command: str) -> Facts | None:
    with _started(tree, command) as parser:
        if isinstance(parser, argparse.ArgumentParser):
            return {_name(action.option_strings, action.dest): _action(action) for action in _actions(parser)}
        return dict(_click_flags(parser)) if parser else None


def _training_flags(tree: Path, script: str) -> Facts:
    """Fields of the argument classes that are not transformers' own, and of the parser what no field stands for."""
    from transformers import TrainingArguments

    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    facts: Facts = {}
    with _started(tree, script) as parser:
        for number, kind in enumerate(parser.dataclass_types):
            for field in dataclasses.fields(kind):
                if field.name not in theirs or _default(field) != _default(theirs[field.name]):
                    facts[field.name] = {"class": number, "type": str(field.type), "default": _default(field)}
        for action in _actions(parser):
            if action.dest not in facts and action.dest not in theirs:
                facts[action.dest] = _action(action)
    return facts


@contextmanager
def _started(tree: Path, command: str) -> Iterator[Any]:
    """The parser with which a module or script reads its command line."""
    met: list[Any] = []

    def stop(parser: Any, *_: Any, **__: Any) -> None:
        met.append(parser)
        raise ParserMet

    def stop_app(app: Any, *_: Any, **__: Any) -> None:
        import typer

        stop(typer.main.get_command(app))

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch("typer.Typer.__call__", stop_app),
        mock.patch.object(sys, "argv", [command]),
    ):
        try:
            if command.endswith(".py"):
                runpy.run_path(str(tree / command), run_name="__main__")
            else:
                runpy.run_module(command, run_name="__main__", alter_sys=True)
        except (ParserMet, ImportError):
            pass
    yield met[0] if met else None


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]


def _action(action: argparse.Action) -> Facts:
    kind = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    choices = sorted(map(str, action.choices)) if action.choices else None
    return {"type": kind, "default": _plain(action.default), "required": action.required, "choices": choices,
            "many": action.nargs in ("+", "*")}  # fmt: skip


def _click_command(module: str) -> Any:
    from typer.main import get_command

    return get_command(importlib.import_module(module).app)


def _click_flags(command: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _click_flags(inner, f"{prefix}{name} ")
    for parameter in command.params:
        kind, choices, bounds = _click_type(parameter)
        yield (
            f"{prefix}{_name(parameter.opts, parameter.name)}",
            {
                "type": kind,
                "default": _plain(parameter.default() if callable(parameter.default) else parameter.default),
                "required": parameter.required,
                "choices": choices,
                "bounds": bounds,
                "many": parameter.multiple or parameter.nargs != 1,
                "off": list(parameter.secondary_opts),
            },
        )


def _click_type(parameter: Any) -> tuple[str, list[str] | None, list[Any]]:
    """Name, choices and bounds of a parameter's type; typer from 0.29 on has annotations where click had types."""
    if hasattr(parameter, "type_descriptor"):
        kind, bounds = parameter.type_descriptor.annotation, [parameter.min, parameter.max]
        members = [member.value for member in kind] if isinstance(kind, enum.EnumMeta) else get_args(kind)
        return ("choice" if members else kind.__name__), (sorted(map(str, members)) or None), bounds
    kind = parameter.type
    choices = sorted(map(str, kind.choices)) if hasattr(kind, "choices") else None
    names = {"integer": "int", "float": "float", "text": "str", "boolean": "bool", "path": "Path", "choice": "choice"}
    return names[kind.name.removesuffix(" range")], choices, [getattr(kind, "min", None), getattr(kind, "max", None)]


def _name(options: Any, otherwise: str) -> str:
    """All spellings of a flag."""
    return " ".join(sorted(options)) or otherwise


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _plain(field.default)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _signatures(module: str, names: list[str]) -> Facts:
    there = importlib.import_module(module)
    return {name: _signature(getattr(there, name)) if hasattr(there, name) else "missing" for name in names}


def _signature(value: Any) -> Any:
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return {member.name: _plain(member.value) for member in value}
    if inspect.isclass(value):
        own = {name: member for name, member in vars(value).items() if not name.startswith("_")}
        methods = {name: _arguments(member) for name, member in own.items() if inspect.isfunction(member)}
        return {"signature": _of_class(value), "methods": methods}
    if inspect.isfunction(value):
        return _arguments(value)
    return sorted(value) if isinstance(value, dict) else repr(value)


def _of_class(kind: type) -> str:
    """Of the training arguments, which hold all of transformers' own, the fields are recorded instead."""
    from transformers import TrainingArguments

    return "transformers' and more" if issubclass(kind, TrainingArguments) else _arguments(kind)


def _arguments(function: Any) -> str:
    """Names, kinds and defaults; annotations may be written otherwise."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))
