"""Scores answers to ScienceQA.

    python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file answers.jsonl \\
        --output-file output.json --output-result result.json

`--base-dir` holds ScienceQA's `pid_splits.json` and `problems.json`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.command import command_parser, run_command
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.vqa_files import checked_field, read_answers, read_json, require_all_answered, write_result

NOT_PARSED = "FAILED"


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags."""
    parser = command_parser("llava.eval.eval_science_qa", __doc__)
    parser.add_argument("--base-dir", required=True, help="folder of pid_splits.json and problems.json")
    parser.add_argument("--result-file", required=True, help="answers, by llava.eval.model_vqa_science")
    parser.add_argument("--output-file", help="JSON file for each answer, right ones and wrong ones apart")
    parser.add_argument("--output-result", help="JSON file for the scores")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--options", type=letters, default="ABCDE", help="letters of the options; default: ABCDE")
    return parser


def letters(text: str) -> list[str]:
    """Parse `--options`: letters such as `ABCDE`, with or without commas or spaces in between."""
    found = list(re.sub(r"[\s,]", "", text))
    if len(set(found)) < max(len(found), 2):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected different letters, such as ABCDE")
    return found


def parse_letter(text: str, options: Sequence[str]) -> str:
    """Return the letter of an answer that is the letter, begins with `A. `, or says "The answer is A." once."""
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    # upstream parity: any character, not only a full stop, must follow the letter.
    said = re.findall(r"The answer is ([A-Z]).", text)
    return said[0] if len(said) == 1 else NOT_PARSED


def score(
    problems: dict[str, Any], answers: dict[str, Any], options: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return scores, and correct and incorrect answers as upstream writes them. Problems and answers are by id."""
    sides: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    chosen_of: dict[str, int] = {}
    for problem_id, problem in problems.items():
        answer = answers[problem_id]
        letter = parse_letter(answer["text"], options)
        letters = options[: len(problem["choices"])]
        chosen = letters.index(letter) if letter in letters else -1
        chosen_of[problem_id] = chosen
        sides["correct" if chosen == problem["answer"] else "incorrect"].append(
            {
                "question_id": problem_id,
                "parsed_ans": letter,
                "ground_truth": options[problem["answer"]],
                "question": answer["prompt"],
                "pred": answer["text"],
                "is_multimodal": DEFAULT_IMAGE_TOKEN in answer["prompt"],
            }
        )
    correct = len(sides["correct"])
    result = {
        "acc": correct / len(problems) * 100,
        "correct": correct,
        "count": len(problems),
        "results": chosen_of,
        "outputs": {problem_id: answers[problem_id]["text"] for problem_id in problems},
    }
    return result, sides


def read_split(base_dir: str, split: str, answered: Sequence[str], most: int = 5) -> dict[str, Any]:
    """Read a split's problems by id, with at most `most` choices. `answered` are ids, which may be of another split."""
    splits_file, problems_file = Path(base_dir) / "pid_splits.json", Path(base_dir) / "problems.json"
    ids_of = read_json(splits_file, "ids of each split of ScienceQA", dict)
    if split not in ids_of:
        raise ValueError(f"--split {split}: no such split in {splits_file}; there are {', '.join(ids_of)}")
    if set(answered) != set(ids_of[split]):  # `minitest` is a part of `test`
        same = [name for name, ids in ids_of.items() if set(answered) == set(ids)]
        if same:
            raise ValueError(f"the {len(answered)} answers are to split {same[0]}, not {split}: pass --split {same[0]}")
    if not set(answered) & set(ids_of[split]):
        others = [name for name, ids in ids_of.items() if set(answered) <= set(ids)]
        hint = f"; they are to {others[0]}: pass --split {others[0]}" if others else ""
        raise ValueError(f"none of the {len(answered)} answers is to a question of split {split}{hint}")
    problems = read_json(problems_file, "ScienceQA's problems by id", dict)
    for name in ids_of[split]:
        where = f"{problems_file}, problem {name}"
        problem = checked_field(problems, name, dict, str(problems_file))
        choices, right = checked_field(problem, "choices", list, where), checked_field(problem, "answer", int, where)
        if len(choices) > most:
            raise ValueError(f"{where}: found {len(choices)} choices, but --options has {most} letters; pass more")
        if not 0 <= right < len(choices):
            raise ValueError(f"{where}, field `answer`: found {right}, but there are {len(choices)} choices, from 0 on")
    return {name: problems[name] for name in ids_of[split]}


def main(args: argparse.Namespace) -> None:
    """Print the accuracies and write the files."""
    answers = read_answers(args.result_file)
    for number, answer in enumerate(answers, start=1):
        checked_field(answer, "prompt", str, f"{args.result_file}, record {number}")
    ids = [str(answer["question_id"]) for answer in answers]
    problems = read_split(args.base_dir, args.split, ids, len(args.options))
    require_all_answered(problems, ids, args.result_file, f"split {args.split} of {args.base_dir}")
    result, sides = score(problems, dict(zip(ids, answers, strict=True)), args.options)
    shown = {side: sum(answer["is_multimodal"] for answer in sides[side]) for side in sides}
    with_image = shown["correct"] + shown["incorrect"]
    image_accuracy = shown["correct"] / with_image * 100 if with_image else float("nan")
    print(
        f"Total: {result['count']}, Correct: {result['correct']}, Accuracy: {result['acc']:.2f}%, "
        f"IMG-Accuracy: {image_accuracy:.2f}%"
    )
    write_result(args.output_file, sides, args.result_file)
    write_result(args.output_result, result, args.result_file)


if __name__ == "__main__":
    run_command(main, argument_parser())
