"""The script that analyses: its commands parse, missing projectors are named, and the order is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import check_order
from tests.scripts.shell import ROOT, options_of, printed, run_script

SCRIPT = "v1_5/analyze.sh"


def test_the_miniature_takes_the_projectors_of_the_quickstart() -> None:
    analyze, check = printed(SCRIPT, PRESET="mini")
    options = options_of(analyze)
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert "RUN=${RUN:-runs/quickstart}" in quickstart
    assert options["projector"] == [
        "random=random:0", "captions=runs/quickstart/captions", "patch_aligned=runs/quickstart/patch_aligned",
    ]  # fmt: skip
    assert (options["device"], options["limit"]) == ("cpu", None)
    assert check[2:] == [str(options["output"] / "analysis.json"), "random", "captions", "patch_aligned"]


def test_the_full_preset_takes_stage_1s_outputs_and_100_images_of_coco() -> None:
    options = options_of(printed(SCRIPT, "--projector", "finetuned=checkpoints/x")[0])
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
    result = run_script(SCRIPT, DRY_RUN="", PRESET="mini", RUN=str(tmp_path))
    assert result.returncode == 1
    assert f"no file {tmp_path}/captions; next: RUN={tmp_path} bash scripts/quickstart.sh" in result.stderr
    assert "unknown PRESET=big" in run_script(SCRIPT, PRESET="big").stderr


@pytest.mark.parametrize(("cosine", "verdict"), [(0.6, "holds"), (0.05, "does not hold"), (None, "does not hold")])
def test_the_order_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cosine: float | None, verdict: str
) -> None:
    values = {"a": (0.1, 0.0), "b": (0.2, 0.1), "c": (0.3, cosine)}
    models = {
        name: {"figures": {"align_px": {"value": align}, "cosine": {"value": near}}}
        for name, (align, near) in values.items()
    }
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"models": models}))
    check_order.main(str(path), "a", "b", "c")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "align_px: a 0.100 < b 0.200 < c 0.300: holds"
    assert lines[1].endswith(f": {verdict}")
    with pytest.raises(ValueError, match="no projector 'd'"):
        check_order.main(str(path), "a", "d")
