"""The command line: what it writes, how it fails, and that help costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.cli import ThresholdRule, app


def invoke(pad: Path, output: Path, **changed: str | None):
    options: dict[str, str | None] = {
        "--projector": "start=train_init/mm_projector.bin",
        "--base": "tiny-vicuna",
        "--vision-tower": "tiny-clip",
        "--data": str(pad),
        "--image-folder": str(pad.parent / "pictures"),
        "--output": str(output),
    }
    options |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    return CliRunner().invoke(app, ["measure", "--projector", "random=random:3", *words])


def test_measure_writes_numbers_table_and_picture(golden_world: Path, pad: Path, tmp_path: Path):
    output = tmp_path / "out"
    result = invoke(pad, output, threshold_rule="otsu", picture_rows="2")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == ["localisation.png", "measures.json", "measures.md"]
    document = json.loads((output / "measures.json").read_text())
    assert list(document["projectors"]) == ["random", "start"]
    assert document["settings"]["threshold_rule"] == "otsu"
    assert document["settings"]["image_aspect_ratio"] == "square"
    assert len(document["picture"]) == 2
    assert "start" in result.output


def test_without_pictures_none_is_written(golden_world: Path, pad: Path, tmp_path: Path):
    assert invoke(pad, tmp_path / "out", picture_rows="0").exit_code == 0
    assert not (tmp_path / "out" / "localisation.png").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projector": "start=nowhere"}, "there is no nowhere"),
        ({"projector": "train_init"}, "expected NAME=PATH"),
        ({"vision_tower": None}, "pass --vision-tower PATH"),
        ({"data": "missing.json"}, "--data missing.json: there is no such file"),
        ({"image_folder": "missing"}, "--image-folder missing: there is no such folder"),
        ({"region_kind": "object", "limit": "1"}, "no regions of kind 'object'"),
        ({"base": "images"}, "No weights at images: expected model.safetensors"),
        ({"device": "cuda:9"}, "--device"),
    ],
)
def test_wrong_input_ends_with_a_sentence_and_code_2(
    golden_world: Path, pad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke(pad, tmp_path / "out", **changed)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_comes_from(golden_world: Path, pad: Path, tmp_path: Path):
    words = ["--debug", "measure", "--projector", "a=nowhere", "--base", "b", "--data", "d", "--image-folder", "i"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, FileNotFoundError)


def test_the_choices_of_the_command_are_the_rules_there_are():
    assert [rule.value for rule in ThresholdRule] == list(THRESHOLD_RULES)


def test_help_names_every_command_without_importing_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from patch_aligned.cli import app; "
        "print(CliRunner().invoke(app, ['--help']).output); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "measure" in result.stdout
