"""Scores by hand or by counting one by one; answers are joined by id, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.eval import eval_pope, eval_science_qa, eval_textvqa
from llava.eval.eval_pope import says_yes, scores_of
from llava.eval.eval_science_qa import parse_letter
from llava.eval.eval_textvqa import prompt_processor
from llava.eval.m4c_evaluator import CONTRACTIONS, EvalAIAnswerProcessor, TextVQAAccuracyEvaluator


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def answer(question_id: Any, text: str, prompt: str = "?") -> dict[str, Any]:
    return {"question_id": question_id, "prompt": prompt, "text": text}


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes", True), ("No", False), ("no, it is", False), ("There is not one", False), ("Yes. no", True),
     ("Nothing", True), ("", True)],
)  # fmt: skip
def test_what_counts_as_yes(text: str, yes: bool) -> None:
    assert says_yes(text) == yes


def pope_files(tmp_path: Path) -> list[str]:
    """Two categories; labels yes, no, yes, no in each; all answers right but for the last of the second, "Yes"."""
    questions: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for category in ("popular", "random"):
        labels = []
        for place in range(4):
            label, text = ("yes", "no")[place % 2], f"Is there a thing {place}?"
            labels.append({"question_id": place + 1, "image": f"{place}.jpg", "text": text, "label": label})
            question_id = len(questions)
            questions.append(
                {"question_id": question_id, "image": f"{place}.jpg", "text": f"{text}\nShort.", "category": category}
            )
            answers.append(answer(question_id, "Yes" if question_id == 7 else label.capitalize()))
        write_jsonl(tmp_path / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(tmp_path / "q.jsonl", questions)
    write_jsonl(tmp_path / "a.jsonl", answers[::-1])  # answers come in any order
    return ["--annotation-dir", f"{tmp_path}/coco", "--question-file", f"{tmp_path}/q.jsonl"]


def test_pope_is_joined_by_id_and_printed_as_upstream_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*pope_files(tmp_path), "--result-file", f"{tmp_path}/a.jsonl", "--output-result", f"{tmp_path}/r.json"]
    eval_pope.main(eval_pope.argument_parser().parse_args(flags))
    printed = capsys.readouterr().out.split("====================================\n")
    assert printed[1] == (
        "Category: random, # samples: 4\nTP\tFP\tTN\tFN\t\n2\t1\t1\t0\n"
        "Accuracy: 0.75\nPrecision: 0.6666666666666666\nRecall: 1.0\nF1 score: 0.8\nYes ratio: 0.75\n"
        "0.800, 0.750, 0.667, 1.000, 0.750\n"
    )
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["popular"]["accuracy"] == 1
    assert written["random"]["f1"] == pytest.approx(0.8)


def test_ids_that_repeat_across_categories_are_joined_by_order_or_refused(tmp_path: Path) -> None:
    flags = pope_files(tmp_path)
    questions, answers = (
        sorted(map(json.loads, (tmp_path / name).read_text().splitlines()), key=lambda line: line["question_id"])
        for name in ("q.jsonl", "a.jsonl")
    )
    for question, line in zip(questions, answers, strict=True):
        line["prompt"] = question["text"]
        line["question_id"] = question["question_id"] = question["question_id"] % 4 + 1  # as in POPE's own files
    write_jsonl(tmp_path / "q.jsonl", questions)
    write_jsonl(tmp_path / "a.jsonl", answers)
    scores = eval_pope.score_files(flags[1], flags[3], f"{tmp_path}/a.jsonl")
    assert {category: score["accuracy"] for category, score in scores.items()} == {"popular": 1, "random": 0.75}
    write_jsonl(tmp_path / "a.jsonl", answers[::-1])
    with pytest.raises(ValueError, match="question_id 1 comes several times"):
        eval_pope.score_files(flags[1], flags[3], f"{tmp_path}/a.jsonl")


def test_scores_do_not_take_the_place_of_answers(tmp_path: Path) -> None:
    before = (pope_files(tmp_path), (tmp_path / "a.jsonl").read_bytes())[1]
    flags = [
        *pope_files(tmp_path),
        "--result-file",
        f"{tmp_path}/a.jsonl",
        "--output-result",
        f"{tmp_path}/x/../a.jsonl",
    ]
    with pytest.raises(FileExistsError, match=r"a\.jsonl"):
        eval_pope.main(eval_pope.argument_parser().parse_args(flags))
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_pope_model_that_never_says_yes_has_precision_0() -> None:
    scores = scores_of([False, False], [True, False])
    assert [scores[name] for name in ("precision", "recall", "f1", "accuracy")] == [0, 0, 0, 0.5]


def test_pope_questions_without_image_and_text_are_taken_by_their_place(tmp_path: Path) -> None:
    flags = pope_files(tmp_path)
    questions = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    expected = eval_pope.score_files(flags[1], flags[3], f"{tmp_path}/a.jsonl")
    write_jsonl(tmp_path / "q.jsonl", [{name: q[name] for name in ("question_id", "category")} for q in questions])
    assert eval_pope.score_files(flags[1], flags[3], f"{tmp_path}/a.jsonl") == expected


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("missing answer", "1 of 8 questions in"),
        ("other labels", "record 2: labels 'Is there another?', but"),
        ("fewer labels", "found 3 labels, but 4 questions of this category"),
        ("other folder", "found no coco_pope_*.json"),
        ("no labels of a category", "no labels for category random"),
    ],
)
def test_pope_files_that_do_not_belong_together_are_refused(tmp_path: Path, breakage: str, message: str) -> None:
    flags = pope_files(tmp_path)
    labels = tmp_path / "coco" / "coco_pope_random.json"
    lines = labels.read_text().splitlines(keepends=True)
    if breakage == "missing answer":
        path = tmp_path / "a.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    elif breakage == "other labels":
        labels.write_text(lines[0] + lines[1].replace("a thing 1", "another") + "".join(lines[2:]))
    elif breakage == "fewer labels":
        labels.write_text("".join(lines[:3]))
    elif breakage == "other folder":
        flags[1] = str(tmp_path)
    else:
        labels.unlink()
    args = eval_pope.argument_parser().parse_args([*flags, "--result-file", f"{tmp_path}/a.jsonl"])
    with pytest.raises((ValueError, OSError)) as caught:
        eval_pope.main(args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont walk", "don't walk"),
        ("couldnt've", "couldn't've"),
        ("lets go", "lets go"),  # not in the table
        ("dog's", "dog 's"),
        ("st. john", "st john"),
        ("3.5", "3.5"),
        ("a/b", "b"),  # the slash becomes a space, and the article goes
        ("x/ y", "x y"),
        ("1,000-2,000", "1000 2000"),
        ("line\nbreak", "line break"),
        (f"{'.' * 40}x", f"{'.' * 8}x"),  # no more than 32 full stops are removed
    ],
)
def test_normalised_answers(raw: str, normal: str) -> None:
    assert EvalAIAnswerProcessor()(raw) == normal


def test_contractions_have_one_apostrophe_less() -> None:
    assert len(CONTRACTIONS) == 114
    assert all(CONTRACTIONS[wrong].replace("'", "") == wrong.replace("'", "") for wrong in CONTRACTIONS)


@pytest.mark.parametrize("times", range(11))
def test_an_answer_is_scored_against_each_nine_of_ten_people(times: int) -> None:
    people = ["cat"] * times + [f"other {place}" for place in range(10 - times)]
    left_out = [people[:place] + people[place + 1 :] for place in range(10)]
    expected = sum(min(1.0, nine.count("cat") / 3) for nine in left_out) / 10
    assert TextVQAAccuracyEvaluator().score("The cat", people) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "prompt",
    [
        "What Is it?\nReference OCR token: A, B\nAnswer in a word.",
        "Reference OCR token: A, B\nWhat Is it?\nAnswer in a word.",
        "What Is it?\nAnswer in a word.",
        "OCR tokens: A, B. Question: What Is it? Short answer:",
    ],
)
def test_the_question_is_found_in_each_form_of_prompt(prompt: str) -> None:
    assert prompt_processor(prompt) == "what is it?"


def textvqa_files(tmp_path: Path) -> tuple[str, str]:
    """Two questions about one image: one answered as all people do, one as two of ten do."""
    data = [
        {"image_id": "i", "question": "What?", "answers": ["stop"] * 10},
        {"image_id": "i", "question": "Who?", "answers": ["anna"] * 2 + ["bo"] * 8},
    ]
    (tmp_path / "tv.json").write_text(json.dumps({"data": data}))
    write_jsonl(tmp_path / "run.jsonl", [answer("i", "Anna", "Who?\nShort."), answer("i", "STOP", "What?\nShort.")])
    return f"{tmp_path}/tv.json", f"{tmp_path}/run.jsonl"


def test_textvqa_is_joined_by_image_and_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, results = textvqa_files(tmp_path)
    flags = ["--annotation-file", annotations, "--result-dir", str(tmp_path), "--output-result", f"{tmp_path}/r.json"]
    eval_textvqa.main(eval_textvqa.argument_parser().parse_args(flags))
    second = (2 * (1 / 3) + 8 * (2 / 3)) / 10
    assert capsys.readouterr().out == f"run\nSamples: 2\nAccuracy: {50 * (1 + second):.2f}%\n\nSkipping tv.json\n"
    written = json.loads((tmp_path / "r.json").read_text())["accuracy"][results]
    assert written == pytest.approx((1 + second) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([answer("i", "x", "What?\nShort.")], "1 of 2 questions in"),
        ([answer("i", "x", "When?\nShort.")], "such as ('i', 'when?'); is it another split?"),
        ([answer("i", "x", "When?")], "record 1: found the prompt 'When?', expected the question on a line"),
        ([answer("i", "x", "What?\nShort.")] * 2, "1 questions have more than one answer"),
    ],
)
def test_textvqa_answers_that_do_not_fit_are_refused(
    tmp_path: Path, answers: list[dict[str, Any]], message: str
) -> None:
    annotations, results = textvqa_files(tmp_path)
    write_jsonl(Path(results), answers)
    with pytest.raises(ValueError) as caught:
        eval_textvqa.eval_single(annotations, results)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("B. dog", "B"), ("B.", "FAILED"), ("So: The answer is C.", "C"), ("The answer is C", "FAILED"),
     ("The answer is A. The answer is B.", "FAILED"), ("dog", "FAILED"), ("F", "FAILED")],
)  # fmt: skip
def test_the_letter_of_an_answer(text: str, letter: str) -> None:
    assert parse_letter(text, list("ABCDE")) == letter


def science_files(tmp_path: Path, answers: list[dict[str, Any]]) -> list[str]:
    problems = {str(place): {"choices": ["x", "y"], "answer": place % 2} for place in range(4)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(
        json.dumps({"test": ["0", "1", "2"], "minitest": ["0", "2"], "val": ["3"]})
    )
    write_jsonl(tmp_path / "a.jsonl", answers)
    return ["--base-dir", str(tmp_path), "--result-file", f"{tmp_path}/a.jsonl"]


def test_science_accuracies_and_files_are_upstreams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [answer("2", "C", "<image>\nq"), answer("0", "A", "<image>\nq"), answer("1", "The answer is B.", "q")]
    flags = science_files(tmp_path, answers)
    flags += ["--output-file", f"{tmp_path}/o.json", "--output-result", f"{tmp_path}/r.json"]
    eval_science_qa.main(eval_science_qa.argument_parser().parse_args(flags))
    assert capsys.readouterr().out == "Total: 3, Correct: 2, Accuracy: 66.67%, IMG-Accuracy: 50.00%\n"
    result = json.loads((tmp_path / "r.json").read_text())
    assert result == {
        "acc": pytest.approx(200 / 3),
        "correct": 2,
        "count": 3,
        "results": {"0": 0, "1": 1, "2": -1},  # C is none of two choices
        "outputs": {"0": "A", "1": "The answer is B.", "2": "C"},
    }
    assert json.loads((tmp_path / "o.json").read_text())["incorrect"] == [
        {
            "question_id": "2",
            "parsed_ans": "C",
            "ground_truth": "A",
            "question": "<image>\nq",
            "pred": "C",
            "is_multimodal": True,
        }
    ]


@pytest.mark.parametrize("options", ["AA", "A", ""])
def test_odd_letters_of_options_are_refused(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base-dir", "d", "--result-file", "r", "--options", options]
    with pytest.raises(SystemExit):
        eval_science_qa.argument_parser().parse_args(flags)
    assert "--options" in capsys.readouterr().err


def test_letters_of_options_may_have_commas_and_must_suffice(tmp_path: Path) -> None:
    flags = science_files(tmp_path, [answer(str(name), "A") for name in range(3)])
    assert eval_science_qa.argument_parser().parse_args([*flags, "--options", "A, B,C"]).options == ["A", "B", "C"]
    problems = {str(place): {"choices": ["x", "y", "z"], "answer": 2} for place in range(4)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ValueError, match="problem 0: found 3 choices, but --options has 2"):
        eval_science_qa.main(eval_science_qa.argument_parser().parse_args([*flags, "--options", "AB"]))


@pytest.mark.parametrize(
    ("answers", "flags", "message"),
    [
        ([answer("0", "A"), answer("2", "A")], [], "are to split minitest, not test: pass --split minitest"),
        ([answer("0", "A")], [], "2 of 3 questions in split test"),
        ([answer("3", "A")], [], "are to split val, not test: pass --split val"),
        ([answer("0", "A")], ["--split", "dev"], "--split dev: no such split in"),
    ],
)
def test_science_answers_to_another_split_are_refused(
    tmp_path: Path, answers: list[dict[str, Any]], flags: list[str], message: str
) -> None:
    args = eval_science_qa.argument_parser().parse_args([*science_files(tmp_path, answers), *flags])
    with pytest.raises(ValueError) as caught:
        eval_science_qa.main(args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"answer": 0}, "problem 1: no field `choices`"),
        ({"choices": ["x", "y"], "answer": 2}, "problem 1, field `answer`: found 2, but there are 2 choices"),
    ],
)
def test_a_broken_science_problem_is_named(tmp_path: Path, problem: dict[str, Any], message: str) -> None:
    science_files(tmp_path, [])
    path = tmp_path / "problems.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "1": problem}))
    with pytest.raises(ValueError) as caught:
        eval_science_qa.read_split(str(tmp_path), "test", ["0"])
    assert message in str(caught.value)


@pytest.mark.parametrize("how", ["module", "file"])
def test_scorers_run_as_modules_and_as_upstreams_scripts_call_them(tmp_path: Path, how: str) -> None:
    flags = [*pope_files(tmp_path), "--result-file", f"{tmp_path}/none.jsonl"]
    program = ["-m", "llava.eval.eval_pope"] if how == "module" else [str(eval_pope.__file__)]
    result = subprocess.run([sys.executable, *program, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "none.jsonl: no such file; expected answers" in result.stderr
    assert "Traceback" not in result.stderr
