"""Shipped tasks are pointed at local files by a generated YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from eval.shipped_tasks import shipped_tasks_folder, write_local_task

pytest.importorskip("lmms_eval")


def test_the_yaml_includes_the_shipped_task_and_names_the_local_rows(tmp_path: Path) -> None:
    rows = tmp_path / "gqa.parquet"
    rows.touch()
    target = write_local_task(tmp_path / "tasks", "gqa/gqa.yaml", "local_gqa", {"testdev": rows}, process_docs=None)
    assert target == tmp_path / "tasks" / "local_gqa.yaml"
    assert yaml.safe_load(target.read_text()) == {
        "include": str(shipped_tasks_folder() / "gqa" / "gqa.yaml"),
        "task": "local_gqa",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"testdev": str(rows)}},
        "process_docs": None,
    }


def test_a_mistyped_task_lists_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ships no gqa/gqo.yaml .*gqa.yaml"):
        write_local_task(tmp_path, "gqa/gqo.yaml", "local_gqa", {})


def test_missing_rows_name_task_split_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task local_gqa, split testdev: found no file .*gqa.parquet"):
        write_local_task(tmp_path, "gqa/gqa.yaml", "local_gqa", {"testdev": tmp_path / "gqa.parquet"})
    assert not (tmp_path / "local_gqa.yaml").exists()
