"""What verification found, as files: all numbers as JSON, every problem as a line, and a page to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patch_aligned.annotations import AnnotatedImage
from patch_aligned.dataset.verify import Problem, Verification, VerifySettings, verify_file


def as_json(found: Verification) -> dict[str, Any]:
    """The report: settings, counts, and the first problems of each check."""
    settings = asdict(found.settings)
    settings["image_folder"] = found.settings.image_folder.as_posix() if found.settings.image_folder else None
    return {
        "file": found.file.as_posix(),
        "settings": settings,
        "records": found.records,
        "images": found.images,
        "images_without_regions": found.images_without_regions,
        "regions": found.regions,
        "errors": found.errors,
        "warnings": found.warnings,
        "counts": found.counts,
        "examples": {check: [asdict(problem) for problem in problems] for check, problems in found.examples.items()},
    }


def table_rows(found: Verification) -> list[tuple[str, str, str, str]]:
    """Severity, check, number and first example of each kind of problem, errors first."""
    rows = []
    for severity, counts in found.counts.items():
        for check, count in sorted(counts.items(), key=lambda item: -item[1]):
            example = next((str(problem) for problem in found.examples[check] if problem.severity == severity), "")
            rows.append((severity, check, f"{count:,}", example))
    return rows


def summary(found: Verification) -> str:
    """What was read and found, in one sentence."""
    checked = "the image files too" if found.settings.image_folder else "without the image files"
    return (
        f"{found.file}: {found.records:,} records, {found.images:,} of them keep the format, "
        f"{found.images_without_regions:,} without regions, {found.regions:,} regions; checked {checked}. "
        f"Errors: {found.errors:,}, warnings: {found.warnings:,}."
    )


def as_markdown(found: Verification) -> str:
    """The same as a page to read."""
    lines = ["# Verification", "", summary(found), ""]
    if rows := table_rows(found):
        lines += ["| severity | check | number | first |", "|---|---|--:|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines += ["", "Every problem is a line of `problems.jsonl`."]
    return "\n".join([*lines, ""])


def write_verification(
    path: Path,
    settings: VerifySettings,
    output: Path,
    watch: Callable[[Iterator[AnnotatedImage]], Iterable[AnnotatedImage]] = iter,
) -> Verification:
    """Verifies a file and writes `verify.json`, `verify.md` and `problems.jsonl` into the folder `output`.

    Raises:
        RecordFileError: if the file is missing.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "problems.jsonl").open("w", encoding="utf-8") as file:

        def write(problem: Problem) -> None:
            file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

        found = verify_file(path, settings, write, watch)
    text = json.dumps(as_json(found), indent=2, ensure_ascii=False)
    (output / "verify.json").write_text(text + "\n", encoding="utf-8")
    (output / "verify.md").write_text(as_markdown(found), encoding="utf-8")
    return found
