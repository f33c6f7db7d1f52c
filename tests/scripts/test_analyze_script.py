"""The script that analyses: its commands parse, missing projectors are named, and the order is told."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from patch_aligned.cli import app

ROOT = Path(__file__).parents[2]


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/v1_5/analyze.sh", *arguments]
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def printed(*arguments: str, **environment: str) -> tuple[dict[str, Any], list[str]]:
    """Options of `patch-aligned analyze`, read by the real parser, and the words of the check."""
    result = run_script(*arguments, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    analyze, check = map(shlex.split, result.stdout.splitlines())
    assert analyze[:2] == ["patch-aligned", "analyze"]
    words = [word.replace("_", "-") if word.startswith("--") else word for word in analyze[2:]]
    command = typer.main.get_command(app).commands["analyze"]  # type: ignore[attr-defined]
    return command.make_context("analyze", words).params, check


def test_the_miniature_takes_the_projectors_of_the_quickstart() -> None:
    options, check = printed(PRESET="mini")
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert "RUN=${RUN:-runs/quickstart}" in quickstart
    assert options["projector"] == [
        "random=random:0", "captions=runs/quickstart/captions", "patch_aligned=runs/quickstart/patch_aligned",
    ]  # fmt: skip
    assert (options["device"], options["limit"]) == ("cpu", None)
    assert check[2:] == [str(options["output"] / "analysis.json"), "random", "captions", "patch_aligned"]


def test_the_full_preset_takes_stage_1s_outputs_and_100_images_of_coco() -> None:
    options, _ = printed("--projector", "finetuned=checkpoints/x")
    common = (ROOT / "scripts" / "v1_5" / "common.sh").read_text()
    assert "family=llava-v1.5-7b " in common or "family=llava-v1.5-7b\n" in common
    assert options["projector"][1:] == [
        "captions=./checkpoints/llava-v1.5-7b-pretrain",
        "patch_aligned=./checkpoints/llava-v1.5-7b-patchaligned-pretrain",
        "finetuned=checkpoints/x",
    ]
    assert (options["limit"], options["seed"], options["device"]) == (100, 0, "cuda")
    assert options["data"].name == "instances_val2017.json"


def test_missing_projectors_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    result = run_script(PRESET="mini", RUN=str(tmp_path))
    assert result.returncode == 1
    assert f"no file {tmp_path}/captions; next: RUN={tmp_path} bash scripts/quickstart.sh" in result.stderr
    assert "unknown PRESET=big" in run_script(PRESET="big").stderr


@pytest.mark.parametrize(("cosine", "verdict"), [(0.6, "holds"), (0.05, "does not hold"), (None, "does not hold")])
def test_the_order_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    load_script: Callable[[str], ModuleType],
    cosine: float | None,
    verdict: str,
) -> None:
    module = load_script("check_order")
    values = {"a": (0.1, 0.0), "b": (0.2, 0.1), "c": (0.3, cosine)}
    models = {
        name: {"figures": {"align_px": {"value": align}, "cosine": {"value": near}}}
        for name, (align, near) in values.items()
    }
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"models": models}))
    module.main(str(path), "a", "b", "c")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "align_px: a 0.100 < b 0.200 < c 0.300: holds"
    assert lines[1].endswith(f": {verdict}")
    with pytest.raises(ValueError, match="no projector 'd'"):
        module.main(str(path), "a", "d")
