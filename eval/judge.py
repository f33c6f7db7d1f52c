"""The language model that scores free answers: where it is, and whether it answers."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_MODEL = "gpt-4o-2024-11-20"
OPENAI_URL = "https://api.openai.com/v1"
LOCAL_URL = "http://localhost:8000/v1/chat/completions"
TIMEOUT_S = 20
QUESTION = (
    "Mark the answer to a question from 0.0 (wrong) to 1.0 (right) by the truth. Say the mark and nothing else.\n"
    "Question: What is on the table? Truth: a red cup. Answer: There is a red cup on the table. Mark:"
)
_LEAST_MARK_OF_RIGHT = 0.5
_TEMPERATURES = (0.0, 0.5, 1.0, 1.5)  # that lmms-eval asks at, one after the other, for a mark that it can read
MARK_TOKENS = 128  # that MM-Vet leaves a judge for a mark


@dataclass(frozen=True)
class Judge:
    """A judge as lmms-eval finds it in the environment.

    Attributes:
        type: `API_TYPE` of lmms-eval: `openai`, `local`, or another that it knows.
        model: `MODEL_VERSION`.
        url: where it answers chat completions; None for types whose address is made up of several variables.
    """

    type: str
    model: str
    url: str | None

    def recorded(self) -> dict[str, Any]:
        """As results hold it."""
        return asdict(self)


def set_judge(url: str | None, model: str | None) -> None:
    """Writes into the environment, which lmms-eval reads: a judge of one's own, and the judge's model."""
    if url:
        os.environ |= {"API_TYPE": "local", "LLM_JUDGE_URL": url}
    if model:
        os.environ["MODEL_VERSION"] = model


def read_judge() -> Judge:
    """The judge that the environment names."""
    kind = os.environ.get("API_TYPE", "openai")
    model = os.environ.get("MODEL_VERSION", DEFAULT_MODEL)
    if kind == "openai":
        return Judge(kind, model, os.environ.get("OPENAI_API_URL", OPENAI_URL).rstrip("/") + "/chat/completions")
    return Judge(kind, model, os.environ.get("LLM_JUDGE_URL", LOCAL_URL) if kind == "local" else None)


def check_judge(judge: Judge, timeout_s: float = TIMEOUT_S) -> None:
    """Has the judge mark an answer that is right.

    Raises:
        ValueError: it has no key, cannot be reached, refuses, says nothing, or what MM-Vet cannot read as a mark, or a
            mark that is out of range or low.
    """
    own = "a judge of your own, --judge-url http://HOST:PORT/v1/chat/completions --judge-model NAME, or --without mmvet"
    advice = f"next: {own}"
    if judge.url is None:
        return  # lmms-eval's own variables for azure and the like: left to it
    if not judge.url.startswith(("http://", "https://")):
        raise ValueError(f"the judge's address: found {judge.url!r}, expected one that begins with http; {advice}")
    key = os.environ.get("OPENAI_API_KEY", "")
    if judge.type == "openai" and not key:
        raise ValueError(f"the judge {judge.model} needs OPENAI_API_KEY, which is not set; next: set it, or {own}")
    question = {"model": judge.model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": MARK_TOKENS}
    if judge.type == "openai" and judge.model.startswith(("gpt-5", "o1", "o3", "o4")):
        question["max_completion_tokens"] = question.pop("max_tokens")
    request = urllib.request.Request(
        judge.url,
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise ValueError(
            f"the judge {judge.model} at {judge.url} refused: HTTP {error.code} {said}; {advice}"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"no judge {judge.model} answers at {judge.url}: {error}; {advice}") from error
    if not answer:
        raise ValueError(f"the judge {judge.model} at {judge.url} answers nothing; {advice}")
    mark = read_mark(answer)
    if mark is None:
        raise ValueError(
            f"the judge {judge.model} at {judge.url}: found {answer[:60]!r}, expected a mark from 0 to 1 at the "
            f"beginning: does it reason first? {advice}"
        )
    if mark < _LEAST_MARK_OF_RIGHT:
        raise ValueError(f"the judge {judge.model} at {judge.url} gave {mark:g} to an answer that is right; {advice}")


def read_mark(answer: str) -> float | None:
    """The mark from 0 to 1 at the beginning of a judge's answer, as MM-Vet reads it; None where there is none."""
    try:
        mark = float(answer.strip().split(" ")[0])
    except ValueError:
        return None
    return mark if 0.0 <= mark <= 1.0 else None


def end_without_mark(process_results: Any) -> None:
    """Has MM-Vet's scorer take what it cannot read as a mark for silence, which a run reports.

    As shipped, it asks about a mark outside 0 to 1 again and again, for ever, and counts words without a mark as 0.

    Args:
        process_results: of the task; its module's `get_chat_response` is wrapped.
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
