"""`inspect` and `coverage` say where tokens look, from folders without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaConfig
from typer.testing import CliRunner

from patch_aligned.analysis.places import coverage_of_models, inspect_model
from patch_aligned.cli import app
from tests.patch_aligned.analysis.conftest import rectangle
from tests.patch_aligned.models.families import FAMILIES


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], str]:
    """Writes config and processor of a family, and no weights."""

    def write(name: str) -> str:
        path = tmp_path / name
        FAMILIES[name].make_config().save_pretrained(path)
        FAMILIES[name].make_processor().save_pretrained(path)
        return str(path)

    return write


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "smolvlm"])
def test_inspect_describes_and_checks_a_model_without_weights(folder: Callable, name: str, tmp_path: Path):
    picture, image = tmp_path / "cells.png", tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(image)
    done = CliRunner().invoke(app, ["inspect", folder(name), "--image", str(image), "--output", str(picture)])
    assert done.exit_code == 0, done.output
    found = inspect_model(str(tmp_path / name), (160, 90))
    assert found.check.passed
    for said in (name, FAMILIES[name].images, *found.projector, f"{found.layout.length} of an image of 160 x 90"):
        assert said in done.output
    assert Image.open(picture).width > 160


def test_inspect_refuses_a_size_that_is_none_and_a_model_that_reads_no_images(folder: Callable, tmp_path: Path):
    done = CliRunner().invoke(app, ["inspect", folder("qwen3_vl"), "--size", "640"])
    assert done.exit_code == 2
    assert "--size 640" in done.output
    LlamaConfig().save_pretrained(tmp_path / "llama")
    FAMILIES["qwen3_vl"].make_processor().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="'llama': found no image_token_id"):
        inspect_model(str(tmp_path / "llama"), (640, 480))


def test_a_folder_that_is_not_there_is_named_and_not_sought_on_the_hub(tmp_path: Path, write_pad: Callable):
    place = str(tmp_path / "nothing")
    for ask in (lambda: inspect_model(place, (640, 480)), lambda: coverage_of_models([place], write_pad())):
        with pytest.raises(FileNotFoundError, match=r"nothing: found no such folder; expected a model's folder"):
            ask()


def test_coverage_counts_the_regions_that_keep_a_token(folder: Callable, write_pad: Callable):
    """Images of 80 x 56: a cell of Qwen2-VL takes 27 x 28 pixels, so the cat keeps no token."""
    pad = write_pad(
        [rectangle(0, 0, 40, 28, "dog"), rectangle(2, 2, 12, 12, "cat")], [rectangle(40, 28, 80, 56, "car")]
    )
    qwen, internvl = folder("qwen2_vl"), folder("internvl")
    shares = coverage_of_models([qwen, internvl], pad)
    assert shares.loc[(qwen, "whole"), "all"] == pytest.approx(2 / 3)
    assert shares.loc[(internvl, "tiles"), "all"] == 1
    assert shares.loc[(internvl, "any"), "all"] == 1
    done = CliRunner().invoke(app, ["coverage", qwen, internvl, "--data", str(pad)])
    assert done.exit_code == 0, done.output
    assert "0.667" in done.output
