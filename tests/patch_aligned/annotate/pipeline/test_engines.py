"""However many processes annotate, and however they end: the same files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from patch_aligned.annotate import run as engines
from patch_aligned.annotate.folder import RunFolder
from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.options import ModelOptions, Selection, Workload
from patch_aligned.annotate.pipeline import Stages
from patch_aligned.annotate.run import AnnotationJob, Rank, rank_of, run_with_ray
from patch_aligned.annotate.stages import build_stages
from patch_aligned.cli import app
from tests.patch_aligned.annotate.pipeline.conftest import deciding_files

ROOT = Path(__file__).parents[4]
PATIENCE_SECONDS = 300

Files = Callable[[Path], dict[str, bytes]]
Arguments = Callable[[Path], list[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `patch-aligned` with arguments and variables; what still runs when the test ends is killed."""
    processes: list[subprocess.Popen[str]] = []

    def run(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "patch_aligned.cli", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    return output


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    start: Start, annotate_arguments: Arguments, finished_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(annotate_arguments(output))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list(output.glob("shards/*.gz")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    folder = RunFolder(output)
    done = set(range(folder.num_shards)) - set(folder.missing_shards())
    assert 0 < len(done) < folder.num_shards  # or nothing was interrupted
    # As if the kill had come while files were written: one that is half there, and one beside its place.
    first = folder.shard_path(min(done))
    first.write_bytes(first.read_bytes()[:-100])
    half = folder.shard_path(max(folder.missing_shards()))
    left_behind = half.with_name(f".{half.name}.0123.tmp")
    left_behind.write_bytes(b"half")
    two_hours_ago = time.time() - 7200  # a younger one may be another process's
    os.utime(left_behind, (two_hours_ago, two_hours_ago))

    resumed = CliRunner().invoke(app, annotate_arguments(output))
    assert resumed.exit_code == 0, resumed.output
    left = folder.num_shards - len(done) + 1
    assert f"{left} shards are left for this process" in resumed.output.replace("\n", " ")
    assert deciding_files(output) == deciding_files(finished_run)


def test_two_processes_give_what_one_gives(
    start: Start, annotate_arguments: Arguments, finished_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = [*annotate_arguments(output), "--engine", "torchrun"]
    processes = [start(arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [finish(process).replace("\n", " ") for process in processes]
    assert "3 shards are left for this process (rank 0)" in said[0]
    assert "2 shards are left for this process (rank 1)" in said[1]
    assert deciding_files(output) == deciding_files(finished_run)
    assert sorted(path.name for path in (output / "logs").iterdir()) == ["rank-00000.jsonl", "rank-00001.jsonl"]


class Silent:
    def opened(self, folder: RunFolder, todo: object) -> None:
        self.todo = todo

    def image_done(self) -> None:
        pass

    def finished(self, header: object, times: object) -> None:
        pass


def test_rays_actors_give_what_one_process_gives(
    models: ModelOptions,
    build: Callable[[str], Stages],
    scenes: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray", reason="ray is part of the extra `annotate`")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or actors wait for all other tests
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
    try:
        entries, images = list_images(scenes / "train.json", scenes)
        job = AnnotationJob(entries, images, tmp_path / "run", build, Workload(decode_workers=2), 4)
        watcher = Silent()
        run_with_ray(job, 2, "cpu", watcher)
        assert watcher.todo == [0, 1, 2, 3, 4]
        assert deciding_files(job.output) == deciding_files(finished_run)
        run_with_ray(job, 1, "cpu", watcher)
        assert watcher.todo == []
        no_ram = partial(build_stages, replace(models, ram=tmp_path / "no.pth"), Selection())
        broken = replace(job, build=no_ram, output=tmp_path / "other")
        with pytest.raises(ValueError, match=r"^\S*no.pth: found no such file") as refused:
            run_with_ray(broken, 1, "cpu", watcher)
        assert "Traceback" not in str(refused.value)
    finally:
        ray.shutdown()


class RayError(Exception):
    """Ray's own, where it isn't installed."""


class RayTaskError(RayError):
    """What an actor raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"Traceback of the actor: {cause!r}")
        self.cause = cause


@pytest.fixture
def stub_ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A cluster of two GPUs, in Ray's place. What `outcome` holds is raised once an actor is asked for."""
    ray = SimpleNamespace(gpus=2, outcome=None, is_initialized=lambda: True, put=lambda job: job)
    ray.cluster_resources = lambda: {"GPU": float(ray.gpus)}

    def remote(**_: object) -> object:
        raise ray.outcome

    ray.remote = remote
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(ActorPool=None))
    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(RayTaskError=RayTaskError, RayError=RayError))
    return ray


@pytest.fixture
def nothing(tmp_path: Path) -> AnnotationJob:
    return AnnotationJob([], tmp_path, tmp_path, lambda device: pytest.fail("nothing to load"), Workload())


def test_more_of_rays_actors_than_gpus_are_refused_as_they_would_wait_for_ever(
    stub_ray: SimpleNamespace, nothing: AnnotationJob
) -> None:
    with pytest.raises(ValueError, match="--ray_workers 3: found 2 GPUs"):
        run_with_ray(nothing, 3, "auto", Silent())


def test_a_device_that_ray_cannot_give_is_refused(stub_ray: SimpleNamespace, nothing: AnnotationJob) -> None:
    with pytest.raises(ValueError, match="--device cuda:1: found 2 GPUs in the cluster, of which Ray gives each"):
        run_with_ray(nothing, 1, "cuda:1", Silent())
    stub_ray.gpus = 0
    with pytest.raises(ValueError, match="--device cuda: found 0 GPUs in the cluster"):
        run_with_ray(nothing, 1, "cuda", Silent())


def test_an_actor_that_dies_again_and_again_ends_the_run_with_what_to_do(
    stub_ray: SimpleNamespace, nothing: AnnotationJob
) -> None:
    stub_ray.outcome = RayError("The actor died unexpectedly.\nMuch more.")
    with pytest.raises(
        ValueError, match=r"\(The actor died unexpectedly\.\)\. Finished shards are kept.* --ray_workers"
    ):
        run_with_ray(nothing, 1, "auto", Silent())


def test_wrong_input_loses_the_actors_traceback_and_a_bug_keeps_it(
    stub_ray: SimpleNamespace, nothing: AnnotationJob
) -> None:
    stub_ray.outcome = RayTaskError(OSError("no such file"))
    with pytest.raises(OSError, match=r"^no such file$"):
        run_with_ray(nothing, 1, "auto", Silent())
    stub_ray.outcome = RayTaskError(KeyError("nothing"))
    with pytest.raises(RayTaskError, match="Traceback of the actor"):
        run_with_ray(nothing, 1, "auto", Silent())


def test_ray_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, nothing: AnnotationJob) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'patch-aligned-llava\[annotate\]'"):
        run_with_ray(nothing, 1, "cpu", Silent())


def test_ranks_come_from_torchruns_variables() -> None:
    assert rank_of("local", "cpu", {}) == Rank(0, 1, "cpu")
    assert rank_of("torchrun", "cpu", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Rank(3, 4, "cpu")
    with pytest.raises(ValueError, match="each of 4 processes would do all the work"):
        rank_of("local", "cpu", {"RANK": "3", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="found WORLD_SIZE abc"):
        rank_of("local", "cpu", {"WORLD_SIZE": "abc"})
    with pytest.raises(ValueError, match="found '0' and 'abc'"):
        rank_of("torchrun", "cpu", {"RANK": "0", "WORLD_SIZE": "abc"})
    with pytest.raises(ValueError, match="LOCAL_RANK: found 'x'"):
        rank_of("torchrun", "cpu", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"})
    with pytest.raises(ValueError, match="found no RANK and WORLD_SIZE"):
        rank_of("torchrun", "cpu", {})
    with pytest.raises(ValueError, match="found '4' and '4', expected 0 to WORLD_SIZE - 1"):
        rank_of("torchrun", "cpu", {"RANK": "4", "WORLD_SIZE": "4"})


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: 8)
    assert rank_of("torchrun", "auto", {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}).device == "cuda:5"
    assert rank_of("torchrun", "cuda", {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}).device == "cuda:5"
    assert rank_of("local", "auto", {}).device == "cuda:0"
    assert rank_of("local", "cuda:3", {}).device == "cuda:3"
    with pytest.raises(ValueError, match="--device cuda:8: found 8 GPUs here, expected cuda:0 to cuda:7"):
        rank_of("local", "cuda:8", {})
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: 1)  # a Slurm array task sees its own GPU alone
    assert rank_of("torchrun", "auto", {"RANK": "13", "WORLD_SIZE": "16"}).device == "cuda:0"


def test_devices_that_are_none_or_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.torch.cuda, "is_available", lambda: False)
    assert rank_of("local", "auto", {}).device == "cpu"
    for device in ("gpu", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"--device: found '{device}', expected `auto`"):
            rank_of("local", device, {})
    with pytest.raises(ValueError, match="--device cuda:1: torch sees no CUDA device here"):
        rank_of("local", "cuda:1", {})


def test_every_shard_has_one_owner() -> None:
    class Shards:
        num_shards = 11

    owned = [Rank(rank, 4, "cpu").shards(Shards()) for rank in range(4)]  # type: ignore[arg-type]
    assert sorted(shard for shards in owned for shard in shards) == list(range(11))


def test_another_call_into_the_same_folder_is_refused_with_what_differs(
    annotate_arguments: Arguments, finished_run: Path
) -> None:
    before = deciding_files(finished_run)
    changed = [*annotate_arguments(finished_run), "--nms_iou", "0.6", "--resample", "bicubic"]
    result = CliRunner().invoke(app, changed)
    assert result.exit_code == 2
    assert "selection.nms_iou: the folder has 0.5, this call 0.6" in result.output
    assert "ram.resample: the folder has 'bilinear', this call 'bicubic'" in result.output
    assert deciding_files(finished_run) == before


def test_the_first_process_records_the_run(annotate_arguments: Arguments, finished_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished_run, output)
    RunFolder(output).shard_path(2).unlink()
    assert CliRunner().invoke(app, annotate_arguments(output)).exit_code == 0
    written = (output / "run.json").read_bytes()
    record = json.loads(written)
    assert record["sha256"] == {
        name: hashlib.sha256((output / file).read_bytes()).hexdigest()
        for name, file in {"images": "manifest.jsonl", "settings.json": "settings.json"}.items()
    }
    assert record["flags"]["box_threshold"] == 0.99 and record["sittings"][0]["ended"]
    assert CliRunner().invoke(app, annotate_arguments(output)).exit_code == 0  # nothing is left to do
    assert (output / "run.json").read_bytes() == written
    assert deciding_files(output) == deciding_files(finished_run)


def test_missing_models_are_named_before_anything_is_written(annotate_arguments: Arguments, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = annotate_arguments(output)
    arguments[arguments.index("--ram") + 1] = str(tmp_path / "no.pth")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "no.pth: found no such file; expected the weights of RAM" in result.output
    result = CliRunner().invoke(app, ["annotate", "--images", str(tmp_path), "--output", str(output)])
    assert "`patch-aligned models fetch` gets the files" in result.output
    assert not output.exists()
