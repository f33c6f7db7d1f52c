"""A run, from the checkpoint to the files that it leaves: all of it in this process, on a tiny checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")

from eval import adapter as adapter_module
from eval import run
from eval.adapter import AnswerLog
from eval.benchmarks import BENCHMARKS, Benchmark, HubData, LocalData
from eval.hub import Lock
from eval.judge import QUESTION
from patch_aligned.results.run import read_run, read_samples
from tests.answering import json_server, saying
from tests.eval.conftest import write_picture_task
from tests.eval.two_processes import EchoingAdapter
from tests.training import free_port

pytestmark = pytest.mark.slow  # lmms-eval takes a quarter of a minute to import

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMMON = ["--model-path", "tiny-llava", "--output", "out", "--lock", "lock.json", "--conversation", "vicuna_v1"]
QUESTIONS = ["What is in the picture?", "Is it night?", "Where do the people walk, and what do they carry?",
             "Who is it?", "Describe the scene.", "How many?", "What does it say?", "Which is larger?"]  # fmt: skip
FUNCTIONS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc):
    return doc["question"]


def process_results(doc, results):
    return {"has_an_e": float("e" in results[0])}
"""


def write_table(path: Path, **columns: list[Any]) -> None:
    """A table with a picture in each row, as the hub's sets have them."""
    rows = len(next(iter(columns.values())))
    images = [{"bytes": Path("images", f"im{row % 7}.png").read_bytes(), "path": None} for row in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({**columns, "image": images}).cast_column("image", datasets.Image())
    table.to_parquet(path)


@pytest.fixture
def pictures(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """A benchmark of the registry with a task and a table of its own."""
    folder = golden_world / "tasks"
    table = golden_world / "questions.parquet"
    write_table(table, question=QUESTIONS)
    folder.mkdir()
    write_picture_task(folder, "pictures", table, "has_an_e", {"max_new_tokens": 8, "temperature": 0.7})
    (folder / "utils.py").write_text(FUNCTIONS)
    benchmark = Benchmark(
        "pictures", "pictures", "mini", str(folder), LocalData(str(table), "test", "make it"), "has_an_e",
        tables=(6,), column="Pictures", max_new_tokens=8,
    )  # fmt: skip
    monkeypatch.setitem(BENCHMARKS, "pictures", benchmark)
    return benchmark


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model gets, as they come."""
    from lmms_eval.models.simple import llava as shipped

    seen: list[str] = []
    tokenize = shipped.tokenizer_image_token

    def record(prompt: str, *arguments: Any, **options: Any) -> Any:
        seen.append(prompt)
        return tokenize(prompt, *arguments, **options)

    monkeypatch.setattr(shipped, "tokenizer_image_token", record)
    return seen


def evaluate(*flags: str) -> int:
    return run.main([*COMMON, *flags])


def test_a_run_leaves_scores_rows_and_what_they_depend_on(
    pictures: Benchmark, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny-llava/trainer_state.json").write_text(json.dumps({"global_step": 7}))
    Path("tiny-llava/run.json").write_text(json.dumps({"flags": {"seed": 3}, "sha256": {"data_path": "abc"}}))
    assert evaluate("--benchmarks", "pictures", "--batch-size", "3") == 0
    result, samples = read_run(Path("out/pictures")), read_samples(Path("out/pictures"))
    assert [sample.prompt for sample in samples] == QUESTIONS
    shares = [float("e" in sample.answer) for sample in samples]
    assert [sample.scores for sample in samples] == [{"has_an_e": share} for share in shares]
    score = result.scores["has_an_e"]
    assert (score.value, score.rows, score.unit) == (pytest.approx(sum(shares) / 8), 8, "share")
    assert result.settings.prompt in prompts
    assert "USER: <image>\nWhat is in the picture? ASSISTANT:" in result.settings.prompt
    assert (result.settings.temperature, result.settings.max_new_tokens, result.settings.limit) == (0, 8, None)
    assert result.data.revision == f"sha256:{hashlib.sha256(Path('questions.parquet').read_bytes()).hexdigest()}"
    record = json.loads(Path("out/pictures/run.json").read_text())
    assert record["trained"] == {"steps": 7, "seed": 3, "data (SHA-256)": "abc"}
    assert record["sha256"] == {"model_path": result.model.sha256, "data": result.data.revision}
    assert record["flags"]["batch_size"] == 3 and record["sittings"][0]["ended"]
    said = capsys.readouterr().out
    assert "tiny-llava: pictures; template vicuna_v1, float32, batch size 3\n" in said
    assert "pictures: has_an_e" in said


def test_scorers_and_their_files_get_no_control_characters(
    pictures: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.models.simple.llava import Llava

    monkeypatch.setattr(Llava, "generate_until", lambda self, requests: ["a\x0bred\n\x00 one"] * len(requests))
    assert evaluate("--benchmarks", "pictures") == 0
    assert {sample.answer for sample in read_samples(Path("out/pictures"))} == {"ared\n one"}


def test_a_finished_benchmark_is_skipped_and_done_again_on_request(
    pictures: Benchmark, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--benchmarks", "pictures", "--limit", "2") == 0
    before = read_run(Path("out/pictures"))
    prompts.clear()
    assert evaluate("--benchmarks", "pictures", "--limit", "2") == 0
    assert "(finished before)" in capsys.readouterr().out
    assert prompts == []
    assert evaluate("--benchmarks", "pictures", "--limit", "4") == 2
    assert "another settings.limit: found 2, asked for 4; next: another --output, or --again" in capsys.readouterr().err
    assert evaluate("--benchmarks", "pictures", "--limit", "2", "--again") == 0
    assert len(prompts) == 2
    assert read_run(Path("out/pictures")) == before


def test_a_run_that_was_stopped_goes_on_with_the_answers_it_has(
    pictures: Benchmark, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--benchmarks", "pictures", "--output", "whole") == 0
    monkeypatch.setattr(adapter_module, "BLOCK_ROWS", 2)
    prompts.clear()

    class StoppedError(Exception):
        pass

    def stop_at_the_fifth(self: Any, answers: dict[str, str]) -> None:
        if len(prompts) > 4:
            raise StoppedError
        keep(self, answers)

    keep = AnswerLog._keep
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(AnswerLog, "_keep", stop_at_the_fifth)
        evaluate("--benchmarks", "pictures", "--batch-size", "2")
    assert not Path("out/pictures/result.json").exists()
    prompts.clear()
    assert evaluate("--benchmarks", "pictures", "--batch-size", "2") == 0
    assert len(prompts) == len(QUESTIONS) - 4
    assert read_samples(Path("out/pictures")) == read_samples(Path("whole/pictures"))


def test_what_goes_wrong_in_a_task_is_said_as_it_is(
    pictures: Benchmark, golden_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tenacity.nap

    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)  # lmms-eval tries five times, two seconds apart
    (golden_world / "tasks" / "utils.py").write_text(FUNCTIONS.replace("results[0]", 'doc["no such column"]'))
    with pytest.raises(KeyError, match="no such column"):
        evaluate("--benchmarks", "pictures", "--limit", "1")


def test_a_prompt_that_holds_the_padding_is_refused(pictures: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path("tiny-llava/tokenizer_config.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | {"pad_token": "<s>"}))
    assert evaluate("--benchmarks", "pictures", "--limit", "1") == 2
    assert "tiny-llava: the prompt holds '<s>', with which lmms-eval pads" in capsys.readouterr().err


@pytest.fixture
def hub(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts tables where the hub's cache keeps the files of a commit, and writes the commit down."""
    cache = golden_world / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(data: HubData, **columns: list[Any]) -> None:
        name = f"{data.config or 'data'}/{data.split}.parquet"
        folder = cache / f"datasets--{data.repository.replace('/', '--')}" / "snapshots" / COMMIT
        write_table(folder / name, **columns)
        Lock(golden_world / "lock.json").add(data, COMMIT, [name])

    return put


def test_shipped_tasks_read_the_pinned_files_and_score_them(hub: Callable[..., None]) -> None:
    """MME, whose rows go in pairs; GQA, whose pictures are apart; OKVQA, which leaves a file for a server."""
    mme, gqa, okvqa = (BENCHMARKS[name] for name in ("mme", "gqa", "okvqa"))
    hub(mme.data, question_id=["a", "a", "b", "b"], question=["Is it? Please answer yes or no."] * 4,
        answer=["Yes", "No"] * 2, category=["existence"] * 2 + ["code_reasoning"] * 2)  # fmt: skip
    hub(gqa.data, id=["7", "8"], imageId=["p1", "p0"], question=["What?", "Where?"], answer=["dog", "left"])
    assert gqa.pictures is not None
    hub(gqa.pictures, id=["p0", "p1"])
    hub(okvqa.data, question_id=[1, 2], question=["What?", "Who?"], answers=[["dog"] * 10] * 2)

    assert evaluate("--benchmarks", "mme,gqa,okvqa", "--batch-size", "2", "--max-new-tokens", "4") == 0
    results = {name: read_run(Path("out", name)) for name in ("mme", "gqa", "okvqa")}
    assert {name: result.headline for name, result in results.items()} == {
        "mme": "mme_perception_score", "gqa": "exact_match", "okvqa": "exact_match",
    }  # fmt: skip
    assert {result.data.revision for result in results.values()} == {COMMIT}
    assert set(results["mme"].scores) == {"mme_perception_score", "mme_cognition_score"}
    assert results["mme"].scores["mme_perception_score"].unit == "sum"
    assert [sample.id for sample in read_samples(Path("out/mme"))] == ["0", "1", "2", "3"]  # its ids come twice
    assert [sample.id for sample in read_samples(Path("out/gqa"))] == ["7", "8"]
    submission = results["okvqa"].submission
    assert submission is not None
    answered = json.loads(Path("out/okvqa", submission).read_text())
    assert [row["image"] for row in answered] == ["1.jpg", "2.jpg"]


def test_a_judge_marks_the_answers_and_its_silence_is_no_zero(
    hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("API_TYPE", "LLM_JUDGE_URL", "MODEL_VERSION"):
        monkeypatch.setenv(name, "")  # so that what the flags set is undone
    mmvet = BENCHMARKS["mmvet"]
    hub(mmvet.data, question_id=["v1_0", "v1_1"], question=["What?"] * 2, answer=["dog"] * 2, capability=["rec"] * 2)
    marks = ["", "7", "Half right", "0.5"]  # of the middle two the shipped scorer asks for ever, or makes a 0

    def judge(path: str, headers: Any, asked: Any) -> tuple[int, Any]:
        """Says 1 when it is greeted, then the first mark of each answer."""
        return 200, saying("1" if asked["messages"][0]["content"] == QUESTION else marks[0])

    with json_server(judge) as address:
        url = f"{address}/v1/chat/completions"
        flags = ["--benchmarks", "mmvet", "--max-new-tokens", "4", "--judge-url", url, "--judge-model", "local-judge"]
        while len(marks) > 1:
            assert evaluate(*flags) == 2
            assert "mmvet: the judge did not score 2 of 2 rows" in capsys.readouterr().err
            assert not Path("out/mmvet/result.json").exists()
            del marks[0]
        assert evaluate(*flags) == 0
        assert evaluate(*flags, "--judge-model", "stricter") == 2
        assert "out/mmvet: holds a run with another settings.judge" in capsys.readouterr().err
    result = read_run(Path("out/mmvet"))
    assert result.settings.judge == {"type": "local", "model": "local-judge", "url": url}
    assert (result.settings.temperature, result.scores["gpt_eval_score"].value) == (0, 50)
    assert [sample.scores["gpt_eval_score"] for sample in read_samples(Path("out/mmvet"))] == [50, 50]


def test_two_processes_share_the_rows_and_one_writes(
    pictures: Benchmark, golden_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven rows, so that one process has fewer. The shipped adapter is not in it: of several, it asks a GPU each."""
    script = Path(__file__).with_name("two_processes.py")
    flags = ["--benchmarks", "pictures", "--limit", "7"]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true",
                "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, str(script), str(golden_world / "tasks"), str(golden_world / "questions.parquet")]
    together = [
        subprocess.Popen(
            [*command, *COMMON, "--output", "two", *flags],
            env=os.environ | launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    monkeypatch.setattr(run, "load_adapter", EchoingAdapter)
    assert evaluate(*flags, "--output", "one") == 0
    for process in together:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]

    one, two = (read_run(Path(folder, "pictures")) for folder in ("one", "two"))
    assert two == replace(one, settings=replace(one.settings, num_processes=2))
    assert one.data.rows == 7
    assert read_samples(Path("two/pictures")) == read_samples(Path("one/pictures"))
    answered = [len(path.read_text().splitlines()) for path in sorted(Path("two/pictures/answers").iterdir())]
    assert answered == [4, 3]
