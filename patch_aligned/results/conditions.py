"""Under which conditions numbers came about, in words: what all cells of a table share once, the rest by column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from patch_aligned.results.run_file import RunResult

_PROMPT_CHARACTERS = 90
_FRAMES = {
    "square": "boxes read in the padded square and taken back to the image",
    "image": "boxes read in the image's own frame",
}


class Filled(NamedTuple):
    """A filled cell: where it stands and what it is from; `box_frame` is the reading that it shows."""

    column: str
    model: str
    result: RunResult
    box_frame: str | None = None


def conditions_of(cell: Filled) -> dict[str, str]:
    """What decided a number, by kind."""
    result, settings, data = cell.result, cell.result.settings, cell.result.data
    kind, colon, revision = (data.revision or "").rpartition(":")  # a commit, or `sha256:` and a hash
    at = f"@{kind}{colon}{revision[:12]}" if revision else ""
    return {
        "task": f"{result.harness.name} {result.harness.version}, task {result.task}",
        "rows": f"{data.rows:,} rows of {data.source}{at}, split {data.split}",
        "limit": f"cut by --limit {settings.limit}" if settings.limit is not None else "",
        "prompt": f"prompt “{shortened_prompt(settings.prompt)}”",
        "template": f"template {settings.conversation}",
        "boxes": _FRAMES[cell.box_frame] if cell.box_frame else "",
        "decoding": ("greedy" if settings.temperature == 0 else f"sampled at temperature {settings.temperature:g}")
        + f", at most {settings.max_new_tokens} new tokens",
        "numbers": f"{settings.dtype}, batch size {settings.batch_size}",
        "judge": f"judge {_judge_text(settings.judge)}" if settings.judge else "no judge",
    }


def shortened_prompt(prompt: str) -> str:
    """The question of a prompt: what follows its first image, on one line, its middle left out where it is long."""
    text = " ".join(prompt.partition("<image>")[2].split()) or " ".join(prompt.split())
    if len(text) <= _PROMPT_CHARACTERS:
        return text
    half = _PROMPT_CHARACTERS // 2
    return f"{text[:half].rpartition(' ')[0] or text[:half]} … {text[-half:].partition(' ')[2] or text[-half:]}"


def condition_notes(cells: Sequence[Filled]) -> list[str]:
    """Notes that give the conditions of each cell: what all share first, then what differs by column, and by model."""
    found = [(cell, conditions_of(cell)) for cell in cells]
    if not found:
        return []
    kinds = list(found[0][1])
    shared = [kind for kind in kinds if len({conditions[kind] for _, conditions in found}) == 1]
    columns = list(dict.fromkeys(cell.column for cell in cells))
    notes = []
    if texts := [found[0][1][kind] for kind in shared if found[0][1][kind]]:
        notes.append(f"{columns[0] if len(columns) == 1 else 'All columns'}: {'; '.join(texts)}.")
    columns_of: dict[str, list[str]] = {}
    for column in columns:
        here = [(cell.model, conditions) for cell, conditions in found if cell.column == column]
        texts = [text for kind in kinds if kind not in shared and (text := _by_model(here, kind))]
        if len({cell.result.data.rows_sha256 for cell in cells if cell.column == column}) > 1:
            texts.append("the models were asked different rows: their numbers do not compare")
        if texts:
            columns_of.setdefault("; ".join(texts), []).append(column)
    return [*notes, *(f"{', '.join(names)}: {text}." for text, names in columns_of.items())]


def _by_model(here: Sequence[tuple[str, dict[str, str]]], kind: str) -> str:
    by_text: dict[str, list[str]] = {}
    for model, conditions in here:
        by_text.setdefault(conditions[kind], []).append(model)
    if len(by_text) == 1:
        return next(iter(by_text))
    return ", ".join(f"{text} ({', '.join(models)})" for text, models in by_text.items() if text)


def _judge_text(judge: dict[str, object]) -> str:
    return str(judge.get("model") or ", ".join(f"{key} {value}" for key, value in judge.items()))
