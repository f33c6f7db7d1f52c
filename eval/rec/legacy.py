"""The tasks that lmms-eval ships for these data sets, by which the paper's Table 5 was made.

They differ from the `rec_*` tasks in three ways, and each changes the scores: a long prompt that LLaVA was never
trained on, boxes read in the image's own frame, and, for RefCOCO and RefCOCOg `val`, rows of two split definitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eval.shipped_tasks import write_local_task

LEGACY_SPLITS: Mapping[str, tuple[str, str]] = {
    "legacy_refcoco_val": ("refcoco", "val"),
    "legacy_refcoco_testA": ("refcoco", "testA"),
    "legacy_refcoco_testB": ("refcoco", "testB"),
    "legacy_refcoco_plus_val": ("refcoco+", "val"),
    "legacy_refcoco_plus_testA": ("refcoco+", "testA"),
    "legacy_refcoco_plus_testB": ("refcoco+", "testB"),
    "legacy_refcocog_val": ("refcocog", "val"),
    "legacy_refcocog_test": ("refcocog", "test"),
}
"""Benchmark -> folder of lmms-eval's tasks, and split."""
HEADLINE = "refcoco_ACC@0.5"


def shipped_yaml(name: str) -> str:
    """The shipped task's file below lmms-eval's `tasks`."""
    dataset, split = LEGACY_SPLITS[name]
    return f"{dataset}/{dataset}_bbox_rec_{split}.yaml"


def write_legacy_task(folder: str | Path, name: str, parquet: str | Path) -> Path:
    """Writes the task `name` over a local copy of the hub's rows; give the folder as `include_path`.

    Args:
        folder: where the YAML goes.
        name: one of `LEGACY_SPLITS`.
        parquet: rows with the hub's columns: question_id, image, answer (all expressions), bbox [x, y, width, height].

    Raises:
        KeyError: no such benchmark.
        FileNotFoundError: no such file.
    """
    return write_local_task(folder, shipped_yaml(name), name, {LEGACY_SPLITS[name][1]: parquet})
