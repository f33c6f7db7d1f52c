"""Fetching models: what is there stays, what is wrong goes, what can't be had is listed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

from patch_aligned.annotate import fetch as models
from patch_aligned.annotate.fetch import (
    PinnedFile,
    checkpoint_folder,
    fetch_models,
    file_hashes,
    identity_of,
    revision_of,
)
from patch_aligned.cli import app

COMMIT = "0123abc"
DETECTOR = {"someone/detector": "v1"}


def pinned(content: bytes = b"weights") -> PinnedFile:
    return PinnedFile("ram.pth", "https://hub/ram.pth", hashlib.sha256(content).hexdigest(), "someone/ram")


class Hub:
    """Stands in for the hub: counts downloads and remembers revisions."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.content = b"weights"
        self.calls: list[Any] = []

    def hf_hub_download(self, repository: str, name: str, *, local_dir: Path) -> str:
        self.calls.append(name)
        (local_dir / name).write_bytes(self.content)
        return str(local_dir / name)

    def snapshot_download(self, repository: str, *, revision: str, local_dir: Path | None = None, **_: Any) -> str:
        self.calls.append((repository, revision))
        folder = local_dir or self.cache / COMMIT
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors", "README.md"):
            (folder / name).write_text(name)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(models, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(models, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("Cannot reach the hub.\nMore lines.")

    monkeypatch.setattr(models, "hf_hub_download", unreachable)
    monkeypatch.setattr(models, "snapshot_download", unreachable)
    monkeypatch.setattr(models.urllib.request, "urlopen", unreachable)


def test_files_are_fetched_once_and_checkpoints_by_their_commit(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "models"
    fetch_models(output, [pinned()], DETECTOR)
    assert hub.calls == ["ram.pth", ("someone/detector", "v1"), ("someone/detector", COMMIT)]
    fetched = json.loads((output / "detector" / "fetched.json").read_text())
    assert (fetched["commit"], fetched["files_sha256"]) == (COMMIT, file_hashes(output / "detector"))
    assert set(fetched["files_sha256"]) == {"config.json", "model.safetensors"}
    fetch_models(output, [pinned()], DETECTOR)
    assert len(hub.calls) == 3


def test_revisions_are_pinned_where_none_is_asked_for() -> None:
    assert re.fullmatch("[0-9a-f]{40}", revision_of("facebook/sam-vit-huge", None))
    assert revision_of("facebook/sam-vit-huge", "main") == "main"
    assert revision_of("someone/sam", None) == "main"


def test_settings_name_the_commit_so_that_another_one_is_another_run(hub: Hub, tmp_path: Path) -> None:
    fetch_models(tmp_path, [], DETECTOR)
    folder = tmp_path / "detector"
    hashes = file_hashes(folder)
    assert identity_of(str(folder), folder) == {"model": "detector", "revision": COMMIT, "files_sha256": hashes}
    (folder / "fetched.json").unlink()
    assert identity_of(str(folder), folder)["revision"] is None
    from_cache = checkpoint_folder("someone/detector", "v1", "--detector")
    assert identity_of("someone/detector", from_cache)["revision"] == COMMIT


def test_files_of_ones_own_are_named_and_stay(hub: Hub, tmp_path: Path) -> None:
    fetch_models(tmp_path, [pinned()], DETECTOR)
    own = {tmp_path / "ram.pth": b"weigh", tmp_path / "detector" / "model.safetensors": b"trained on"}
    for path, content in own.items():
        path.write_bytes(content)
    for revision in ("v1", "v2"):
        with pytest.raises(ValueError, match=r"ram.pth: found sha256 (.|\n)*found model.safetensors changed"):
            fetch_models(tmp_path, [pinned()], {"someone/detector": revision})
        assert own == {path: path.read_bytes() for path in own}
    (tmp_path / "detector" / "model.safetensors").unlink()
    fetch_models(tmp_path, [], {"someone/detector": "v2"})
    assert ("someone/detector", "v2") in hub.calls


def test_a_file_with_another_hash_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.content = b"something else"
    with pytest.raises(ValueError, match=r"ram.pth: found sha256 .*, expected "):
        fetch_models(tmp_path, [pinned()], {})
    assert not (tmp_path / "ram.pth").exists()


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_command_says_which_file_belongs_where(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["models", "fetch", "--output", str(tmp_path)])
    assert result.exit_code == 2
    for name in ("ram_swin_large_14m.pth", "ram_tag_list.txt", "ram_tag_list_threshold.txt"):
        assert f"-> {tmp_path / name}   (sha256 " in result.output
    for name in ("grounding-dino-tiny", "sam-vit-huge"):
        assert f"-> {tmp_path / name}/" in result.output
    assert len(re.findall(r"https://huggingface.co/\S+/tree/[0-9a-f]{40} ", result.output)) == 2
    assert "Cannot reach the hub." in result.output
    assert "More lines" not in result.output


@pytest.mark.usefixtures("offline")
def test_files_that_were_put_there_by_hand_are_taken(tmp_path: Path) -> None:
    (tmp_path / "ram.pth").write_bytes(b"weights")
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "config.json").touch()
    with pytest.raises(ValueError, match="someone/detector: Cannot reach the hub"):
        fetch_models(tmp_path, [pinned()], DETECTOR)  # no weights yet
    (tmp_path / "detector" / "model.safetensors").touch()
    fetch_models(tmp_path, [pinned()], DETECTOR)


def test_a_download_that_was_interrupted_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    unfinished = tmp_path / "detector" / ".cache" / "huggingface" / "download" / "0123.incomplete"
    unfinished.parent.mkdir(parents=True)
    for path in (unfinished, tmp_path / "detector" / "config.json", tmp_path / "detector" / "model-1.safetensors"):
        path.touch()
    fetch_models(tmp_path, [], DETECTOR)
    assert ("someone/detector", COMMIT) in hub.calls


@pytest.mark.usefixtures("offline")
def test_a_checkpoint_that_is_nowhere_is_refused_by_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--sam someone/sam: found no such folder, and the hub did not"):
        checkpoint_folder("someone/sam", "main", "--sam")
    with pytest.raises(ValueError, match=r"--sam .*: found no config.json in it"):
        checkpoint_folder(str(tmp_path), "main", "--sam")
