"""Runs a checkout's commands and says what they left, in values that two checkouts can be compared by.

Everything here goes through what stays when the inside is rebuilt: scripts, commands, files, LLaVA's import paths. The
two exceptions are at the end: `covered_tokens` and `replay_command`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

BENCHMARKS = Path("playground/data/mini/eval")
"""Where a checkout's tasks look for the miniature's benchmarks."""
TENSOR_FILES = ("*.safetensors", "mm_projector*.bin", "non_lora_trainables.bin", "optimizer.pt", "scheduler.pt")
JSON_FILES = ("*.json", "*.jsonl")
UNSTABLE_KEYS = frozenset(
    {
        # Speed, which the part `speed` measures.
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "images_per_second",
        # Of the checkpoint's path.
        "best_model_checkpoint",
    }
)
"""Keys of JSON files that differ between two runs of one commit."""

RUN_RECORD = "run.json"
"""Commit, versions and times of a run: left out, as no two runs agree, and as the baseline has none."""


class CommandError(RuntimeError):
    """A command that was expected to succeed did not."""


@dataclass(frozen=True)
class Product:
    """A checkout, the inputs, and a folder of this record's own for what commands write."""

    tree: Path
    inputs: Path
    work: Path
    whole: bool = False

    def environment(self, **variables: str) -> dict[str, str]:
        """One thread, no network, caches of this record's own, and `tree` as the imported product."""
        passed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
        # Another's folder, so that nothing one checkout converted is read by the other.
        caches = {"HF_HOME": "huggingface", "PATCH_ALIGNED_CACHE": "patch_aligned"}
        return {
            **passed,
            **{name: str(self.work / "cache" / folder) for name, folder in caches.items()},
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",  # PEFT writes target_modules in the order of a set
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            **variables,
        }

    def run(self, *words: str | Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the checkout; `python` is this one."""
        command = [sys.executable if word == "python" else str(word) for word in words]
        done = subprocess.run(
            command, cwd=self.tree, env=self.environment(**variables), capture_output=True, text=True, check=False
        )
        if check and done.returncode != 0:
            raise CommandError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        return done

    def printed(self, script: str, *flags: str, **variables: str) -> list[list[str]]:
        """The commands that a script of scripts/v1_5 prints under DRY_RUN=1, as words."""
        done = self.run("bash", f"scripts/v1_5/{script}", *flags, DRY_RUN="1", **variables)
        return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]

    def train(self, script: str, output: str, *flags: str, check: bool = True, **variables: str) -> Path:
        """Trains tiny weights by the command that a launch script prints for PRESET=mini; returns its output folder.

        The printed command is run rather than the script, which would make the miniature's real weights first.
        """
        folder = self.work / output
        [command] = self.printed(script, *flags, **{**self.training_variables(folder), **variables})
        (self.work / "log").mkdir(exist_ok=True)
        done = self.run(*command, check=check)
        (self.work / "log" / f"{output}.txt").write_text(f"exit code {done.returncode}\n{done.stderr}")
        return folder

    def training_variables(self, output: Path) -> dict[str, str]:
        """Variables of the launch scripts: the tiny weights and the scenes."""
        return {
            "PRESET": "mini",
            "DATA": str(self.inputs),
            "MODEL_NAME_OR_PATH": str(self.inputs / "models/tiny-vicuna"),
            "VISION_TOWER": str(self.inputs / "models/tiny-clip"),
            "PRETRAIN_MM_MLP_ADAPTER": str(self.inputs / "projectors/patch_aligned/mm_projector.bin"),
            "VERSION": "v1",
            "MAX_STEPS": "20",
            "SAVE_STEPS": "10",
            "OUTPUT_DIR": str(output),
        }

    def call(self, app: str, *words: str | Path) -> tuple[int, str]:
        """A command of `patch-aligned` or `llava-convert` in this process: its exit code and what it printed."""
        from typer.testing import CliRunner

        module = __import__(
            {"patch-aligned": "patch_aligned.cli", "llava-convert": "llava.convert.cli"}[app], fromlist=["app"]
        )
        done = CliRunner().invoke(module.app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return 70, f"{type(done.exception).__name__}: {done.exception}"
        return done.exit_code, done.output

    def expect(self, app: str, *words: str | Path) -> str:
        """As `call`, for commands that have to succeed."""
        status, output = self.call(app, *words)
        if status != 0:
            raise CommandError(f"{app} {shlex.join(map(str, words))}: exit code {status}\n{output[-4000:]}")
        return output

    # ---- what was left -----------------------------------------------------------------------------------------------

    def stable(self, value: Any) -> Any:
        """`value` without the keys that no two runs share, and with the folders of this machine by name."""
        if isinstance(value, dict):
            return {self.stable(key): self.stable(item) for key, item in value.items() if key not in UNSTABLE_KEYS}
        if isinstance(value, list | tuple):
            return [self.stable(item) for item in value]
        if isinstance(value, str):
            for folder, name in ((self.work, "WORK"), (self.inputs, "INPUTS"), (self.tree, "TREE")):
                value = value.replace(str(folder), name)
        return value

    def read(self, path: Path) -> Any:
        """A JSON or JSONL file."""
        text = path.read_text(encoding="utf-8")
        lines = text.rstrip("\n").split("\n") if path.suffix == ".jsonl" and text else [text]
        values = [self.stable(json.loads(line)) for line in lines if line]
        return values if path.suffix == ".jsonl" else values[0]

    def folder(
        self, folder: Path, tensors: Sequence[str] = TENSOR_FILES, json_files: Sequence[str] = JSON_FILES
    ) -> Facts:
        """Names of all files below a folder, its tensors by hash, its JSON files by value."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RUN_RECORD)
        facts: Facts = {"files": [str(path.relative_to(folder)) for path in files], "tensors": {}, "json": {}}
        for path in files:
            name = str(path.relative_to(folder))
            if any(path.match(pattern) for pattern in tensors):
                facts["tensors"][name] = hashed_tensors(path)
            elif any(path.match(pattern) for pattern in json_files):
                if path.name != "tokenizer.json":
                    facts["json"][name] = self.read(path)
                else:
                    facts["json"][name] = sha256(path.read_bytes())
        return facts


def sha256(content: bytes) -> str:
    """Hexadecimal hash."""
    return hashlib.sha256(content).hexdigest()


def hashed_tensors(path: Path) -> dict[str, Any]:
    """Each tensor of a file as `dtype shape hash`, other values as they are."""
    import torch
    from safetensors.torch import load_file

    values: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu")
    return dict(_hashed("", values))


def _hashed(name: str, value: Any) -> Any:
    import torch

    if torch.is_tensor(value):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        yield name, f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {sha256(content)}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _hashed(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _hashed(f"{name}.{number}", item)
    else:
        yield name, value if isinstance(value, int | float | str | bool | None) else type(value).__name__


# ---- what has no command: the two places to mend when the inside moves ---------------------------------------------


def covered_tokens(
    rle_masks: Sequence[str], size_wh: tuple[int, int], view: dict[str, Any], min_coverage: float
) -> Any:
    """Which tokens each region of an image covers: bool `[R, rows * cols]`.

    At commit 2628157 the formula is `patch_aligned.patch_masks` over `llava.image_geometry`.

    Args:
        view: `mode` (crop, pad or squeeze), `side`, `grid`, and `processed_side` where patches leave pixels over.
    """
    if importlib.util.find_spec("patch_aligned.cells") is not None:
        from patch_aligned import masks
        from patch_aligned.cells import square_grid

        processed_side = view["processed_side"] or view["side"]
        grid = square_grid(
            size_wh, view["mode"], tuple(view["grid"]), processed_side, processed_side, seen_side=view["side"]
        )
        return masks.covered_tokens_of_regions(rle_masks, size_wh, grid, min_coverage)
    from llava.image_geometry import ImageGeometry
    from patch_aligned.patch_masks import covered_tokens_of_regions

    geometry = ImageGeometry(size_wh, view["side"], view["mode"], tuple(view["grid"]), None, view["processed_side"])
    return covered_tokens_of_regions(rle_masks, size_wh, geometry, min_coverage)


def replay_command(product: Product, pad: Path) -> list[str]:
    """The command that answers from a finished PAD file in the models' place; flags of `annotate` may follow.

    At commit 2628157 it is `annotate --stages oracle`; it becomes `playground/mini/replay.py`.
    """
    if (product.tree / "playground/mini/replay.py").exists():
        return ["python", "-m", "playground.mini.replay", "--pad", str(pad)]
    return ["python", "-m", "patch_aligned.cli", "annotate", "--stages", "oracle", "--oracle", str(pad)]
