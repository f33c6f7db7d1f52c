"""RAM's two text files: the tags in the order of the model's queries, and the threshold of each.

Neither is shipped with this package.
"""

from __future__ import annotations

from pathlib import Path

_WHERE = "It is ram/data/{name} of https://github.com/xinyu1205/recognize-anything: fetch it and name it with {flag}"
_WHERE_TAGS = _WHERE.format(name="ram_tag_list.txt", flag="--ram_tag_list")
_WHERE_THRESHOLDS = _WHERE.format(name="ram_tag_list_threshold.txt", flag="--ram_thresholds")


class TagListError(ValueError):
    """A tag list or a file of thresholds that is missing or broken, or doesn't belong to the model."""


def read_tag_list(path: Path) -> list[str]:
    """Tags, one a line.

    Raises:
        TagListError: names the file and the line of an empty or repeated tag.
    """
    first_line: dict[str, int] = {}
    for number, line in enumerate(_lines(path, _WHERE_TAGS), start=1):
        if not line:
            raise TagListError(f"{path}:{number}: found an empty line, expected a tag. {_WHERE_TAGS}")
        if line in first_line:
            raise TagListError(f"{path}:{number}: found {line!r} again, as in line {first_line[line]}. {_WHERE_TAGS}")
        first_line[line] = number
    return list(first_line)


def read_thresholds(path: Path) -> list[float]:
    """Thresholds of the tags' probabilities, one a line, in the tags' order. A tag with 1.0 is never given.

    Raises:
        TagListError: names the file and the line of what isn't a number from 0 to 1.
    """
    thresholds = []
    for number, line in enumerate(_lines(path, _WHERE_THRESHOLDS), start=1):
        try:
            threshold = float(line)
        except ValueError:
            threshold = float("nan")
        if not 0 <= threshold <= 1:
            raise TagListError(f"{path}:{number}: found {line!r}, expected a number from 0 to 1. {_WHERE_THRESHOLDS}")
        thresholds.append(threshold)
    return thresholds


def check_counts(tags: list[str], thresholds: list[float], num_tags: int) -> None:
    """Refuses tags or thresholds that are more or fewer than the model's queries.

    Raises:
        TagListError: names both counts.
    """
    for what, found, where in (
        ("tags", len(tags), _WHERE_TAGS),
        ("thresholds", len(thresholds), _WHERE_THRESHOLDS),
    ):
        if found != num_tags:
            raise TagListError(f"found {found} {what}, expected {num_tags}, as many as the model scores. {where}")


def _lines(path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise TagListError(f"{path}: found no such file. {where}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TagListError(f"{path}: found no UTF-8 text ({error}). {where}") from error
    return [line.strip() for line in text.splitlines()]
