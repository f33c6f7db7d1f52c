"""Checks what a training needs, then trains ten steps of it; started by `scripts/v1_5/preflight.sh`.

usage: preflight.py WORD... - the words of the command that a training script prints with DRY_RUN=1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.requirements import Requirement
from transformers import HfArgumentParser

from llava.checkpoint_files import UNSHARDED_FILES
from llava.mm_utils import parse_grid_pinpoints
from llava.model.checkpoint import read_config
from llava.model.language_model.families import llava_config, llava_model_class
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import record_projector
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.assemble import load_tokenizer, make_data
from llava.train.checkpointing import last_complete_checkpoint
from llava.train.lora import add_lora
from llava.train.screen import STEP_LINE
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.plugin import PatchAlignedPlugin

SAVED_STEP, LAST_STEP = 6, 10
WARMUP_STEPS = 2  # of a run with a warm-up
SAMPLE = 200  # records that are read as in training


def show(topic: str, text: str) -> None:
    """Prints one line of the report."""
    print(f"{topic:<10} {text}", flush=True)


def size_text(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def read_command(words: Sequence[str]) -> tuple[argparse.Namespace, int]:
    """Flags of a printed command with the trainer's defaults, and the number of processes it starts."""
    program = next(position for position, word in enumerate(words) if word.endswith("train_mem.py"))
    classes: list[Any] = [ModelArguments, DataArguments, TrainingArguments]
    if words[program].startswith("patch_aligned"):
        classes.append(PatchArguments)
    # As a namespace: the dataclasses themselves would start the process group and the GPU.
    flags, unknown = HfArgumentParser(classes, allow_abbrev=False).parse_known_args(list(words[program + 1 :]))
    if unknown:
        raise ValueError(f"found {unknown[0]}, which is no flag of training; next: correct it or leave it out")
    launcher = dict(pairwise(words[:program]))  # each word and the one behind it
    if (nodes := int(launcher.get("--nnodes", 1))) > 1:
        raise ValueError(
            f"found NNODES={nodes}, expected 1, as the check runs on one machine; next: run it on each with NNODES=1 "
            f"and GLOBAL_BATCH_SIZE divided by {nodes}"
        )
    if include := launcher.get("--include"):
        return flags, len(include.partition(":")[2].split(","))
    return flags, int(launcher.get("--num_gpus") or launcher.get("--nproc_per_node") or 1)


def steps_of_whole_run(flags: argparse.Namespace, samples: int, processes: int) -> int:
    """Optimizer steps, as the Trainer counts them."""
    if flags.max_steps > 0:
        return int(flags.max_steps)
    batches = math.ceil(samples / (flags.per_device_train_batch_size * processes))
    return math.ceil(flags.num_train_epochs * math.ceil(batches / flags.gradient_accumulation_steps))


def check_gpus(flags: argparse.Namespace, processes: int) -> str:
    """Whether torch can use as many GPUs as processes are started."""
    if flags.use_cpu:
        return f"none, as --use_cpu is True; processes: {processes}"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < processes:
        way_out = f"NUM_GPUS={found}" if found else "nvidia-smi, or PRESET=mini for the miniature on a CPU"
        raise ValueError(
            f"found {found} GPUs that torch {torch.__version__} can use, expected NUM_GPUS={processes}; next: {way_out}"
        )
    smi = subprocess.run(nvidia_smi("name,driver_version"), capture_output=True, text=True, check=True)
    name, driver = smi.stdout.splitlines()[0].split(", ")
    return f"{processes} of {found}, {name}, driver {driver}"


def nvidia_smi(fields: str, *options: str) -> list[str]:
    """The command that prints fields of the visible GPUs, one line each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [f"--id={visible}"] if visible else []
    return ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *chosen, *options]


def check_versions(flags: argparse.Namespace) -> str:
    """Whether the packages that the run needs are installed, and new enough."""
    extras = {"deepspeed": flags.deepspeed, "peft": flags.lora_enable, "bitsandbytes": flags.bits < 16}
    for requirement in map(Requirement, metadata.requires("patch-aligned-llava") or ()):
        is_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if is_extra and not extras.get(requirement.name):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            raise ValueError(
                f"found {requirement.name} {found}, expected {requirement.specifier}; next: pip install -e '.[train]'"
            )
    names = ["torch", "transformers", *(name for name, is_used in extras.items() if is_used)]
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)])


def weights_folder(flag: str, name: str, cache_dir: str | None) -> str:
    """The folder of a checkpoint, here or in the hub's cache, with all its weights."""
    folder, found = Path(name), "no such folder"
    next_command = "correct the path (the miniature's weights: bash scripts/prepare_mini.sh)"
    if not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        found, next_command = "no such folder, and nothing in the hub's cache", f"hf download {name}"
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=True))
    if not folder.is_dir():
        raise ValueError(f"--{flag} {name}: found {found}, expected weights; next: {next_command}")
    choices = [name for file in UNSHARDED_FILES for name in (file, f"{file}.index.json")]
    chosen = next((name for name in choices if (folder / name).is_file()), choices[0])
    is_index = chosen.endswith(".index.json")
    files = json.loads((folder / chosen).read_text(encoding="utf-8"))["weight_map"].values() if is_index else [chosen]
    if absent := sorted(file for file in set(files) if not (folder / file).is_file()):
        raise ValueError(f"--{flag} {name}: found no {absent[0]} in {folder}; next: hf download it, or copy it there")
    return str(folder)


def model_without_weights(flags: argparse.Namespace) -> Any:
    """The model that will be trained, on the meta device: it has shapes and an image processor, and takes no memory."""
    config = llava_config(read_config(flags.model_name_or_path))
    tower = build_vision_tower(flags, delay_load=True)
    record_projector(config, flags, tower)
    config.mm_vision_tower = flags.vision_tower
    for name in ("mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type"):
        setattr(config, name, getattr(flags, name))
    config.image_aspect_ratio = flags.image_aspect_ratio
    if flags.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = parse_grid_pinpoints(flags.image_grid_pinpoints)
    with torch.device("meta"):
        model: Any = llava_model_class(config)(config)
        model.get_vision_tower().vision_tower = tower.model_class(tower.config)
    return model


def check_data(flags: argparse.Namespace, model: Any) -> int:
    """Whether all records can be trained on, and a sample makes samples as in training; returns the number of both.

    A record becomes a sample with its image decoded and tokenized text; with regions, their masks become tokens.
    """
    for flag in ("data_path", "patch_data_path"):
        if (path := getattr(flags, flag, None)) and not Path(path).is_file():
            next_command = "bash scripts/prepare_data.sh --check (the miniature: bash scripts/prepare_mini.sh)"
            raise ValueError(f"--{flag} {path}: found no such file; next: {next_command}")
    tokenizer, plugin = load_tokenizer(flags, flags), None  # type: ignore[arg-type]  # a namespace has the same fields
    if hasattr(flags, "patch_data_path"):
        plugin = PatchAlignedPlugin()
        arguments = PatchArguments(**{field.name: getattr(flags, field.name) for field in fields(PatchArguments)})
        plugin.setup(arguments, tokenizer, data_path=flags.data_path)
    dataset = make_data(tokenizer, model, flags, flags, flags, plugin)["train_dataset"]  # type: ignore[arg-type]
    rows = random.Random(flags.seed).sample(range(len(dataset)), min(SAMPLE, len(dataset)))
    faults = []
    for row in rows:
        try:
            skipped = dataset[row].get("skipped")
        except ValueError as error:
            raise ValueError(
                f"{error}; the first of {len(rows)} records drawn at random that cannot be read; next: bash "
                "scripts/prepare_data.sh --check"
            ) from None
        faults += [skipped] if skipped else []
    show("data", f"{flags.data_path}: {len(dataset):,} records; {len(rows)} drawn at random were read, images and all")
    if faults:
        show("skipped", f"{len(faults)} of these, such as {faults[0]}")
    if plugin is not None:
        images, with_regions = plugin.index.coverage_of(Path(flags.data_path))
        show(
            "regions", f"{flags.patch_data_path or flags.data_path}: {with_regions:,} of {images:,} images have regions"
        )
    return len(dataset)


def checkpoint_size(flags: argparse.Namespace, model: Any) -> int:
    """Bytes of a checkpoint, estimated from the number of parameters: the weights that it holds and the optimizer."""
    every_weight = model.num_parameters()
    if flags.lora_enable:
        model = add_lora(model, flags)  # type: ignore[arg-type]
    elif flags.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    model.get_vision_tower().requires_grad_(flags.unfreeze_mm_vision_tower)
    model.get_model().mm_projector.requires_grad_(True)
    trained = model.num_parameters(only_trainable=True)
    saved = trained if flags.lora_enable or flags.tune_mm_mlp_adapter else every_weight
    # Adam keeps two moments in float32. DeepSpeed adds a float32 copy of what is trained, and its own file of it.
    width = 2 if flags.deepspeed and (flags.bf16 or flags.fp16) else 4
    return saved * width + trained * (12 + width if flags.deepspeed else 8)


def number_of_saves(flags: argparse.Namespace, steps: int) -> int:
    """How often the run saves a checkpoint."""
    every = flags.save_steps if flags.save_steps >= 1 else flags.save_steps * steps
    return 0 if flags.save_strategy == "no" else math.ceil(steps / every)


def check_room(flags: argparse.Namespace, steps: int, checkpoint: int, weights: int) -> str:
    """Whether the disk of the output folder has room for all checkpoints that lie there at once, and the weights."""
    saves = number_of_saves(flags, steps)
    kept = min(flags.save_total_limit or saves, saves) + 1  # the new one is written before the old one is removed
    needed = kept * checkpoint + weights
    folder = next(path for path in Path(flags.output_dir).resolve().parents if path.is_dir())
    free = shutil.disk_usage(folder).free
    parts = f"{size_text(needed)} for {kept} checkpoints of {size_text(checkpoint)}, and the weights"
    if needed > free:
        raise ValueError(
            f"--output_dir {flags.output_dir}: found {size_text(free)} free, expected {parts}; next: set OUTPUT_DIR to "
            "a folder on a larger disk, or SAVE_TOTAL_LIMIT=1"
        )
    return f"{parts}; {size_text(free)} are free for {flags.output_dir}"


@contextmanager
def gpu_memory(flags: argparse.Namespace) -> Iterator[dict[str, tuple[float, float]]]:
    """Yields the most memory in use and the memory of each GPU, in MiB; filled when the block ends, empty on a CPU.

    torch keeps the memory that it took, so that a sample each second misses no short peak.
    """
    most: dict[str, tuple[float, float]] = {}
    if flags.use_cpu:
        yield most
        return
    with tempfile.TemporaryFile("w+") as samples:
        command = nvidia_smi("index,memory.used,memory.total", "--loop=1")
        monitor = subprocess.Popen(command, stdout=samples)
        try:
            yield most
        finally:
            monitor.terminate()
            monitor.wait()
        samples.seek(0)
        for line in samples.read().splitlines():
            gpu, used, total = line.split(", ")
            most[gpu] = (max(float(used), most.get(gpu, (0.0, 0.0))[0]), float(total))


def train(words: Sequence[str], last_step: int, output_dir: Path, log: Path) -> tuple[list[float], float]:
    """Runs the command up to a step, where it saves; returns the seconds at which steps ended, and at which it did."""
    command = [*words, "--output_dir", str(output_dir), "--max_steps", str(last_step)]
    command += ["--save_strategy", "steps", "--save_steps", str(last_step), "--save_total_limit", "1"]
    if "--cache_features" in words:
        command += ["--cache_features", ""]  # filling it may take hours
    if "--patch_warmup_steps" in words:
        command += ["--patch_warmup_steps", str(min(WARMUP_STEPS, int(words[words.index("--patch_warmup_steps") + 1])))]
    command += ["--logging_strategy", "steps", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True"]
    start, ends = time.monotonic(), []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with log.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                if STEP_LINE.match(line):
                    ends.append(time.monotonic() - start)
        process.wait()
    finally:
        if process.poll() is None:  # Ctrl-C: launchers take their processes down when they are told to end
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if process.returncode:
        raise ValueError(
            f"the command failed after {len(ends)} steps: {reason(log, process.returncode)}; output: {log}"
        )
    return ends, time.monotonic() - start


def reason(log: Path, code: int) -> str:
    """The error that ended a training, from its output, and what to do about it."""
    text = log.read_text(encoding="utf-8")
    if "out of memory" in text:
        return "a GPU ran out of memory; next: halve PER_DEVICE_TRAIN_BATCH_SIZE, or set GPU=24g"
    errors = re.findall(r"^(?:\[rank\d+\]: )?((?:error|[\w.]*(?:Error|Exception)): \S.*)", text, re.MULTILINE)
    own = [error for error in errors if "CalledProcessError" not in error and "ChildFailedError" not in error]
    if own:
        return own[-1].removeprefix("error: ")
    return (
        f"exit code {code} without a Python error (-9: killed, mostly for want of main memory); next: read the output"
    )


def losses(output_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of all that a run logged, over restarts."""
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run_steps(words: Sequence[str], flags: argparse.Namespace, steps: int) -> None:
    """Trains to a step, resumes from the checkpoint, and reports what the whole run will take."""
    real = Path(flags.output_dir)
    real.parent.mkdir(parents=True, exist_ok=True)
    log = real.with_name(f"{real.name}.preflight.log")
    log.unlink(missing_ok=True)
    show("training", f"steps 1 to {SAVED_STEP}, saved; then to {LAST_STEP} from the checkpoint; output: {log}")
    with tempfile.TemporaryDirectory(prefix=f"{real.name}.preflight-", dir=real.resolve().parent) as temporary:
        output_dir = Path(temporary)
        with gpu_memory(flags) as memory:
            first, first_end = train(words, SAVED_STEP, output_dir, log)
            first = first[-SAVED_STEP:]  # without those of a warm-up
            before = losses(output_dir)
            checkpoint = size_of(output_dir / f"checkpoint-{SAVED_STEP}")
            weights = size_of(output_dir) - checkpoint
            second, _ = train(words, LAST_STEP, output_dir, log)
        after = losses(output_dir)
    is_continued = [step for step, _ in after] == list(range(1, LAST_STEP + 1)) and after[:SAVED_STEP] == before
    if not is_continued or len(second) != LAST_STEP - SAVED_STEP:
        raise ValueError(
            f"resuming: found {len(second)} steps run and steps {[step for step, _ in after]} in trainer_state.json, "
            f"expected steps {SAVED_STEP + 1} to {LAST_STEP} behind those of the checkpoint; next: read {log}"
        )
    log.unlink()
    show("losses", " ".join(f"{loss:.3f}" for _, loss in after) + f" (resumed after step {SAVED_STEP})")
    if flags.use_cpu:  # kilobytes, of the largest process
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        show("memory", f"{size_text(peak)} of main memory a process")
    for gpu, (used, total) in memory.items():
        show("memory", f"GPU {gpu}: {used / 1024:.1f} of {total / 1024:.1f} GiB")

    # The first step of a process warms up: kernels are chosen, memory is taken.
    seconds = statistics.median([end - begin for ends in (first, second) for begin, end in pairwise(ends)])
    saving = first_end - first[-1]
    show("speed", f"{seconds:.2f} s a step; {first[0]:.0f} s up to the first, {saving:.0f} s to save and end")
    if done := last_complete_checkpoint(real):
        show("resumes", f"the run continues from {done}; to start over, set OUTPUT_DIR to a new folder")
    show("disk", check_room(flags, steps, checkpoint, weights))
    whole = first[0] + steps * seconds + number_of_saves(flags, steps) * saving
    show("whole run", f"{steps:,} steps in {timedelta(seconds=round(whole))} (hours:minutes:seconds)")


def main(words: Sequence[str]) -> int:
    """Runs all checks and the steps; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up as after Ctrl-C
    try:
        flags, processes = read_command(words)
        show("GPUs", check_gpus(flags, processes))
        show("versions", check_versions(flags))
        here = argparse.Namespace(**vars(flags) | {"output_dir": None})  # the checks leave no list of skipped samples
        for flag in ("model_name_or_path", "vision_tower"):
            setattr(here, flag, weights_folder(flag, getattr(flags, flag), flags.cache_dir))
        if (projector := flags.pretrain_mm_mlp_adapter) and not Path(projector).is_file():
            raise ValueError(
                f"--pretrain_mm_mlp_adapter {projector}: found no such file, expected the projector of stage 1; next: "
                "bash scripts/v1_5/pretrain_patchaligned.sh (STAGE1=captions: pretrain.sh)"
            )
        model = model_without_weights(here)
        show("weights", f"{flags.model_name_or_path} and {flags.vision_tower}: {model.num_parameters():,} parameters")
        steps = steps_of_whole_run(flags, check_data(here, model), processes)
        show("disk", f"about {check_room(flags, steps, checkpoint_size(flags, model), 0)}")
        run_steps(words, flags, steps)
    except (OSError, ValueError) as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print("Everything is ready.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
