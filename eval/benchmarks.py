"""Registry of benchmarks: task, data, the score that tables show, and what a run needs.

lmms-eval's own tasks read data sets of the hub. The tasks in `eval/lmms_tasks` read files made on this machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from patch_aligned.results.run import LEGACY_METRIC, PADDED_FRAME

ROOT = Path(__file__).parents[1]
TASK_FOLDERS = ROOT / "eval" / "lmms_tasks"
ALL = "all"

Group = Literal["rec", "legacy", "vqa", "instruction", "extra", "server", "mini"]


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the hub. Only the files of this split are downloaded."""

    repository: str
    config: str | None  # the subset; None if it has only one
    split: str


@dataclass(frozen=True)
class LocalData:
    """A file made on this machine."""

    path: str  # Parquet, relative to the root of the repository
    split: str  # its name in the task
    made_by: str  # command


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, which is one task of lmms-eval."""

    name: str  # in commands, folders and results
    task: str  # name in lmms-eval
    group: Group
    task_folder: str  # of the task's YAML: in lmms-eval's tasks, or in `eval/lmms_tasks` for local data
    data: HubData | LocalData
    headline: str | None  # the metric that tables show; None if only a server scores
    unit: Literal["share", "points", "sum"] = "share"  # of its scores
    tables: tuple[int, ...] = ()  # of the paper, that show it
    column: str = ""  # its name there
    rows: int | None = None  # number published; None if it depends on what was made
    is_judged: bool = False  # a language model marks the answers
    max_new_tokens: int = 1024  # of an answer, as in the task or else in lmms-eval's adapter
    limit_step: int = 1  # limits must be a multiple of it
    pictures: HubData | None = None  # a second split, with the pictures
    submission: str | None = None  # pattern of the file for a test server, below the run's folder
    mean_of_rows: bool = False  # the task's own means are means over the scores of single rows
    speaks_boxes: bool = False  # answers are boxes, so the frame matters


def _hub(dataset: str, split: str, config: str | None = None) -> HubData:
    return HubData(f"lmms-lab-encoder/{dataset}", config, split)


# `rows` is the number that the data set's publisher states; prefetching compares.
_VQA = (
    Benchmark("gqa", "gqa", "vqa", "gqa", _hub("GQA", "testdev", "testdev_balanced_instructions"), "exact_match",
              tables=(6,), column="GQA", rows=12578, max_new_tokens=16,
              pictures=_hub("GQA", "testdev", "testdev_balanced_images")),
    Benchmark("scienceqa", "scienceqa_img", "vqa", "scienceqa", _hub("ScienceQA", "test", "ScienceQA-IMG"),
              "exact_match", tables=(6,), column="SciQA", max_new_tokens=16, rows=2017),
    Benchmark("vizwiz", "vizwiz_vqa_val", "vqa", "vizwiz_vqa", _hub("VizWiz-VQA", "val"), "exact_match",
              tables=(6,), column="VizWiz", rows=4319),
    Benchmark("okvqa", "ok_vqa_val2014", "vqa", "ok_vqa", _hub("OK-VQA", "val2014"), "exact_match",
              tables=(6,), column="OKVQA", rows=5046, submission="submissions/ok_vqa-*.json"),
)  # fmt: skip
_INSTRUCTION = (
    Benchmark("mmmu", "mmmu_val", "instruction", "mmmu", _hub("MMMU", "validation"), "mmmu_acc",
              tables=(7,), column="MMMU", max_new_tokens=128, rows=900, mean_of_rows=True),
    Benchmark("mmvet", "mmvet", "instruction", "mmvet", _hub("MMVet", "test"), "gpt_eval_score", "points",
              tables=(7,), column="MMVet", rows=218, is_judged=True),
    Benchmark("cmmmu", "cmmmu_val", "instruction", "cmmmu", _hub("CMMMU", "val"), "cmmmu_acc",
              tables=(7,), column="CMMMU", max_new_tokens=16, rows=900),
    Benchmark("mmbench_en", "mmbench_en_dev_static", "instruction", "mmbench", _hub("MMBench", "dev", "en"),
              "gpt_eval_score", "points", tables=(7,), column="MMB EN", rows=4329, submission="submissions/*.xlsx"),
    Benchmark("mme", "mme", "instruction", "mme", _hub("MME", "test"), "mme_perception_score", "sum",
              tables=(7,), column="MME", rows=2374, max_new_tokens=16, limit_step=2),
)  # fmt: skip
_EXTRA = (
    Benchmark("pope", "pope", "extra", "pope", _hub("POPE", "test"), "pope_f1_score", rows=9000, max_new_tokens=128),
    Benchmark("textvqa", "textvqa_val", "extra", "textvqa", _hub("textvqa", "validation"), "exact_match", rows=5000,
              submission="submissions/textvqa_*.json"),
    Benchmark("seed", "seedbench", "extra", "seedbench", _hub("SEED-Bench", "test"), "seed_all", rows=17990,
              mean_of_rows=True),
)  # fmt: skip
_SERVER = (
    Benchmark("vizwiz_test", "vizwiz_vqa_test", "server", "vizwiz_vqa", _hub("VizWiz-VQA", "test"), None, rows=8000,
              submission="submissions/vizwiz_*.json"),
    Benchmark("textvqa_test", "textvqa_test", "server", "textvqa", _hub("textvqa", "test"), None, rows=5734,
              submission="submissions/textvqa_*.json"),
    Benchmark("mmmu_test", "mmmu_test", "server", "mmmu", _hub("MMMU", "test"), None, rows=10500, max_new_tokens=512,
              submission="submissions/mmmu_*.json"),
    Benchmark("cmmmu_test", "cmmmu_test", "server", "cmmmu", _hub("CMMMU", "test"), None, rows=11000, max_new_tokens=16,
              submission="submissions/cmmmu_*.jsonl"),
    Benchmark("mmbench_en_test", "mmbench_en_test", "server", "mmbench", _hub("MMBench", "test", "en"), None,
              rows=6666, submission="submissions/*.xlsx"),
)  # fmt: skip

_REC_SPLITS = (
    ("refcoco", "val", "RefCOCO val", 10834),
    ("refcoco", "testA", "RefCOCO test-A", 5657),
    ("refcoco", "testB", "RefCOCO test-B", 5095),
    ("refcoco_plus", "val", "RefCOCO+ val", 10758),
    ("refcoco_plus", "testA", "RefCOCO+ test-A", 5726),
    ("refcoco_plus", "testB", "RefCOCO+ test-B", 4889),
    ("refcocog", "val", "RefCOCOg val", 4896),
    ("refcocog", "test", "RefCOCOg test", 9602),
)
_SHIPPED_REC = {"refcoco": ("refcoco", "RefCOCO"), "refcoco_plus": ("refcoco+", "RefCOCOplus"),
                "refcocog": ("refcocog", "RefCOCOg")}  # fmt: skip


def _rec(dataset: str, split: str, column: str, rows: int) -> Benchmark:
    """One row per expression, with the splits that papers use."""
    name = f"{dataset}_{split}"
    data = LocalData(f"playground/data/eval/rec/{name}.parquet", "test", "python -m eval.rec.convert --help")
    return Benchmark(name, f"rec_{name}", "rec", "rec", data, PADDED_FRAME, tables=(5, 8), column=column, rows=rows,
                     max_new_tokens=32, speaks_boxes=True)  # fmt: skip


def _legacy_rec(dataset: str, split: str, column: str) -> Benchmark:
    """lmms-eval's own task: its prompt, its rows, boxes read in the image's frame."""
    folder, repository = _SHIPPED_REC[dataset]
    return Benchmark(f"legacy_{dataset}_{split}", f"{folder}_bbox_rec_{split}", "legacy", folder,
                     _hub(repository, split), LEGACY_METRIC, tables=(5, 8), column=column,
                     mean_of_rows=True)  # fmt: skip


_MINI = (("existence", "Existence"), ("colour", "Colour"), ("position", "Position"), ("counting", "Counting"))


def _mini(name: str, column: str, headline: str = "exact_match", table: int = 6, max_new_tokens: int = 8) -> Benchmark:
    """Questions about the miniature's scenes. They show whether training works. Do not compare with the paper."""
    data = LocalData(f"playground/data/mini/eval/{name}.parquet", "test", "python -m playground.mini.evaluation_set")
    return Benchmark(f"mini_{name}", f"mini_{name}", "mini", "mini", data, headline, tables=(table,), column=column,
                     max_new_tokens=max_new_tokens, speaks_boxes=headline == PADDED_FRAME)  # fmt: skip


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *(_rec(*row) for row in _REC_SPLITS),
        *(_legacy_rec(*row[:3]) for row in _REC_SPLITS),
        *_VQA, *_INSTRUCTION, *_EXTRA, *_SERVER,
        *(_mini(*row) for row in _MINI), _mini("rec", "Referring", PADDED_FRAME, table=5, max_new_tokens=32),
    )
}  # fmt: skip
GROUPS: tuple[str, ...] = get_args(Group)
"""Names of several benchmarks. `all` stands for the paper's tables 5 to 7 and the extra benchmarks."""
ALL_GROUPS = ("rec", "vqa", "instruction", "extra")


def choose(names: Iterable[str], without: Iterable[str] = ()) -> list[Benchmark]:
    """Benchmarks by names or groups, each once, in the order of the registry; `ValueError` if none is left."""
    chosen = {name for given in names for name in _members(given, "--benchmarks")} - {
        name for given in without for name in _members(given, "--without")
    }
    if not chosen:
        raise ValueError("--without: leaves no benchmark")
    return [benchmark for benchmark in BENCHMARKS.values() if benchmark.name in chosen]


def _members(name: str, flag: str) -> set[str]:
    if name in BENCHMARKS:
        return {name}
    groups = ALL_GROUPS if name == ALL else (name,)
    found = {benchmark.name for benchmark in BENCHMARKS.values() if benchmark.group in groups}
    if not found:
        known = {known.lower(): known for known in (*BENCHMARKS, *GROUPS, ALL)}
        near = [known[lower] for lower in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
        advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known.values())}"
        raise ValueError(f"{flag}: found {name!r}, which is none; {advice}")
    return found
