"""Data sets are fetched once, from the commit that the lock file names, and are there without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from eval.benchmarks import BENCHMARKS, HubData
from eval.hub import Lock
from tests.eval.hub_server import COMMIT, serve

ROOT = Path(__file__).parents[2]
SET = "lmms-lab-encoder/MME"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A hub with two splits of one data set."""
    for split, rows in (("test", 4), ("train", 2)):
        file = tmp_path / "hub" / SET / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"question": [f"{split} {row}" for row in range(rows)]}).to_parquet(file)
    with serve(tmp_path / "hub") as address:
        yield address


@pytest.fixture
def prefetch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command with a cache and a lock file of its own."""

    def run(benchmarks: str, address: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": str(int(offline)),
                       "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}  # fmt: skip
        command = [sys.executable, "-m", "eval.prefetch", "--benchmarks", benchmarks]
        return subprocess.run(
            [*command, "--lock", str(tmp_path / "lock.json")],
            cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    return run


def test_what_was_fetched_is_there_without_a_network(
    hub: str, prefetch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    online = prefetch("mme", hub)
    assert online.returncode == 0, online.stderr
    assert f"mme: {SET} at {COMMIT[:12]}, 4 rows; 2374 were published" in online.stdout
    lock = json.loads((tmp_path / "lock.json").read_text())
    assert lock == {SET: {"revision": COMMIT, "files": {"default/test": ["data/test-00000-of-00001.parquet"]}}}
    assert not list((tmp_path / "home").rglob("train-*"))  # a split that was not asked for

    offline = prefetch("mme", "http://127.0.0.1:9", offline=True)
    assert (offline.returncode, offline.stdout) == (0, online.stdout), offline.stderr
    elsewhere = prefetch("mme,pope", "http://127.0.0.1:9", offline=True)
    assert elsewhere.returncode == 2
    assert "pope: lmms-lab-encoder/POPE is not on this machine, and there is no network" in elsewhere.stderr
    assert "next: where there is one, python -m eval.prefetch --benchmarks pope" in elsewhere.stderr


def test_runs_at_the_same_time_keep_what_each_other_wrote_down(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    first, second = Lock(path), Lock(path)
    mme, pope = BENCHMARKS["mme"].data, BENCHMARKS["pope"].data
    assert isinstance(mme, HubData)
    assert isinstance(pope, HubData)
    first.add(mme, "a" * 40, ["mme.parquet"])
    second.add(pope, "b" * 40, ["pope.parquet"])
    assert [Lock(path).find(data)[0] for data in (mme, pope)] == ["a" * 40, "b" * 40]
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock.json"]


def test_a_damaged_file_is_found(
    hub: str, prefetch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert prefetch("mme", hub).returncode == 0
    (file,) = (tmp_path / "home").rglob("test-*.parquet")
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.resolve().write_bytes(content)
    damaged = prefetch("mme", hub)
    assert damaged.returncode == 2
    assert "found SHA-256" in damaged.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "pope: lmms-lab-encoder/POPE is gone, or private"),
        (["train.parquet", ".gated"], "pope: lmms-lab-encoder/POPE is gated; next: accept its terms at https://"),
        (["train.parquet"], "pope: lmms-lab-encoder/POPE has no split 'test'; there are train"),
    ],
    ids=["gone", "gated", "split"],
)
def test_why_the_hub_does_not_give_it_is_said(
    hub: str, prefetch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, files: list[str], said: str
) -> None:
    for name in files:
        file = tmp_path / "hub" / "lmms-lab-encoder" / "POPE" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"question": ["x"]}).to_parquet(file)
    result = prefetch("pope", hub)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_network_that_is_down_is_said(prefetch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = prefetch("pope", "http://127.0.0.1:9")
    assert result.returncode == 2
    assert "pope: lmms-lab-encoder/POPE is not on this machine, and there is no network" in result.stderr
