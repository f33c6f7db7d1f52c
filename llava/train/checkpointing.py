"""What a training run leaves on disk: `mm_projector.bin`, whole checkpoints, and checkpoints that survive a kill.

A `checkpoint-N` folder is written beside the others under another name and renamed when all ranks are done, so that a
folder of that name is always complete. deepspeed is imported only where it is in use.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import pickle
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file

from llava.command import RUN_FILE, RunRecord, changed_flags, read_record
from llava.model.weights import PROJECTOR_FILE, fill_strictly, read_tensors
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.utils import sha256

logger = logging.getLogger(__name__)

STAGING_FOLDER = ".unfinished"
PROJECTOR_KEYS = ("mm_projector", "vision_resampler", "image_newline")
RESUMING_HINT = "Give the flags that its run was started with; to start anew, give another --output_dir."
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

SAME_IN_A_RUN = ("seed", "data_seed", "global_batch_size", "group_by_modality_length", "train_sampling_strategy",
                 "lora_alpha")  # fmt: skip
"""What a resumed run must not change, beside the model's and the data's flags and the files that flags name."""
MAY_CHANGE = {"attn_implementation", "image_folder", "on_error", "lazy_preprocess", "is_multimodal"}
"""Flags of model and data that a resumed run may change."""
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir", "local_rank", "trust_checkpoint")


def maybe_zero_3(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """The whole of a parameter on the CPU, gathered first if ZeRO-3 has split it up (a collective call)."""
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.data.detach().cpu().clone()
    return param.detach().cpu().clone()


def get_mm_adapter_state_maybe_zero_3(
    named_params: Iterable[tuple[str, Tensor]], keys_to_match: Sequence[str]
) -> dict[str, Tensor]:
    """Whole copies of the parameters whose name contains one of `keys_to_match`."""
    return {
        name: maybe_zero_3(param, ignore_status=True)
        for name, param in named_params
        if any(key in name for key in keys_to_match)
    }


def projector_keys(config: Any) -> tuple[str, ...]:
    """Parts of parameter names that `mm_projector.bin` holds; word embeddings are among them if stage 1 trains them."""
    return PROJECTOR_KEYS + (EMBEDDING_KEYS if getattr(config, "mm_use_im_start_end", False) else ())


def save_projector(model: nn.Module, path: Path, *, is_writer: bool) -> None:
    """Writes the projector as upstream does: a pickled dict of whole tensors in the dtype of training.

    Called by all ranks (under ZeRO-3 the weights are gathered); `is_writer` says which of them writes.
    """
    state = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), projector_keys(model.config))
    if is_writer:
        save_tensors(state, path)


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Writes a pickled dict of tensors, upstream's format, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def save_config(config: Any, folder: Path) -> None:
    """Writes `config.json` beside weights that are not quantised, though the frozen ones may be while training."""
    config = copy.copy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


def load_projector_weights(model: nn.Module, path: Path) -> None:
    """Reads what `save_projector` wrote back into `model`, strictly.

    Raises:
        ValueError: names or shapes differ from the model's; the message shows both.
    """
    keys = projector_keys(model.config)
    params = {name: param for name, param in model.named_parameters() if any(key in name for key in keys)}
    fill_strictly(params, read_tensors(path), path, RESUMING_HINT)


def missing_from_checkpoint(folder: Path) -> list[str]:
    """What a `checkpoint-N` folder lacks to be resumed from; empty for a complete one."""
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
    """The `checkpoint-N` of the largest N that a run can be resumed from; incomplete ones are named and passed over."""
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            numbered.append((int(match.group(1)), folder))
    for _, folder in sorted(numbered, reverse=True):
        missing = missing_from_checkpoint(folder)
        if not missing:
            return folder
        logger.warning("%s is passed over: it cannot be resumed from, as it lacks %s.", folder, ", ".join(missing))
    return None


class _StandIn:
    """Takes the place of what DeepSpeed writes beside tensors while its files are looked through."""

    def __init__(self, *args: Any) -> None:
        pass


def check_state_files(folder: Path) -> None:
    """Looks for code in the pickles that a run resumes from, as DeepSpeed reads its own without a look.

    Raises:
        ValueError: a file holds other objects than the Trainer and DeepSpeed write, or cannot be read, or `latest`
            leads out of the folder.
    """
    files = [file for pattern in ("*.pt", "*.pth") for file in folder.glob(pattern)]
    if (folder / "latest").exists():
        tag = (folder / "latest").read_text().strip()
        if Path(tag).name != tag or tag == "..":
            raise ValueError(f"{folder / 'latest'}: found {tag!r}, expected the name of a folder beside it.")
        files += [file for file in (folder / tag).rglob("*") if file.is_file()]
    stand_ins: list[Any] = [(_StandIn, name) for name in DEEPSPEED_OBJECTS]
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
    """Renames the checkpoint of a state that spoiled a run, so that it goes on from the one before; says which."""
    spoiled = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    aside, kept = spoiled.with_name(f"spoiled-{spoiled.name}"), ""
    if spoiled.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        spoiled.rename(aside)
        kept = f" {spoiled} is now {aside}; were it good, --resume_from_checkpoint would name it."
    return f"Last good checkpoint: {last_complete_checkpoint(output_dir) or 'none'}.{kept}"


def checkpoint_to_resume(named: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that a run goes on from: the one it names, else the last complete one of its folder, if any.

    Raises:
        ValueError: the named one cannot be resumed from. The Trainer would pass over what it lacks: without a state it
            begins at step 0, without an optimizer at moments of zero.
    """
    if not named:
        return last_complete_checkpoint(output_dir)
    if missing := missing_from_checkpoint(Path(named)):
        raise ValueError(
            f"--resume_from_checkpoint {named}: it lacks {', '.join(missing)}. Give a checkpoint-N folder of a run, or "
            "leave the flag out: a run goes on from the last complete checkpoint of its --output_dir."
        )
    return Path(named)


def describe_run(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, plugin_args: Any, resumes: bool
) -> RunRecord:
    """The `run.json` of a training. The first rank alone hashes the files that flags name, and writes."""
    of_plugin = {} if plugin_args is None else dataclasses.asdict(plugin_args)
    flags = {**dataclasses.asdict(model_args), **dataclasses.asdict(data_args), **args.to_dict(), **of_plugin}
    named, is_first = {}, args.process_index == 0
    if is_first:
        named = {name: flags[name] for name in ("data_path", "pretrain_mm_mlp_adapter", *of_plugin)}
        for name in ("model_name_or_path", "vision_tower"):
            with contextlib.suppress(OSError, ValueError):  # loading it says what is wrong
                named[name] = flags[name] and cached_file(flags[name], "config.json", cache_dir=args.cache_dir)
    hashes = {
        name: sha256(Path(file)) for name, file in named.items() if isinstance(file, str) and Path(file).is_file()
    }
    flags["global_batch_size"] = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return RunRecord(Path(args.output_dir), flags, hashes, resumes=resumes, is_writer=is_first)


def check_same_run(record: RunRecord, checkpoint: Path) -> None:
    """Compares a run with the record beside the checkpoint that it resumes from, and names what has changed.

    Raises:
        ValueError: the checkpoint is of the run's own folder, and model, data or their order are others.
    """
    before = read_record(checkpoint.parent) if record.is_writer else {}
    changed = {
        name: f"{name}: {was} before, {now} now"
        for name, (was, now) in changed_flags(before, record.run).items()
        if name not in NOT_COMPARED
    }
    of_model_and_data = {field.name for kind in (ModelArguments, DataArguments) for field in dataclasses.fields(kind)}
    fixed = {*before.get("sha256", ()), *SAME_IN_A_RUN, *of_model_and_data} - MAY_CHANGE
    refused = "; ".join(text for name, text in changed.items() if name in fixed)
    if refused and checkpoint.resolve().parent == record.folder.resolve():
        raise ValueError(
            f"{record.folder} holds another run, up to {checkpoint.name}. {refused}. Give what its run.json has, or "
            f"another --output_dir; with --resume_from_checkpoint {checkpoint} too, that run starts from this one."
        )
    if changed:
        logger.warning("Changed since %s: %s.", checkpoint.parent / RUN_FILE, "; ".join(changed.values()))


def steps_of_run(args: Any, samples: int) -> int:
    """Optimizer steps of a whole run over `samples`, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    rows = args.train_batch_size * args.world_size
    batches = samples // rows if args.dataloader_drop_last else math.ceil(samples / rows)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def finished_step(output_dir: str | Path) -> int:
    """The step after which a run saved its weights in `output_dir` and ended; 0 if it has not."""
    state = Path(output_dir) / "trainer_state.json"
    saved = (PROJECTOR_FILE, "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    if not (state.is_file() and any((state.parent / name).exists() for name in saved)):
        return 0
    return json.loads(state.read_text()).get("global_step", 0)


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Moves a finished checkpoint to its name in one step, in place of an older one of that name."""
    if final.exists():
        old = staged.with_name(f"replaced-{final.name}")
        final.replace(old)
        staged.replace(final)
        shutil.rmtree(old)
    else:
        staged.replace(final)
    shutil.rmtree(staged.parent, ignore_errors=True)


def copy_tokenizer_model(tokenizer: Any, output_dir: Path) -> None:
    """Puts the SentencePiece file beside the tokenizer that transformers 5 writes without it.

    Software written for transformers 4 opens a checkpoint through that file alone.
    """
    source = getattr(tokenizer, "vocab_file", None)
    if not (source and Path(source).is_file()):
        source = Path(getattr(tokenizer, "name_or_path", "") or "") / "tokenizer.model"
    source, target = Path(source), output_dir / "tokenizer.model"
    if source.is_file() and source.name == target.name and not target.exists():
        shutil.copyfile(source, target)


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Saves at the end of a run: in stage 1 the projector and the config, otherwise the whole model.

    upstream parity: with `output_dir` named `checkpoint-N`, stage 1 writes `<parent>/mm_projector/checkpoint-N.bin`.
    """
    folder = Path(output_dir)
    if trainer.saves_projector_only and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        path = folder.parent / "mm_projector" / f"{folder.name}.bin"
        save_projector(trainer.model, path, is_writer=trainer.args.should_save)
        return
    trainer.save_model(output_dir)
