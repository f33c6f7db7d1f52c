"""The language model that marks free answers: where it is, and whether it answers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import requests

DEFAULT_MODEL = "gpt-4o-2024-11-20"
OPENAI_URL = "https://api.openai.com/v1"
LOCAL_URL = "http://localhost:8000/v1/chat/completions"
TIMEOUT_S = 20
QUESTION = (
    "Mark the answer to a question from 0.0 (wrong) to 1.0 (right) by the truth. Say the mark and nothing else.\n"
    "Question: What is on the table? Truth: a red cup. Answer: There is a red cup on the table. Mark:"
)
_LEAST_MARK_OF_RIGHT = 0.5
_TEMPERATURES = (0.0, 0.5, 1.0, 1.5)  # that lmms-eval tries in turn until it can read a mark
MARK_TOKENS = 128  # that MM-Vet allows for a mark


@dataclass(frozen=True)
class Judge:
    """A judge as lmms-eval finds it in the environment."""

    type: str  # `API_TYPE` of lmms-eval: `openai`, `local`, or another that it knows
    model: str  # `MODEL_VERSION`
    url: str | None  # of its chat completions; None for types whose address has several variables


def set_judge(url: str | None, model: str | None) -> None:
    """Set the environment variables from which lmms-eval reads the address and the model of a judge."""
    if url:
        os.environ |= {"API_TYPE": "local", "LLM_JUDGE_URL": url}
    if model:
        os.environ["MODEL_VERSION"] = model


def read_judge() -> Judge:
    """Return the judge that the environment names."""
    kind = os.environ.get("API_TYPE", "openai")
    model = os.environ.get("MODEL_VERSION", DEFAULT_MODEL)
    if kind == "openai":
        return Judge(kind, model, os.environ.get("OPENAI_API_URL", OPENAI_URL).rstrip("/") + "/chat/completions")
    return Judge(kind, model, os.environ.get("LLM_JUDGE_URL", LOCAL_URL) if kind == "local" else None)


def check_judge(judge: Judge, timeout_s: float = TIMEOUT_S) -> None:
    """Ask the judge to mark a right answer; `ValueError` if it cannot, or gives no mark of at least 0.5."""
    own = "your own judge, --judge-url http://HOST:PORT/v1/chat/completions --judge-model NAME, or --without mmvet"
    advice = f"next: {own}"
    if judge.url is None:
        return  # lmms-eval checks its own variables for azure and the like
    if not judge.url.startswith(("http://", "https://")):
        raise ValueError(f"the judge's address: found {judge.url!r}, expected one that begins with http; {advice}")
    key = os.environ.get("OPENAI_API_KEY", "")
    if judge.type == "openai" and not key:
        raise ValueError(f"the judge {judge.model} needs OPENAI_API_KEY, which is not set; next: set it, or {own}")
    is_reasoning = judge.type == "openai" and judge.model.startswith(("gpt-5", "o1", "o3", "o4"))
    question: dict[str, Any] = {
        "model": judge.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_completion_tokens" if is_reasoning else "max_tokens": MARK_TOKENS,
    }
    who = f"the judge {judge.model} at {judge.url}"
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = requests.post(judge.url, json=question, headers=headers, timeout=timeout_s)
        answer = response.json()["choices"][0]["message"]["content"] if response.ok else ""
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"no judge {judge.model} answers at {judge.url}: {error}; {advice}") from error
    if not response.ok:
        raise ValueError(f"{who} refused: HTTP {response.status_code} {response.text[:300]}; {advice}")
    if not answer:
        raise ValueError(f"{who} gives an empty answer; {advice}")
    mark = read_mark(answer)
    if mark is None:
        raise ValueError(
            f"{who}: found {answer[:60]!r}, expected a mark from 0 to 1 at the beginning: does it reason "
            f"first? {advice}"
        )
    if mark < _LEAST_MARK_OF_RIGHT:
        raise ValueError(f"{who} gave {mark:g} to an answer that is right; {advice}")


def read_mark(answer: str) -> float | None:
    """The mark from 0 to 1 at the start of a judge's answer, as MM-Vet reads it; None if there is none."""
    try:
        mark = float(answer.strip().split(" ")[0])
    except ValueError:
        return None
    return mark if 0.0 <= mark <= 1.0 else None


def end_without_mark(process_results: Any) -> None:
    """Make MM-Vet's scorer treat an unreadable mark as a missing one, which a run reports.

    As shipped, it repeats the question forever for a mark outside 0 to 1, and counts words without a mark as 0. The
    `get_chat_response` in the module of the task's `process_results` is wrapped.
    """
    module = process_results.__globals__
    ask = module["get_chat_response"]

    def ask_for_mark(prompt: str, **settings: Any) -> tuple[str, str]:
        for temperature in _TEMPERATURES:
            answer, model = ask(prompt, **{**settings, "temperature": temperature})
            if not answer or read_mark(answer) is not None:
                return answer, model
        return "", ""

    module["get_chat_response"] = ask_for_mark
