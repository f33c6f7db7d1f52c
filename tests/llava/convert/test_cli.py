"""The command `llava-convert`."""

from __future__ import annotations

import shutil
from pathlib import Path

from typer.testing import CliRunner

from llava.convert.cli import app


def test_there_and_back_says_what_was_written_and_what_is_next(golden_world: Path) -> None:
    result = CliRunner().invoke(app, ["to-hf", "tiny-llava", "hf"])
    assert result.exit_code == 0, result.output
    assert "Wrote hf: 11 files" in result.output
    result = CliRunner().invoke(app, ["from-hf", "hf", "back", "--image-aspect-ratio", "square"])
    assert result.exit_code == 0, result.output
    assert "Next: python -m llava.serve.cli --model-path back" in result.output


def test_wrong_input_ends_with_one_sentence_and_code_2(golden_world: Path) -> None:
    result = CliRunner().invoke(app, ["to-hf", "tiny-vicuna", "hf"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: The checkpoint is not a LLaVA")
    result = CliRunner().invoke(app, ["to-hf", "tiny-llava", "hf", "--conv-mode", "v9"])
    assert result.exit_code == 2
    assert "--conv-mode v9: no such template" in result.output
    result = CliRunner().invoke(app, ["to-hf", "tiny-llava", "hf", "--max-shard-size", "5"])
    assert result.exit_code == 2
    assert "found '5', expected a size such as" in result.output


def test_hints_can_be_followed(golden_world: Path, goldens: Path) -> None:
    Path("runs").mkdir()
    shutil.copytree(goldens / "ckpt_stage1", "runs/stage1")
    result = CliRunner().invoke(app, ["to-hf", "runs", "hf"])
    assert result.exit_code == 2 and "runs/stage1/config.json" in result.output
    result = CliRunner().invoke(app, ["to-hf", "runs/stage1", "hf"])
    assert result.exit_code == 2 and "--base" in result.output and "--model-base" not in result.output
    result = CliRunner().invoke(app, ["to-hf", "runs/stage1", "hf", "--base", "tiny-vicuna", "--conv-mode", "plain"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["from-hf", "hf", "back"])
    assert result.exit_code == 0 and "llava.eval.run_llava --model-path back" in result.output
