"""lmms-eval's own `llava` adapter runs on this package: the answers are the model's, and no batch changes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from tests.eval.conftest import write_picture_task

pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")
pytestmark = pytest.mark.slow  # lmms-eval takes half a minute to start

MAX_NEW_TOKENS = 12
QUESTIONS: list[tuple[str, str | None]] = [
    ("What is in the picture?", "im0.png"),
    ("Is it night?", "im1.png"),
    ("Name three colours.", None),
    ("Where do the people walk, and what do they carry with them?", "im2.png"),
    ("Who is it?", "im3.png"),
    ("Which is larger, a boat or a bird? Answer with one word.", None),
    ("Describe the scene.", "im4.png"),
    ("How many?", "im5.png"),
    ("Count to ten.", None),
    ("What does the sign say?", "im6.png"),
]
TEXT_ROWS = [row for row, (_, image) in enumerate(QUESTIONS) if image is None]
WRONG_ROWS = (1, 2)  # rows whose accepted answer is one that the model does not give


class Outcome(NamedTuple):
    """What lmms-eval says of a task."""

    answers: list[str]
    score: float


@pytest.fixture
def tasks(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[str]]], None]:
    """Writes two tasks with the given accepted answers: `pictures`, and `originals`, which asks for unpadded images."""
    folder = golden_world / "tasks"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(golden_world / "hf"))

    def write(accepted: list[list[str]]) -> None:
        folder.mkdir()
        shutil.copy(Path(__file__).with_name("picture_questions.py"), folder / "utils.py")
        images = [None if name is None else {"bytes": Path("images", name).read_bytes()} for _, name in QUESTIONS]
        features = datasets.Features({"question": datasets.Value("string"), "image": datasets.Image()})
        table = datasets.Dataset.from_dict({"question": [q for q, _ in QUESTIONS], "image": images}, features=features)
        table.add_column("accepted", accepted).to_parquet(folder / "questions.parquet")
        for name, options in (("pictures", {}), ("originals", {"image_aspect_ratio": "original"})):
            generation = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, **options}
            write_picture_task(folder, name, folder / "questions.parquet", "accepted", generation)

    return write


MODEL = "pretrained=tiny-llava,device_map=auto,device=cpu"


def by_command(*tasks: str) -> list[Outcome]:
    """Runs `python -m lmms_eval --model llava` on the tiny checkpoint, row by row."""
    command = ["--model", "llava", "--model_args", MODEL, "--tasks", ",".join(tasks), "--include_path", "tasks",
               "--batch_size", "1", "--log_samples", "--output_path", "out"]  # fmt: skip
    environment = {"HF_HOME": str(Path("hf").resolve()), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *command],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    files = list(Path("out").rglob("*_results.json"))
    assert len(files) == 1, result.stderr[-3000:]  # a failed run exits with 0
    results = json.loads(files[0].read_text())["results"]
    outcomes = []
    for task in tasks:
        (samples,) = Path("out").rglob(f"*_samples_{task}.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        outcomes.append(Outcome([row["filtered_resps"] for row in rows], results[task]["accepted,none"]))
    return outcomes


def in_batches(task: str) -> Outcome:
    """The same in this process, eight rows at a time."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model="llava", model_args=MODEL, tasks=[task], batch_size=8,
        task_manager=TaskManager(include_path="tasks", include_defaults=False, model_name="llava"),
        cli_args=Namespace(output_path="out", process_with_media=True),
    )  # fmt: skip
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return Outcome([row["filtered_resps"][0] for row in rows], found["results"][task]["accepted,none"])


def own_answers(newline_before_text: bool = False) -> list[str]:
    """What the tiny checkpoint answers to each question alone, without lmms-eval."""
    tokenizer, model, processor, _ = load_pretrained_model("tiny-llava", None, "tiny-llava", device="cpu")
    answers = []
    for question, name in QUESTIONS:
        conversation = conv_templates["vicuna_v1"].copy()
        before = "<image>\n" if name else "\n" if newline_before_text else ""
        conversation.append_message("USER", before + question)
        conversation.append_message("ASSISTANT", None)
        ids: Any = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        images: Any = None
        if name:
            with Image.open(Path("images", name)) as image:
                images = process_images([image.convert("RGB")], processor, model.config)
            images = images.half()  # the adapter's cast, on CPUs too
        new_ids = model.generate(ids[None], images=images, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers.append(tokenizer.decode(new_ids[0], skip_special_tokens=True))
    return answers


def test_batches_of_1_and_8_give_the_models_own_answers_and_one_score(tasks: Any) -> None:
    alone = own_answers()
    # The adapter puts a newline before text without image, where another row of the batch has one.
    beside_images = own_answers(newline_before_text=True)
    assert [row for row, pair in enumerate(zip(alone, beside_images, strict=True)) if len(set(pair)) > 1] == TEXT_ROWS
    tasks([["no such answer"] if row in WRONG_ROWS else [alone[row], beside_images[row]] for row in range(10)])

    pictures, originals = by_command("pictures", "originals")
    assert pictures == (alone, 0.8)
    assert originals == (alone, 0.8)  # the config's own image_aspect_ratio, `pad`, is kept
    assert in_batches("pictures") == (beside_images, 0.8)


def test_a_checkpoint_without_aspect_ratio_takes_the_tasks(tasks: Any) -> None:
    config = json.loads(Path("tiny-llava/config.json").read_text())
    del config["image_aspect_ratio"]
    Path("tiny-llava/config.json").write_text(json.dumps(config))
    cropped = own_answers(newline_before_text=True)
    tasks([[answer] for answer in cropped])
    assert in_batches("originals") == (cropped, 1.0)
