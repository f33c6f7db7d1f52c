"""Scores on the miniature's benchmarks without looking at the pictures: the numbers to compare a score with."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pyarrow import parquet

from eval.benchmarks import ROOT
from eval.mini.scoring import EXACT_MATCH, score_count, score_existence, score_short
from eval.rec.boxes import ACCURACY, score_answer
from llava.command import command_parser, run_command
from patch_aligned.tables import Cell, Table

OUT = ROOT / "playground" / "data" / "mini" / "eval"
TRAIN = ROOT / "playground" / "data" / "mini" / "train"
# Benchmark -> category of its questions in the training scenes, and its score.
SHORT: dict[str, tuple[str, Callable[[str, str], dict[str, Any]]]] = {
    "counting": ("count", score_count),
    "existence": ("existence", score_existence),
    "colour": ("colour", score_short),
    "position": ("position", score_short),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Baselines:
    """Scores without looking at pictures, 0..1; None for boxes where it is not defined."""

    chance: float | None  # any of the occurring answers, all equally likely
    constant: float  # always the most frequent answer; for boxes, the mean box of the training scenes
    # The most frequent answer to the same question in the training scenes; if it was not asked there, to its category.
    question_alone: float | None


def short_answer_baselines(name: str, rows: Sequence[Row], training: Iterable[tuple[str, str]]) -> Baselines:
    """Baselines of `exact_match` of the benchmark `name` with short answers.

    `rows` have `question` and `answer`; `training` are questions and answers of the same category.
    """
    score = SHORT[name][1]
    answers = Counter(row["answer"] for row in rows)
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    of_kind: Counter[str] = Counter()
    for question, answer in training:
        by_question[question][answer] += 1
        of_kind[answer] += 1

    def mean_score(answer_to: Callable[[str], str]) -> float:
        return fmean(score(answer_to(row["question"]), row["answer"])[EXACT_MATCH] for row in rows)

    constant = answers.most_common(1)[0][0]
    return Baselines(
        chance=1 / len(answers),
        constant=mean_score(lambda _: constant),
        question_alone=mean_score(lambda question: by_question.get(question, of_kind).most_common(1)[0][0]),
    )


def box_baselines(rows: Sequence[Row], training_boxes: Sequence[Sequence[float]]) -> Baselines:
    """Baselines of `acc@0.5 padded frame undone`; the training scenes' boxes are in 0..1 of the padded square."""
    mean_box = str([round(fmean(edge), 2) for edge in zip(*training_boxes, strict=True)])
    scores = [score_answer(mean_box, row["box_xyxy_px"], row["width"], row["height"]) for row in rows]
    return Baselines(None, fmean(score[ACCURACY["square"]] for score in scores), None)


def read_baselines(data: Path = OUT, train: Path = TRAIN) -> dict[str, tuple[int, Baselines]]:
    """Number of rows and baselines of each benchmark of the evaluation set at `data`."""
    questions = [json.loads(line) for line in (train / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(line) for line in (train / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    training: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        training[question["category"]].append((question["text"], answer["answer"]))
    found = {}
    for name, (category, _) in SHORT.items():
        rows = _read_columns(data / f"{name}.parquet", "question", "answer")
        found[name] = (len(rows), short_answer_baselines(name, rows, training[category]))
    rows = _read_columns(data / "rec.parquet", "box_xyxy_px", "width", "height")
    referring = json.loads((train / "referring.json").read_text(encoding="utf-8"))
    found["rec"] = (len(rows), box_baselines(rows, [record["bbox_square01"] for record in referring]))
    return found


def _read_columns(path: Path, *columns: str) -> list[Row]:
    with path.open("rb") as file:
        return parquet.read_table(file, columns=list(columns)).to_pylist()


def as_table(found: dict[str, tuple[int, Baselines]]) -> Table:
    """A table in per cent."""
    rows = []
    for name, (count, baselines) in found.items():
        shares = (baselines.chance, baselines.constant, baselines.question_alone)
        cells = ["–" if share is None else f"{100 * share:.1f}" for share in shares]
        rows.append(list(map(Cell, (f"mini_{name}", str(count), *cells))))
    return Table("Baselines", ("task", "rows", "chance", "constant answer", "question alone"), rows)


def print_baselines(arguments: argparse.Namespace) -> None:
    """The command."""
    try:
        found = read_baselines(arguments.data, arguments.train)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {error.filename}; next: bash scripts/prepare_mini.sh") from error
    print(as_table(found).markdown())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_parser("eval.mini.baselines", __doc__)
    parser.add_argument("--data", type=Path, default=OUT, help="evaluation set (default: playground/data/mini/eval)")
    parser.add_argument("--train", type=Path, default=TRAIN, help="scenes (default: playground/data/mini/train)")
    run_command(print_baselines, parser, argv)


if __name__ == "__main__":
    main()
