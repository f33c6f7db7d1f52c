"""What would end a run later is said at the start, in a sentence each that names the next step."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval import run
from eval.adapter import processes_here
from eval.benchmarks import BENCHMARKS, Benchmark
from eval.hub import DataError, Lock, TaskData, find_data, shipped_tasks_folder
from eval.judge import Judge, check_judge, read_judge, set_judge
from eval.plan import (
    Plan,
    PreflightError,
    check_checkpoint,
    check_limit,
    check_processes,
    check_run,
    make_plan,
)
from eval.scores import UnscoredError
from patch_aligned.files import checkpoint_sha256
from tests.answering import json_server, saying
from tests.folders import set_config

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is part of the extra `eval`"
)


def test_a_judge_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_TYPE", "LLM_JUDGE_URL", "MODEL_VERSION"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
    with json_server(lambda *_: (200, saying("1"))) as address:
        set_judge(f"{address}/v1/chat/completions", "local-judge")
        judge = read_judge()
        assert (judge.type, judge.model) == ("local", "local-judge")
        check_judge(judge)


@pytest.mark.parametrize(
    ("status", "document", "said"),
    [
        (401, {"error": "bad key"}, r"refused: HTTP 401 .*bad key"),
        (200, saying(""), "gives an empty answer"),
        (200, saying("<think> One."), "found '<think> One.', expected a mark from 0 to 1 at the beginning"),
        (200, saying("10"), "found '10', expected a mark from 0 to 1"),
        (200, saying("nan"), "found 'nan', expected a mark from 0 to 1"),
        (200, saying("0.1"), "gave 0.1 to an answer that is right"),
        (200, {"unexpected": 1}, "no judge m answers at"),
    ],
)
def test_a_judge_that_cannot_judge_is_said(status: int, document: Any, said: str) -> None:
    with (
        json_server(lambda *_: (status, document)) as address,
        pytest.raises(ValueError, match=f"{said}.*next: .*--judge-url"),
    ):
        check_judge(Judge("local", "m", f"{address}/v1/chat/completions"))


def test_no_judge_and_no_key_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no judge m answers at http://127.0.0.1:9/v1"):
        check_judge(Judge("local", "m", "http://127.0.0.1:9/v1"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"needs OPENAI_API_KEY, which is not set; next: set it, or .*--without mmvet"):
        check_judge(Judge("openai", "m", "https://api.openai.com/v1/chat/completions"))
    with pytest.raises(ValueError, match=r"found 'somewhere', expected one that begins with http"):
        check_judge(Judge("local", "m", "somewhere"))


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lmms-eval is not installed; next: pip install 'patch-aligned.*\[eval\]'"):
        shipped_tasks_folder()


def test_what_is_no_checkpoint_is_said(golden_world: Path) -> None:
    check_checkpoint("tiny-llava", None)
    with pytest.raises(FileNotFoundError, match=r"liuhaotian/llava-v1.5-7b: no such folder; next: hf download"):
        check_checkpoint("liuhaotian/llava-v1.5-7b", None)
    with pytest.raises(FileNotFoundError, match=r"images: found no config.json"):
        check_checkpoint("images", None)
    for file in Path("tiny-llava").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"found a config and no weights"):
        check_checkpoint("tiny-llava", None)
    Path("tiny-llava/mm_projector.bin").touch()
    with pytest.raises(ValueError, match=r"tiny-llava: holds a projector alone; next: --model-base LLM"):
        check_checkpoint("tiny-llava", None)
    check_checkpoint("tiny-llava", "tiny-vicuna")
    with pytest.raises(ValueError, match=r"--model-base tiny-llava holds a projector alone .*; expected a whole model"):
        check_checkpoint("tiny-llava", "tiny-llava")
    with pytest.raises(ValueError, match=r"tiny-vicuna: holds a whole model, which --model-base images is no part of"):
        check_checkpoint("tiny-vicuna", "images")


@pytest.fixture
def refused(golden_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on data that are there; returns what it says when it refuses."""
    monkeypatch.setattr("eval.plan.find_data", lambda *_: TaskData("rows", "sha256:0", "test", ()))

    def run_command(*flags: str) -> str:
        assert run.main(["--benchmarks", "mini_colour", "--output", "out", *flags]) == 2
        return capsys.readouterr().err

    return run_command


@needs_lmms_eval
def test_what_cannot_be_loaded_is_said_without_a_traceback(refused: Callable[..., str]) -> None:
    assert "Error: tiny-vicuna: its config names no vision tower" in refused("--model-path", "tiny-vicuna")
    Path("lock.json").write_text("{")
    assert "Error: lock.json: no JSON" in refused("--model-path", "tiny-llava", "--lock", "lock.json")
    Path("tiny-llava/model.safetensors").rename("tiny-llava/training_args.bin")
    assert "Error: tiny-llava: found no weights" in refused("--model-path", "tiny-llava")
    Path("tiny-llava/config.json").write_text("{")
    assert "Error: No checkpoint at tiny-llava" in refused("--model-path", "tiny-llava")


@pytest.fixture
def make_plan_of(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """What the command would do with data that are there."""
    monkeypatch.setattr("eval.plan.find_data", lambda *_: TaskData("rows", "sha256:0", "test", ()))
    monkeypatch.setattr("eval.plan.check_judge_of_environment", lambda: None)

    def plan_of(*flags: str) -> Plan:
        return make_plan(run.argument_parser().parse_args(["--output", "out", *flags]), 1)

    return plan_of


@needs_lmms_eval
def test_the_name_in_tables_does_not_choose_the_template(make_plan_of: Callable[..., Plan]) -> None:
    Path("tiny-llava").rename("llava-v1.5-tiny")  # published checkpoints record no template: it follows from the name
    plan = make_plan_of("--benchmarks", "mini_colour", "--model-path", "llava-v1.5-tiny", "--model-name", "Ours")
    assert (plan.model.name, plan.request.conversation) == ("Ours", "llava_v1")


@needs_lmms_eval
def test_a_stage_1_projector_is_asked_in_the_template_that_it_was_trained_in(
    make_plan_of: Callable[..., Plan], goldens: Path
) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "llava-v1.5-7b-pretrain")  # by its name it would be `llava_v1`
    flags = ("--benchmarks", "mini_colour", "--model-path", "llava-v1.5-7b-pretrain", "--model-base", "tiny-vicuna")
    assert make_plan_of(*flags).request.conversation == "plain"  # as upstream trains, which records nothing
    assert make_plan_of(*flags, "--conversation", "vicuna_v1").request.conversation == "vicuna_v1"
    set_config("llava-v1.5-7b-pretrain", conversation_version="llava_v1")
    assert make_plan_of(*flags).request.conversation == "llava_v1"


@needs_lmms_eval
def test_marks_around_images_that_the_adapter_leaves_out_are_said(make_plan_of: Callable[..., Plan]) -> None:
    set_config("tiny-llava", mm_use_im_start_end=True)
    with pytest.raises(PreflightError, match=r"tiny-llava: .* leaves them out; next: .*model_vqa_loader"):
        make_plan_of("--benchmarks", "mini_colour", "--model-path", "tiny-llava")


@needs_lmms_eval
def test_the_judge_is_asked_only_where_something_is_left_for_it(
    make_plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_judge() -> None:
        raise ValueError("no judge answers")

    monkeypatch.setattr("eval.plan.check_judge_of_environment", no_judge)
    monkeypatch.setattr("eval.plan.finished_run", lambda folder, _: "a run" if folder.name == "mmvet" else None)
    monkeypatch.setattr("eval.plan.summary", lambda *_: "a run")
    flags = ("--benchmarks", "mmvet,mme", "--model-path", "tiny-llava")
    with pytest.raises(PreflightError, match="no judge answers"):
        make_plan_of(*flags)
    Path("out/mmvet").mkdir(parents=True)
    Path("out/mmvet/result.json").touch()
    assert [benchmark.name for benchmark, _ in make_plan_of(*flags).todo] == ["mme"]
    with pytest.raises(PreflightError, match="no judge answers"):
        make_plan_of(*flags, "--again")


@needs_lmms_eval
def test_a_base_is_known_by_its_weights(make_plan_of: Callable[..., Plan], goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_lora", "ckpt_lora")
    flags = ("--benchmarks", "mini_colour", "--model-path", "ckpt_lora", "--model-base", "tiny-vicuna")
    before = make_plan_of(*flags).model
    with Path("tiny-vicuna/model.safetensors").open("ab") as weights:
        weights.write(b" ")
    assert make_plan_of(*flags).model == replace(before, base_sha256=checkpoint_sha256("tiny-vicuna")) != before


@needs_lmms_eval
def test_rows_without_a_mark_do_not_end_what_comes_after_them(
    make_plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def run_benchmark(_: Any, plan: Plan, benchmark: Benchmark, *rest: Any) -> None:
        if benchmark.is_judged:
            raise UnscoredError("mmvet: the judge fell silent")
        done.append(benchmark.name)

    monkeypatch.setattr(run, "load_adapter", lambda _: None)
    monkeypatch.setattr(run, "run_benchmark", run_benchmark)
    flags = ["--model-path", "tiny-llava", "--output", "out", "--benchmarks", "mmvet,mme"]
    assert run.main(flags) == 2
    assert done == ["mme"]
    assert "Error: mmvet: the judge fell silent" in capsys.readouterr().err


def test_more_processes_than_gpus_and_parted_rows_are_said() -> None:
    check_processes(1, 0)
    check_processes(8, 8)
    with pytest.raises(ValueError, match=r"8 processes and 0 GPUs: .* next: NUM_GPUS=1"):
        check_processes(8, 0)
    check_limit([BENCHMARKS["gqa"]], 5)
    with pytest.raises(ValueError, match=r"found 5, expected a multiple of 2, as the rows of mme .* next: --limit 6"):
        check_limit([BENCHMARKS["gqa"], BENCHMARKS["mme"]], 5)
    with pytest.raises(ValueError, match=r"--limit: found 0"):
        check_limit([], 0)


def test_gpus_of_one_machine_serve_the_processes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes_here(16) == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes_here(16) == 16


def test_a_file_that_was_not_made_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.hub.ROOT", tmp_path)
    with pytest.raises(DataError, match=r"mini_rec: no file playground/.*; next: python -m playground.mini.evaluat"):
        find_data(BENCHMARKS["mini_rec"], Lock(tmp_path / "lock.json"))


@needs_lmms_eval
def test_all_problems_are_listed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing was fetched; no network
    monkeypatch.setenv("API_TYPE", "local")
    monkeypatch.setenv("LLM_JUDGE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(PreflightError) as caught:
        check_run(
            [BENCHMARKS["mmvet"], BENCHMARKS["mme"]], "nowhere", None, limit=3, num_processes=2, num_gpus=1,
            needs_judge=True, lock=Lock(tmp_path / "lock.json"),
        )  # fmt: skip
    problems = str(caught.value).splitlines()
    assert [problem.split(":")[0] for problem in problems] == [
        "nowhere", "2 processes and 1 GPUs", "--limit", "no judge gpt-4o-2024-11-20 answers at http", "mmvet", "mme",
    ]  # fmt: skip
    assert all("next: " in problem for problem in problems)


def test_the_command_ends_with_the_sentences_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--model-path", "nowhere", "--benchmarks", "gqaa", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == "Error: --benchmarks: found 'gqaa', which is none; did you mean gqa or vqa?\n"
    assert not (tmp_path / "out").exists()
