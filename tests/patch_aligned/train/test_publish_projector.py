"""`patch-aligned publish-projector`: what the hub gets, and that it is a projector again when it comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

from patch_aligned.analysis import load_models
from patch_aligned.cli import app
from patch_aligned.train import publish


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the hub: repositories are folders in it. Calls must fit the real API."""
    root = tmp_path / "hub"

    def create_repo(repo_id: str, exist_ok: bool) -> None:
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        names: Iterable[str] = (path.name for path in Path(folder_path).iterdir())
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(folder_path / name, root / repo_id / name)

    api = create_autospec(HfApi, instance=True)
    api.create_repo.side_effect, api.upload_folder.side_effect = create_repo, upload_folder
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    return root


@pytest.fixture
def stage_1(run_stage_1: Callable[..., tuple[Any, Any]]) -> Path:
    """The output of one step of training, in a folder below the working directory."""
    run_stage_1(["im0.png", "im1.png"], "--max_steps 1")
    return Path("run")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["publish-projector", *words])


def test_what_is_uploaded_loads_again_and_tells_what_it_was_trained_on(stage_1: Path, hub: Path) -> None:
    result = run("run", "--repo", "me/projector")
    assert result.exit_code == 0, result.output
    published = hub / "me" / "projector"
    assert {path.name for path in published.iterdir()} == {"README.md", "config.json", "mm_projector.bin"}
    one, other = load_models(["here=run", f"there={published}"], "tiny-vicuna")
    assert torch.equal(*(model.projector.state_dict()["weight"] for model in (one, other)))
    card = ModelCard.load(published / "README.md")
    assert card.data.base_model == "tiny-vicuna"
    log = json.loads((stage_1 / "trainer_state.json").read_text())["log_history"]
    loss = next(line["loss/patch"] for line in log if "loss/patch" in line)
    for expected in (
        "captions and the patch loss", "--model-path me/projector --model-base tiny-vicuna", "| patch_beta_end | 5.0 |",
        "| data_path | pad.json |", f"| loss/patch | {loss} |", "| global_batch_size | 2 |",
    ):  # fmt: skip
        assert expected in card.text
    assert str(Path.cwd()) not in card.content


def test_without_a_repository_the_card_alone_is_written_and_may_be_edited(stage_1: Path, hub: Path) -> None:
    record = json.loads((stage_1 / "run.json").read_text())
    of_captions = {name: value for name, value in record["flags"].items() if not name.startswith("patch_")}
    of_captions["data_path"] = str((stage_1 / "config.json").resolve())
    (stage_1 / "run.json").write_text(json.dumps(record | {"flags": of_captions}))
    assert "README.md, then pass --repo" in run("run").output
    assert not hub.exists()
    card = stage_1 / "README.md"
    assert "stage 1 by captions\n" in card.read_text() and "| data_path | config.json |" in card.read_text()
    card.write_text("mine")
    assert run("run", "--repo", "me/p").exit_code == 0
    assert (hub / "me" / "p" / "README.md").read_text() == "mine"


def test_a_folder_that_is_no_stage_1_is_refused(golden_world: Path, hub: Path) -> None:
    for folder in ("images", "train_init"):  # nothing, and a projector without its record
        result = run(folder, "--repo", "me/p")
        assert result.exit_code == 2 and f"{folder}: found no run.json" in result.output
    assert not hub.exists() and not Path("train_init/README.md").exists()
