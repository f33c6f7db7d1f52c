"""The list of benchmarks agrees with the tasks that it names, as their files have them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")

from eval.benchmarks import BENCHMARKS, GROUPS, Benchmark, HubData, choose
from eval.hub import task_folder

ADAPTERS_LENGTH = 1024  # of answers, where a task says nothing


class WithoutFunctions(yaml.SafeLoader):
    """Reads `!function utils.f` as text, so that no task is imported."""


WithoutFunctions.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read(path: Path) -> dict[str, Any]:
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=WithoutFunctions)
    included = config.pop("include", None)
    return (read(path.parent / included) if included else {}) | config


@cache
def tasks_of(folder: Path) -> dict[str, dict[str, Any]]:
    configs = [read(path) for path in folder.rglob("*.yaml")]
    return {config["task"]: config for config in configs if isinstance(config.get("task"), str)}


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_a_benchmark_is_what_its_task_says(benchmark: Benchmark) -> None:
    config = tasks_of(task_folder(benchmark))[benchmark.task]
    assert config["output_type"] == "generate_until"
    assert config["test_split"] == benchmark.data.split
    metrics = {entry["metric"] for entry in config["metric_list"]}
    assert benchmark.headline is None or benchmark.headline in metrics
    assert ("submission" in metrics) == (benchmark.submission is not None)
    length = (config.get("generation_kwargs") or {}).get("max_new_tokens", ADAPTERS_LENGTH)
    assert length == benchmark.max_new_tokens
    if isinstance(benchmark.data, HubData):
        assert (config["dataset_path"], config.get("dataset_name")) == (
            benchmark.data.repository,
            benchmark.data.config,
        )
    else:
        assert config["dataset_kwargs"]["data_files"] == {benchmark.data.split: benchmark.data.path}


def test_gqa_is_the_only_task_that_makes_rows_from_a_second_set() -> None:
    """Its pictures are looked up instead; any other task that prepares its rows would have to be looked at."""
    prepared = {
        benchmark.name
        for benchmark in BENCHMARKS.values()
        if "process_docs" in tasks_of(task_folder(benchmark))[benchmark.task] and benchmark.group != "legacy"
    }
    assert prepared == {"gqa"} == {benchmark.name for benchmark in BENCHMARKS.values() if benchmark.pictures}


def test_names_and_groups_choose() -> None:
    assert [benchmark.name for benchmark in choose(["mme", "vqa"])] == ["gqa", "scienceqa", "vizwiz", "okvqa", "mme"]
    assert [benchmark.name for benchmark in choose(["vqa"], ["gqa", "okvqa"])] == ["scienceqa", "vizwiz"]
    groups = {group: {benchmark.name for benchmark in choose([group])} for group in GROUPS}
    assert set().union(*groups.values()) == BENCHMARKS.keys()
    whole = {benchmark.name for benchmark in choose(["all"])}
    assert whole == BENCHMARKS.keys() - groups["server"] - groups["legacy"] - groups["mini"]


@pytest.mark.parametrize(
    ("names", "without", "said"),
    [
        (["gqaa"], [], "--benchmarks: found 'gqaa', which is none; did you mean gqa or vqa?"),
        (["refcoco_testa"], [], "did you mean refcoco_testA"),
        (["gqa"], ["gqas"], "--without: found 'gqas', which is none; did you mean gqa"),
        (["xyzzy"], [], "there are refcoco_val, "),
        (["gqa"], ["vqa"], "leaves no benchmark"),
    ],
)
def test_a_mistyped_name_is_answered_with_near_ones(names: list[str], without: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        choose(names, without)
