"""lmms-eval's own scorers over local files in the hub's form: scores as worked out by hand, texts alike in any batch.

The tables hold what each scorer reads, about scenes of the miniature.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from PIL import Image

from playground.mini.scenes import compose_scene
from tests.eval.conftest import write_local_task

pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")
pytestmark = pytest.mark.slow  # lmms-eval takes a quarter of a minute to import

SIZES_WH = ((96, 96), (128, 96), (96, 144))


def scene(index: int) -> dict[str, Any]:
    """A picture as a cell of a table."""
    buffer = io.BytesIO()
    size_wh = SIZES_WH[index % len(SIZES_WH)]
    Image.fromarray(compose_scene(0, "heldout", "simple", index, size_wh)[0].picture).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


class Shipped(NamedTuple):
    """A shipped task over a table.

    Attributes:
        yaml: the task's file within lmms-eval.
        split: that it asks for.
        rows: of the table, without pictures, which are added.
        answers: of a model, row by row as the task asks them.
        scores: what these answers are worth.
        overrides: keys of the task that the hub's data sets need and local ones do not.
        without_picture: rows that have none.
    """

    yaml: str
    split: str
    rows: list[dict[str, Any]]
    answers: list[str]
    scores: dict[str, float]
    overrides: tuple[tuple[str, Any], ...] = ()
    without_picture: tuple[int, ...] = ()


def mme_row(category: str, pair: str, answer: str) -> dict[str, Any]:
    question = f"Is there a {pair}? Please answer yes or no."
    return {"question_id": f"{category}/{pair}", "question": question, "answer": answer, "category": category}


def choice(index: int, question: str, answer: str) -> dict[str, Any]:
    fixed = {"hint": "nan", "category": "count", "L2-category": "perception", "source": "mini", "split": "dev"}
    return {"index": index, "question": question, "answer": answer, "A": "one", "B": "two", "C": "three", "D": "nan",
            **fixed}  # fmt: skip


SHIPPED = {
    # A pair scores its share of right answers and once more if both are right, in per cent; a category the mean of
    # its pairs; then categories add up. Perception: existence (200 + 50) / 2, count 200. Cognition: 50.
    "mme": Shipped(
        "mme/mme.yaml",
        "test",
        [mme_row(*row) for row in (
            ("existence", "dog", "Yes"), ("existence", "dog", "No"),
            ("existence", "boat", "Yes"), ("existence", "boat", "No"),
            ("count", "tree", "Yes"), ("count", "tree", "No"),
            ("code_reasoning", "loop", "Yes"), ("code_reasoning", "loop", "No"),
        )],
        ["Yes", "No.", "yes", "Yes", "Yes, one.", "No, two.", "maybe", "no"],
        {"mme_perception_score": 325.0, "mme_cognition_score": 50.0},
    ),
    # Case and punctuation do not matter, other words do.
    "gqa": Shipped(
        "gqa/gqa.yaml",
        "testdev",
        [{"id": str(row), "imageId": str(row), "question": f"What is {place}?", "answer": answer}
         for row, (place, answer) in enumerate((("left", "dog"), ("right", "boat"), ("above", "sun"), ("there", "sea")))
        ],
        ["Dog.", "boat", "sun", "the sea"],
        {"exact_match": 0.75},
        overrides=(("process_docs", None),),  # the shipped one fetches the pictures from the hub
    ),
    # The letter, in either case or followed by a full stop, counts; a sentence does not. Some rows are text alone.
    "scienceqa": Shipped(
        "scienceqa/scienceqa.yaml",
        "test",
        [{"question": question, "hint": hint, "choices": ["wood", "glass", "stone"], "answer": answer}
         for question, hint, answer in (
             ("What is the tent made of?", "", 0), ("Which is clear?", "", 1), ("Which is hard?", "A wall.", 2),
             ("Which burns?", "Think of fire.", 0), ("Which breaks?", "", 1),
         )],
        ["A", "b", "C. stone", "The answer is A.", "A"],
        {"exact_match": 0.6},
        without_picture=(1, 4),
    ),
    # Ten people answered. Left out in turn, each of the ten leaves a share of a third for each other who said the same,
    # at most 1: said by ten 1, by three (3 * 2/3 + 7 * 1) / 10 = 0.9, by one (0 + 9 * 1/3) / 10 = 0.3, by none 0.
    "okvqa": Shipped(
        "ok_vqa/ok_vqa_val2014.yaml",
        "val2014",
        [{"question_id": row, "question": f"What is number {row}?",
          "answers": ["dog"] * said + [f"thing {other}" for other in range(10 - said)]}
         for row, said in enumerate((10, 3, 1, 0))],
        ["Dog", "a dog.", "dog", "dog"],
        {"exact_match": 0.55},
    ),
    # By the letter, or by the text of one choice alone.
    "mmbench": Shipped(
        "mmbench/mmbench_en_dev_static.yaml",
        "dev",
        [choice(row, question, answer) for row, (question, answer) in enumerate(
            (("How many dogs?", "A"), ("How many boats?", "B"), ("How many trees?", "C"), ("How many suns?", "A"),
             ("How many seas?", "B")))],
        ["A", "B. two", "There are three of them.", "no idea", "C"],
        {"gpt_eval_score": 60.0},
    ),
    # A row for each expression; boxes are read in 0..1 of the picture, 128 x 96 and 96 x 144. In turn: the padded
    # square's box for y from 1/3 to 2/3 is y from (32 + 16) / 128 to (64 + 16) / 128, IoU (1/4) / (1/3); the picture's
    # own, IoU 1; half of the box, IoU 1/2, which is enough; no box, IoU 0.
    "refcoco": Shipped(
        "refcoco/refcoco_bbox_rec_val.yaml",
        "val",
        [{"question_id": "0", "answer": ["left dog", "dog"], "bbox": [32.0, 32.0, 64.0, 32.0]},
         {"question_id": "1", "answer": ["boat", "small boat"], "bbox": [0.0, 0.0, 48.0, 72.0]}],
        ["[0.25, 0.375, 0.75, 0.625]", "It is at [0.25,0.3333333333333333,0.75,0.6666666666666666].",
         "[0, 0, 0.5, 0.25]", "on the left"],
        {"refcoco_IoU": 2.25 / 4, "refcoco_ACC@0.5": 0.75, "refcoco_ACC@0.7": 0.5, "refcoco_ACC@0.9": 0.25},
    ),
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of all tasks, named `local_...`, over tables that the hub could hold."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in SHIPPED.items():
        pictures = [None if row in task.without_picture else scene(row + 1) for row in range(len(task.rows))]
        rows = [{**row, "image": picture} for row, picture in zip(task.rows, pictures, strict=True)]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{name}.parquet")
        options = {**dict(task.overrides), "generation_kwargs": {"max_new_tokens": 8, "temperature": 0}}
        write_local_task(folder, task.yaml, f"local_{name}", task.split, folder / f"{name}.parquet", **options)
    return folder


def test_known_answers_score_as_worked_out_by_hand(tasks: Path, listed_model: Any, run_task: Any) -> None:
    for name, task in SHIPPED.items():
        listed_model.answers = task.answers
        found = run_task(listed_model, f"local_{name}", tasks)["results"][f"local_{name}"]
        assert {metric: found[f"{metric},none"] for metric in task.scores} == pytest.approx(task.scores), name


@pytest.mark.golden
def test_batches_of_1_and_8_give_the_same_texts(tasks: Path, golden_world: Path, texts_of_batches: Any) -> None:
    """Only text without a picture may differ: beside pictures in its batch, the adapter puts a newline before it."""
    from lmms_eval.models.simple.llava import Llava

    class Printable(Llava):
        """Without control characters, which a random model says and MMBench's spreadsheet for the server refuses."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            return ["".join(filter(str.isprintable, text)) for text in super().generate_until(requests)]

    answers = texts_of_batches(Printable, [f"local_{name}" for name in SHIPPED], tasks)
    for name, task in SHIPPED.items():
        alone_texts, together_texts = answers[1][f"local_{name}"], answers[8][f"local_{name}"]
        pairs = zip(alone_texts, together_texts, strict=True)
        differing = {row for row, (alone, together) in enumerate(pairs) if alone != together}
        assert differing <= set(task.without_picture), name
        assert len(alone_texts) == len(task.answers)
        assert len(set(alone_texts)) > 1, f"{name}: all answers alike show nothing"
