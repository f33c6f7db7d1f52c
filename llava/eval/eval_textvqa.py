"""Scores answers to TextVQA by the accuracy of the VQA challenges.

    python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl

An answer's `question_id` names the image, so answers are joined by it and the question in their prompt.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from llava.command import command_parser, run_command
from llava.eval.m4c_evaluator import HUMAN_ANSWERS, TextVQAAccuracyEvaluator
from llava.eval.vqa_files import checked_field, read_answers, read_json, require_all_answered, write_result

Key = tuple[str, str]
"""Image id, and the question in lower case."""


def argument_parser() -> argparse.ArgumentParser:
    """Upstream's flags, and where to write the scores."""
    parser = command_parser("llava.eval.eval_textvqa", __doc__)
    parser.add_argument("--annotation-file", required=True, help="TextVQA's own JSON")
    parser.add_argument("--result-file", help="answers, by llava.eval.model_vqa_loader")
    parser.add_argument("--result-dir", help="score each *.jsonl in this folder")
    parser.add_argument("--output-result", help="JSON file for the accuracies by result file")
    return parser


def prompt_processor(prompt: str) -> str:
    """Return the question of a prompt of LLaVA's question files, in lower case.

    Raises:
        ValueError: the prompt is of none of these forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match:
            return match.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"found the prompt {prompt[:200]!r}, expected the question on a line of its own and then what kind of answer "
        "is wanted, with a line `Reference OCR token: ` or without"
    )


def read_annotations(path: str) -> list[tuple[Key, list[str]]]:
    """Read the human answers, by image and question, in order."""
    data = checked_field(read_json(path, "TextVQA's annotations", dict), "data", list, path)
    annotations = []
    for number, record in enumerate(data, start=1):
        where = f"{path}, data[{number - 1}]"
        answers = checked_field(record, "answers", list, where)
        if len(answers) != HUMAN_ANSWERS:
            raise ValueError(f"{where}, field `answers`: found {len(answers)}, expected {HUMAN_ANSWERS} human answers")
        key = (checked_field(record, "image_id", str, where), checked_field(record, "question", str, where).lower())
        annotations.append((key, answers))
    return annotations


def key_of(answer: dict[str, Any], where: str) -> Key:
    """Return image and question of an answer, which identify it."""
    try:
        return str(answer["question_id"]), prompt_processor(checked_field(answer, "prompt", str, where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def eval_single(annotation_file: str, result_file: str) -> float:
    """Print and return the accuracy, 0 to 1, of one file of answers."""
    annotations = read_annotations(annotation_file)
    answers = read_answers(result_file)
    keys = [key_of(answer, f"{result_file}, record {number}") for number, answer in enumerate(answers, start=1)]
    require_all_answered([key for key, _ in annotations], keys, result_file, annotation_file)
    human_answers = dict(annotations)
    print(Path(result_file).stem)
    evaluator = TextVQAAccuracyEvaluator()
    accuracy = evaluator.eval_pred_list(
        [{"pred_answer": a["text"], "gt_answers": human_answers[key]} for a, key in zip(answers, keys, strict=True)]
    )
    print(f"Samples: {len(answers)}\nAccuracy: {100 * accuracy:.2f}%\n")
    return accuracy


def main(args: argparse.Namespace) -> None:
    """Score the files that the flags name."""
    if args.result_file is None and args.result_dir is None:
        raise ValueError("nothing to score: pass --result-file or --result-dir")
    accuracies = {}
    if args.result_file is not None:
        accuracies[args.result_file] = eval_single(args.annotation_file, args.result_file)
    if args.result_dir is not None:
        for path in sorted(Path(args.result_dir).expanduser().iterdir()):
            if path.suffix != ".jsonl":
                print(f"Skipping {path.name}")
                continue
            accuracies[str(path)] = eval_single(args.annotation_file, str(path))
    write_result(args.output_result, {"accuracy": accuracies}, *accuracies, args.annotation_file)


if __name__ == "__main__":
    run_command(main, argument_parser())
