"""Tiny random models, scenes whose regions are known, and a run over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.options import ModelOptions, Selection, Workload
from patch_aligned.annotate.pipeline import Stages
from patch_aligned.annotate.run import AnnotationJob, ShardWorker
from patch_aligned.annotate.stages import build_stages

SCENES = 20


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RAM, Grounding DINO and SAM with random weights, as files."""
    from playground.mini.annotation_models import write_models

    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def models(tiny_models: Path) -> ModelOptions:
    """The options of the tiny models."""
    from playground.mini.annotation_models import options_of

    return options_of(tiny_models)


@pytest.fixture(scope="session")
def build(models: ModelOptions) -> Callable[[str], Stages]:
    """Builds the tiny models on a device, with a threshold that some of their boxes pass."""
    return partial(build_stages, models, Selection(box_threshold=0.99))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of two sizes below `images`, with `train.json` and `pad.json` for them."""
    from playground.mini.scene_records import DatasetSettings, write_scene

    folder = tmp_path_factory.mktemp("scenes")
    records: dict[str, list[dict[str, Any]]] = {"train": [], "pad": []}
    for size in ((96, 64), (64, 80)):
        settings = DatasetSettings(count=SCENES // 2, seed=size[0], size_wh=size)
        for index in range(settings.count):
            written = write_scene(settings, index, folder)
            for name, all_records in records.items():
                all_records += written[name]
    for name, all_records in records.items():
        (folder / f"{name}.json").write_text(json.dumps(all_records))
    return folder


@pytest.fixture(scope="session")
def finished_run(build: Callable[[str], Stages], scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one process that was never interrupted: five shards of four images."""
    entries, folder = list_images(scenes / "train.json", scenes)
    job = AnnotationJob(entries, folder, tmp_path_factory.mktemp("run"), build, Workload(decode_workers=2), 4)
    # One thread, as the processes that are compared with it have: on some CPUs sums of two round otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        worker = ShardWorker(job, "cpu")
        worker.load()
        for shard in range(worker.folder.num_shards):
            worker.process(shard)
    finally:
        torch.set_num_threads(threads)
    return job.output


@pytest.fixture
def annotate_arguments(models: ModelOptions, scenes: Path) -> Callable[[Path], list[str]]:
    """Arguments of `patch-aligned` that repeat `finished_run` into another folder."""
    return lambda output: [
        "annotate", "--images", str(scenes / "train.json"), "--image_folder", str(scenes), "--output", str(output),
        "--ram", str(models.ram), "--ram_tag_list", str(models.ram_tag_list),
        "--ram_thresholds", str(models.ram_thresholds), "--detector", models.detector, "--sam", models.sam,
        "--box_threshold", "0.99", "--shard_size", "4", "--decode_workers", "2",
    ]  # fmt: skip


def deciding_files(output: Path) -> dict[str, bytes]:
    """Content of all files of a run's folder but its record and logs, by path."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.parent.name != "logs" and path.name != "run.json"
    }
