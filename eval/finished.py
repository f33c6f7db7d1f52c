"""Whether the run that a folder holds is the one that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.preflight import PreflightError
from patch_aligned.results.run_file import RESULT_FILE, ModelIdentity, RunResult, read_run


def finished_run(
    folder: Path,
    model: ModelIdentity,
    conversation: str,
    dtype: str,
    max_new_tokens: int,
    limit: int | None,
    further: Callable[[RunResult], Mapping[str, tuple[Any, Any]]],
) -> RunResult | None:
    """The run in a folder, or None where there is none.

    Args:
        folder: of the run.
        model: the weights that are asked for; the arguments after it are the settings.
        conversation: name of the template.
        dtype: of the weights.
        max_new_tokens: of an answer.
        limit: at most so many rows.
        further: gives what else must agree: by a word for it, what a run has and what is asked for.

    Raises:
        PreflightError: the folder holds a run of another model or of other settings.
    """
    if not (folder / RESULT_FILE).is_file():
        return None
    there = read_run(folder)
    compared: dict[str, tuple[Any, Any]] = {
        "weights (SHA-256)": (there.model.sha256, model.sha256),
        "base": (there.model.base, model.base),
        "base's weights (SHA-256)": (there.model.base_sha256, model.base_sha256),
        "conversation": (there.settings.conversation, conversation),
        "dtype": (there.settings.dtype, dtype),
        "length of answers": (there.settings.max_new_tokens, max_new_tokens),
        "limit": (there.settings.limit, limit),
        **further(there),
    }
    for what, (found, wanted) in compared.items():
        if found != wanted:
            raise PreflightError(
                f"{folder}: holds a run with another {what}: found {found!r}, asked for {wanted!r}; next: another "
                "--output, or --again to replace it"
            )
    return there
