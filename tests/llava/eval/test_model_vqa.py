"""Upstream's commands: their files, prompts and flags; a killed run goes on as if nothing had happened."""

from __future__ import annotations

import base64
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llava.conversation import conv_templates, conversation_mode, template_named
from llava.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava.eval import vqa_cli as answering_command
from llava.eval.answering import Question, answer_questions
from llava.model import builder
from llava.model.builder import LoadedModel

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 3, "image": "im0.png", "text": "What is this?\nAnswer the question using a single word or phrase."},
    {"question_id": "b", "image": "im0.png", "text": "Is it night?"},
    {"question_id": 3, "image": "im1.png", "text": "And this?"},  # MME and TextVQA: the id names the image
    {"question_id": "none", "image": None, "text": "Name a colour."},
    {"question_id": 9, "image": "im2.png", "text": "Why?"},
]


@pytest.fixture
def flags(golden_world: Path) -> dict[str, Any]:
    Path("q.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS), encoding="utf-8")
    return {
        "model_path": "tiny-llava",
        "model_base": None,
        "question_file": "q.jsonl",
        "image_folder": "images",
        "answers_file": "new/folder/a.jsonl",
        "conv_mode": "v1",
        "num_chunks": 1,
        "chunk_idx": 0,
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 6,
        "device": "cpu",
        "batch_size": 2,
    }


def answer(flags: dict[str, Any], module: Any = model_vqa_loader, **changes: Any) -> None:
    module.eval_model(SimpleNamespace(**flags | changes))


def answered(path: str = "new/folder/a.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_answers_have_upstreams_keys_in_the_order_of_the_questions(flags: dict[str, Any], tiny: LoadedModel) -> None:
    answer(flags)
    answers = answered()
    assert [answer["question_id"] for answer in answers] == [3, "b", 3, "none", 9]
    assert [answer["prompt"] for answer in answers] == [question["text"] for question in QUESTIONS]
    assert all(
        list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"] for answer in answers
    )
    assert {answer["model_id"] for answer in answers} == {"tiny-llava"}
    assert len({answer["answer_id"] for answer in answers}) == 5
    asked = Question(9, "Why?", (Path("images/im2.png"),))
    settings = answering_command.GenerationSettings(max_new_tokens=6)
    assert answers[-1]["text"] == next(answer_questions([asked], *tiny[:3], conv_templates["v1"], settings)).text


def test_a_killed_run_goes_on_and_leaves_the_same_file(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answer(flags)
    path = Path(flags["answers_file"])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-9])  # killed while it wrote the third answer

    asked: list[Any] = []

    def watched(questions: list[Question], *rest: Any, **options: Any) -> Any:
        asked.extend(question.question_id for question in questions)
        return answer_questions(questions, *rest, **options)

    monkeypatch.setattr("llava.eval.answering.answer_questions", watched)
    answer(flags)
    assert asked == [3, "none", 9]
    assert path.read_bytes() == whole
    answer(flags, workers=1)
    assert len(asked) == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", ["settings", "template", "questions", "weights", "no origin", "broken origin"])
def test_answers_of_another_run_are_set_aside(flags: dict[str, Any], change: str) -> None:
    answer(flags)
    path = Path(flags["answers_file"])
    marked = path.read_bytes().replace(b'"text": "', b'"text": "old ')
    path.write_bytes(marked)
    if change == "settings":
        flags["max_new_tokens"] = 5
    elif change == "template":
        flags["conv_mode"] = "v0"
    elif change == "questions":
        Path("q.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n", encoding="utf-8")
    elif change == "weights":
        trained = {name: tensor + 1 for name, tensor in load_file("tiny-llava/model.safetensors").items()}
        save_file(trained, "tiny-llava/model.safetensors", metadata={"format": "pt"})
    elif change == "no origin":
        path.with_name("a.jsonl.run.json").unlink()
    else:
        path.with_name("a.jsonl.run.json").write_text("[1]")
    answer(flags)
    assert b"old " not in path.read_bytes()
    assert len(answered()) == (1 if change == "questions" else 5)
    assert path.with_name("a.jsonl.old").read_bytes() == marked


def test_answers_of_the_same_model_and_questions_are_kept_however_they_are_spelled(flags: dict[str, Any]) -> None:
    answer(flags)
    path = Path(flags["answers_file"])
    marked = path.read_bytes().replace(b'"text": "', b'"text": "old ')
    path.write_bytes(marked)
    Path("tiny-llava/README.md").touch()
    os.utime("tiny-llava/model.safetensors", (1, 1))
    flags |= {"model_path": "./tiny-llava/", "image_folder": str(Path("images").resolve())}
    answer(flags)
    assert path.read_bytes() == marked


def test_no_answers_are_ever_overwritten(flags: dict[str, Any]) -> None:
    path, kept = Path(flags["answers_file"]), []
    for mode in ("v0", "v1", "v0", "v1"):
        answer(flags, conv_mode=mode)
        kept.append(path.read_bytes())
    path.write_bytes(b"\n" + kept[-1])  # by an editor: no line of it can be continued
    answer(flags, conv_mode="v1")
    old = [path.with_name(f"a.jsonl.old{number}").read_bytes() for number in ("", 1, 2, 3)]
    assert old == [*kept[:3], b"\n" + kept[3]]


def test_a_run_that_cannot_start_leaves_old_answers_alone(flags: dict[str, Any]) -> None:
    answer(flags)
    whole = Path(flags["answers_file"]).read_bytes()
    with pytest.raises(FileNotFoundError):
        answer(flags, model_path="no-such-model")
    assert Path(flags["answers_file"]).read_bytes() == whole


def test_chunks_together_and_model_vqa_give_the_whole(flags: dict[str, Any]) -> None:
    answer(flags)
    whole = answered()
    parts: list[dict[str, Any]] = []
    for chunk in range(4):  # of 5 questions: 2, 2, 1 and none
        answer(flags, num_chunks=4, chunk_idx=chunk, answers_file=f"4_{chunk}.jsonl")
        parts += answered(f"4_{chunk}.jsonl")
    assert parts == whole
    answer(flags, model_vqa, answers_file="b.jsonl")
    assert answered("b.jsonl") == whole


def test_science_questions_with_and_without_an_image(flags: dict[str, Any]) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. one\nB. two"}, {"from": "gpt", "value": "A"}]
    text_turns = [{"from": "human", "value": "Context: x\nWhich?"}]
    records = [{"id": "4", "image": "im1.png", "conversations": turns}, {"id": "7", "conversations": text_turns}]
    Path("sqa.json").write_text(json.dumps(records), encoding="utf-8")
    answer(flags, model_vqa_science, question_file="sqa.json", single_pred_prompt=True, answer_prompter=False)
    letter = "Answer with the option's letter from the given choices directly."
    assert [answer["prompt"] for answer in answered()] == [
        f"<image>\nWhich?\nA. one\nB. two\n{letter}",
        f"Context: x\nWhich?\n{letter}",
    ]
    assert [answer["question_id"] for answer in answered()] == ["4", "7"]


def write_table(rows: list[dict[str, Any]], drop: str = "") -> None:
    names = [name for name in ("index", "question", "hint", "A", "B", "C", "D", "answer", "image") if name != drop]
    with Path("mmb.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def table_row(index: int, **cells: str) -> dict[str, Any]:
    image = base64.b64encode(Path("images/im1.png").read_bytes()).decode()
    return {
        "index": index,
        "question": "Which?",
        "hint": "",
        "A": "cat",
        "B": "dog",
        "answer": "A",
        "image": image,
        **cells,
    }


def test_mmbench_asks_once_for_each_place_of_the_options(flags: dict[str, Any]) -> None:
    write_table([table_row(5, hint="Look.", C='a "bird"\nor two'), table_row(8, hint="nan", C="None", D="never read")])
    answer(flags, model_vqa_mmbench, question_file="mmb.tsv", all_rounds=True, single_pred_prompt=True, lang="en")
    answers = answered()
    assert [(answer["question_id"], answer["round_id"]) for answer in answers] == [
        (5, 0),
        (5, 1),
        (5, 2),
        (8, 0),
        (8, 1),
    ]
    assert answers[1]["prompt"] == 'Look.\nWhich?\nA. dog\nB. a "bird"\nor two\nC. cat'
    assert answers[1]["options"] == ["dog", 'a "bird"\nor two', "cat"]
    assert answers[1]["option_char"] == ["B", "C", "A"]
    assert answers[3]["prompt"] == "Which?\nA. cat\nB. dog"
    keys = {"question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata"}
    assert set(answers[0]) == keys


@pytest.mark.parametrize(
    ("rows", "drop", "message"),
    [
        ([{}], "hint", r"mmb\.tsv: no column hint"),
        ([{"image": "%%%"}], "", r"mmb\.tsv, row 1: .*expected a number and an image as base64"),
        ([{}, {"image": "bm9uZQ=="}], "", r"mmb\.tsv, row 2: cannot identify image file .*expected a number and an"),
        ([{}, {"index": "x"}], "", r"mmb\.tsv, row 2: .*index 'x'"),
    ],
)
def test_a_broken_table_is_refused(flags: dict[str, Any], rows: list[dict[str, str]], drop: str, message: str) -> None:
    write_table([{**table_row(place), **cells} for place, cells in enumerate(rows)], drop)
    with pytest.raises(ValueError, match=message):
        answer(flags, model_vqa_mmbench, question_file="mmb.tsv")


# As upstream's scripts/v1_5/eval/*.sh call them.
COMMON = "--model-path m --question-file q --answers-file a --temperature 0 --conv-mode vicuna_v1"


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (model_vqa_loader, f"{COMMON} --image-folder i --num-chunks 8 --chunk-idx 7 --max_new_tokens 64 --top_p 0.9"),
        (model_vqa, f"{COMMON} --image-folder i --num_beams 3 --model-base b"),
        (model_vqa_science, f"{COMMON} --image-folder i --single-pred-prompt --answer-prompter"),
        (model_vqa_mmbench, f"{COMMON} --single-pred-prompt --lang cn --all-rounds"),
    ],
)
def test_upstreams_flags_are_read(module: ModuleType, flags: str) -> None:
    args = module.argument_parser().parse_args(flags.split())
    assert (args.model_path, args.temperature, args.conv_mode) == ("m", 0, "vicuna_v1")


def test_mmbench_asks_in_english_or_chinese(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model_vqa_mmbench.argument_parser().parse_args(f"{COMMON} --lang zh".split())
    assert "invalid choice: 'zh'" in capsys.readouterr().err


def test_defaults_are_upstreams() -> None:
    required = ["--model-path", "m"]
    for module, tokens in ((model_vqa_loader, 128), (model_vqa, 1024), (model_vqa_science, 1024)):
        args = module.argument_parser().parse_args(required)
        assert (args.temperature, args.top_p, args.num_beams, args.max_new_tokens) == (0.2, None, 1, tokens)


@pytest.mark.parametrize("name", ["llava-llama-2-tiny", "tiny"])
def test_all_tools_ask_a_checkpoint_in_the_same_template(
    name: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("tiny-llava").rename(name)
    modes = []
    for module in (answering_command, run_llava):
        monkeypatch.setattr(module, "template_named", lambda mode: modes.append(mode) or template_named(mode))
    flags |= {"model_path": name, "conv_mode": None}
    answer(flags)
    answer(flags, run_llava, query="What is this?", image_file="images/im0.png")
    assert modes == [conversation_mode(name, SimpleNamespace())] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_file": "nothing.jsonl"}, "nothing.jsonl: no such file; expected questions"),
        ({"conv_mode": "vicuna"}, "--conv-mode vicuna: no such template; did you mean vicuna_v1? There are"),
        ({"image_folder": "elsewhere"}, "question 3: no such image file elsewhere/im0.png (3 of 3 images are missing)"),
        ({"chunk_idx": 1}, "--chunk-idx 1: expected 0 to 0"),
        ({"batch_size": 0}, "batch_size: found 0, expected 1 or more"),
        ({"workers": 0}, "workers: found 0, expected 1 or more"),
        ({"top_p": 2.0}, "top_p: found 2.0, expected more than 0"),
        ({"device": "gpu"}, "device: found 'gpu', expected cuda, cuda:N, cpu"),
        ({"device": "cuda:99"}, "device: found 'cuda:99', but there are"),
        ({"answers_file": "images"}, "--answers-file images: found a folder, expected a file"),
        ({"answers_file": "q.jsonl/a.jsonl"}, "q.jsonl"),
        ({"question_file": "marked.jsonl"}, "question 'm': found 2 <image> in the text, expected 1"),
    ],
)
def test_wrong_input_is_one_sentence_before_the_model_is_loaded(
    flags: dict[str, Any], change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = {"question_id": "m", "image": "im0.png", "text": "Is <image> like <image>?"}
    Path("marked.jsonl").write_text(json.dumps(marked) + "\n", encoding="utf-8")
    monkeypatch.setattr(builder, "from_pretrained_strictly", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises((ValueError, OSError)) as caught:
        answer(flags | change)
    assert message in str(caught.value)
    assert not Path(flags["answers_file"]).exists()


def test_a_model_without_vision_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no vision tower"):
        answer(flags, model_path="tiny-vicuna")
    assert not Path(flags["answers_file"]).exists()


def test_a_second_process_is_kept_out_of_an_answers_file(flags: dict[str, Any]) -> None:
    answer(flags)
    path = Path(flags["answers_file"])
    whole = path.read_bytes()
    path.write_bytes(whole.splitlines(keepends=True)[0])  # where the other process is
    hold = f"import filelock; lock = filelock.FileLock('{path}.lock'); lock.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        with pytest.raises(BlockingIOError, match=r"a\.jsonl: another process is answering into it; wait for its end"):
            answer(flags)
        assert path.read_bytes() == whole.splitlines(keepends=True)[0]
        answer(flags, answers_file="new/folder/b.jsonl")
        other.kill()
    answer(flags)  # nothing is left of the killed process's hold
    assert path.read_bytes() == Path("new/folder/b.jsonl").read_bytes() == whole


def test_the_command_line_ends_with_the_sentence(run_python: Any) -> None:
    flags = ["--model-path", "tiny-llava", "--question-file", "x.jsonl"]
    result = run_python("-m", "llava.eval.model_vqa_loader", *flags)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: x.jsonl: no such file; expected questions")
    assert "Traceback" not in result.stderr
