"""Scores answers to POPE: is an object in the picture, yes or no.

    python -m llava.eval.eval_pope --annotation-dir pope/coco --question-file llava_pope_test.jsonl \\
        --result-file answers.jsonl

Answers are joined to questions by their id; where ids repeat, as POPE's own do across categories, answers must be in
the order of the questions. A question's label is the one at its place among the questions of its category, in
`coco_pope_CATEGORY.json`; where both name image and text, these must agree.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.command import command_parser, run_command
from llava.eval.vqa_files import checked_field, read_answers, read_jsonl, require_all_answered, write_result

LABEL_FILES = "coco_pope_*.json"


def scores_of(says_yes: Sequence[bool], is_yes: Sequence[bool]) -> dict[str, float]:
    """Return counts and shares of answers, by name; a share of nothing is 0."""
    pairs = list(zip(says_yes, is_yes, strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = _share(tp, tp + fp), _share(tp, tp + fn)
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": _share(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(tp + fp, len(pairs)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def text_of(scores: Mapping[str, float]) -> str:
    """Format scores as upstream prints them."""
    lines = ["TP\tFP\tTN\tFN\t", "\t".join(str(scores[name]) for name in ("tp", "fp", "tn", "fn"))]
    titles = {
        "Accuracy": "accuracy",
        "Precision": "precision",
        "Recall": "recall",
        "F1 score": "f1",
        "Yes ratio": "yes_ratio",
    }
    lines += [f"{title}: {scores[name]}" for title, name in titles.items()]
    lines.append(", ".join(f"{scores[name]:.3f}" for name in ("f1", "accuracy", "precision", "recall", "yes_ratio")))
    return "\n".join(lines)


def says_yes(text: str) -> bool:
    """Whether an answer says yes: its first sentence has none of the words "No", "no" and "not"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags, and where to write the scores."""
    parser = command_parser("llava.eval.eval_pope", __doc__)
    parser.add_argument("--annotation-dir", required=True, help=f"folder of {LABEL_FILES}")
    parser.add_argument("--question-file", required=True, help="the questions, JSON lines")
    parser.add_argument("--result-file", required=True, help="answers, by llava.eval.model_vqa_loader")
    parser.add_argument("--output-result", help="JSON file for the scores of each category")
    return parser


def read_labels(path: Path, questions: Sequence[dict[str, Any]], question_file: str) -> list[bool]:
    """Read whether the right answer is yes, for each question of the file's category."""
    labels = []
    records = read_jsonl(path, "POPE's labels")
    if len(records) != len(questions):
        raise ValueError(
            f"{path}: found {len(records)} labels, but {len(questions)} questions of this category in {question_file}; "
            "take both from the same release"
        )
    for number, (record, question) in enumerate(zip(records, questions, strict=True), start=1):
        where = f"{path}, record {number}"
        label = checked_field(record, "label", str, where)
        if label not in ("yes", "no"):
            raise ValueError(f"{where}, field `label`: found {label!r}, expected yes or no")
        for name in ("image", "text"):
            labelled, asked = record.get(name), question.get(name)
            if labelled is not None and asked is not None and not str(asked).startswith(str(labelled)):
                raise ValueError(f"{where}: labels {labelled!r}, but {question_file} asks about {asked!r}")
        labels.append(label == "yes")
    return labels


def score_files(annotation_dir: str, question_file: str, result_file: str) -> dict[str, dict[str, float]]:
    """Return the scores of each category, in the order of their names."""
    label_files = sorted(Path(annotation_dir).expanduser().glob(LABEL_FILES))
    if not label_files:
        raise FileNotFoundError(f"--annotation-dir {annotation_dir}: found no {LABEL_FILES}")
    questions = read_jsonl(question_file, "questions, one JSON object a line (--question-file)")
    for number, question in enumerate(questions, start=1):
        checked_field(question, "question_id", (str, int), f"{question_file}, record {number}")
        checked_field(question, "category", str, f"{question_file}, record {number}")
    answers = read_answers(result_file)
    ids = [question["question_id"] for question in questions]
    require_all_answered(ids, [answer["question_id"] for answer in answers], result_file, question_file)
    asked_as = [(answer["question_id"], answer.get("prompt")) for answer in answers]
    repeated = [name for name, times in Counter(ids).items() if times > 1]
    if repeated and asked_as != [(question["question_id"], question.get("text")) for question in questions]:
        raise ValueError(
            f"{question_file}: question_id {repeated[0]!r} comes several times, and {result_file} is not in the order "
            "of the questions, so its answers cannot be told apart; answer them again, or give each its own id"
        )
    texts_of: dict[Any, list[str]] = {}
    for answer in answers:
        texts_of.setdefault(answer["question_id"], []).append(answer["text"])
    answered = [(question, texts_of[question["question_id"]].pop(0)) for question in questions]
    scores = {}
    for path in label_files:
        category = path.stem.removeprefix("coco_pope_")
        asked = [(question, text) for question, text in answered if question["category"] == category]
        labels = read_labels(path, [question for question, _ in asked], question_file)
        scores[category] = scores_of([says_yes(text) for _, text in asked], labels)
    if strange := {question["category"] for question in questions} - scores.keys():
        raise FileNotFoundError(f"--annotation-dir {annotation_dir}: no labels for category {', '.join(strange)}")
    return scores


def main(args: argparse.Namespace) -> None:
    """Print the scores."""
    scores = score_files(args.annotation_dir, args.question_file, args.result_file)
    for category, score in scores.items():
        print(f"Category: {category}, # samples: {sum(score[name] for name in ('tp', 'fp', 'tn', 'fn'))}")
        print(text_of(score))
        print("====================================")
    write_result(args.output_result, scores, args.result_file, args.question_file)


if __name__ == "__main__":
    run_command(main, argument_parser())
