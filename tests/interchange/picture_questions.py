"""Functions of the tests' own lmms-eval tasks, as lmms-eval calls them; copied beside the YAML files as `utils.py`."""

from __future__ import annotations

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [] if doc["image"] is None else [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accepted": float(results[0].strip() in doc["accepted"])}
