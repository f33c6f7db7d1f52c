"""What would end a run later is said at the start, in a sentence each that names the next step."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from eval import run
from eval.benchmarks import BENCHMARKS
from eval.hub_files import DataError, Lock
from eval.judge import Judge, JudgeError, check_judge, read_judge, set_judge
from eval.preflight import PreflightError, check_checkpoint, check_installed, check_limit, check_processes, check_run
from eval.task_data import find_data


@pytest.fixture
def judge_that_says() -> Iterator[Callable[[int, Any], str]]:
    """Starts a judge on this machine, which gives one answer; returns its address."""
    servers = []

    def start(status: int, document: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1/chat/completions"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def says(content: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}}]}


def test_a_judge_that_answers_is_taken(judge_that_says: Callable[[int, Any], str], monkeypatch: Any) -> None:
    for name in ("API_TYPE", "LLM_JUDGE_URL", "MODEL_VERSION"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
    set_judge(judge_that_says(200, says("1")), "local-judge")
    judge = read_judge()
    assert (judge.type, judge.model) == ("local", "local-judge")
    check_judge(judge)


@pytest.mark.parametrize(
    ("status", "document", "said"),
    [
        (401, {"error": "bad key"}, r"refused: HTTP 401 .*bad key"),
        (200, says(""), "answers nothing"),
        (200, {"unexpected": 1}, "no judge m answers at"),
    ],
)
def test_a_judge_that_cannot_judge_is_said(
    judge_that_says: Callable[[int, Any], str], status: int, document: Any, said: str
) -> None:
    with pytest.raises(JudgeError, match=f"{said}.*next: .*--judge-url"):
        check_judge(Judge("local", "m", judge_that_says(status, document)))


def test_no_judge_and_no_key_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match=r"no judge m answers at http://127.0.0.1:9/v1"):
        check_judge(Judge("local", "m", "http://127.0.0.1:9/v1"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match=r"needs OPENAI_API_KEY, which is not set; next: set it, or .*--without mmvet"):
        check_judge(Judge("openai", "m", "https://api.openai.com/v1/chat/completions"))
    with pytest.raises(JudgeError, match=r"found 'somewhere', expected one that begins with http"):
        check_judge(Judge("local", "m", "somewhere"))


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lmms-eval is not installed; next: pip install -e '.\[eval\]'"):
        check_installed()


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


def test_a_file_that_was_not_made_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.task_data.ROOT", tmp_path)
    with pytest.raises(DataError, match=r"mini_rec: no file playground/.*; next: python -m playground.mini.evaluat"):
        find_data(BENCHMARKS["mini_rec"], Lock(tmp_path / "lock.json"))


def test_all_problems_are_listed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing was fetched; no network
    monkeypatch.setenv("API_TYPE", "local")
    monkeypatch.setenv("LLM_JUDGE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(PreflightError) as caught:
        check_run(
            [BENCHMARKS["mmvet"], BENCHMARKS["mme"]], "nowhere", None, limit=3, num_processes=2, num_gpus=1,
            lock=Lock(tmp_path / "lock.json"),
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
