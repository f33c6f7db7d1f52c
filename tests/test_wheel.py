"""The wheel is complete: installed outside the checkout, its commands run and find their templates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from patch_aligned.masks import rle_of_mask

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "llava"
PACKAGES = ("llava", "patch_aligned")

# Every command that fills a template, and which of the wheel's files were opened on the way.
RUN_COMMANDS = """
import os, shlex, sys

site, opened = os.path.realpath(sys.argv[1]), set()

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened.add(os.path.realpath(arguments[0]))

sys.addaudithook(note)
import llava, patch_aligned
from typer.testing import CliRunner
from patch_aligned.cli import app
from patch_aligned.web import render

for package in (llava, patch_aligned):
    assert os.path.realpath(package.__file__).startswith(site + os.sep), package.__file__
for line in sys.stdin:
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, (line, result.output, result.exception)
render("patch_aligned.train", "strip.html.j2", title="", columns=[], rows=[])  # in a training
for package, page in (("explore", "explore"), ("dataset", "spot_check")):  # by a server
    render(f"patch_aligned.{package}", f"{page}.html.j2", title="", data={})
print(*sorted(os.path.relpath(file, site) for file in opened if file.startswith(site + os.sep)), sep="\\n")
"""
COMMANDS = """
view pad.jsonl --image-folder images --output view.html
publish pad.jsonl --output published --no-plots
quality pad.jsonl --against pad.jsonl --image-folder images --output quality
stitch --vision tiny-clip --llm tiny-vicuna --like llava --output stitched
analyze --projector start=train_init/mm_projector.bin --base tiny-vicuna --vision-tower tiny-clip \
--data pad.jsonl --image-folder images --random-init 0 --resamples 0 --token-maps 1 --output report
table 3 report --output table.html
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a wheel of what git has, or would have: no earlier build lies beside it."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is part of the extra `test`")
    source, house = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("house")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(house), str(source))
    (built,) = house.iterdir()
    return built


def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file()]


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *words, "--no-deps", "--no-index"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(site), str(wheel))
    return site


def data_files(names: list[str]) -> set[str]:
    return {name for name in names if name.split("/")[0] in PACKAGES and not name.endswith(".py")}


@pytest.mark.slow
def test_the_wheel_has_both_packages_with_all_their_files_and_nothing_of_the_checkout(wheel: Path) -> None:
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    expected = [name for name in tracked() if name.split("/")[0] in PACKAGES]
    assert sorted(name for name in packed if ".dist-info/" not in name) == sorted(expected)
    assert data_files(packed)
    assert {Path(name).name for name in packed if ".dist-info/" in name} >= {"LICENSE", "NOTICE", "entry_points.txt"}


@pytest.mark.slow
def test_installed_commands_run_outside_the_checkout_and_open_every_data_file(
    wheel: Path, site: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is part of the extra `analysis`")
    for name in ("tiny-clip", "tiny-vicuna", "train_init", "images"):
        shutil.copytree(GOLDENS / name, tmp_path / name)
    with Image.open(tmp_path / "images" / "im0.png") as image:
        size = image.size
    mask = rle_of_mask(Image.new("1", size, 1))
    label = {"tag": "dog", "bbox": [0, 0, *size], "rle_mask": mask}
    record = {"image_id": "im0.png", "size": list(size), "caption": "a dog", "labels": [label]}
    (tmp_path / "pad.jsonl").write_text(json.dumps(record) + "\n")

    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    for command in ("patch-aligned", "llava-convert"):
        words = [sys.executable, str(site / "bin" / command), "--help"]
        shown = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert "Usage" in shown.stdout
    result = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, str(site)], input=COMMANDS.strip(),
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    opened = {Path(name).as_posix() for name in result.stdout.splitlines()}
    assert data_files(zipfile.ZipFile(wheel).namelist()) <= opened
