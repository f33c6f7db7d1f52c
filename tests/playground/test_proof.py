"""The experiment of the miniature: its runner, its statistics, and that every step of every budget is there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.data.tokenization import preprocess_independent_turns
from llava.model import LlavaLlamaForCausalLM
from patch_aligned.intervals import resampled_over_seeds
from playground.mini.proof.ask import log_p
from playground.mini.proof.experiment import ARMS, BUDGETS, PRIMARY
from playground.mini.proof.finetune import by_scene
from playground.mini.proof.reproduce import steps_of
from playground.mini.proof.steps import Step, StepError, Steps
from playground.mini.proof.studies import boxed_tokens
from playground.mini.proof.summary import Bootstrap
from playground.mini.proof.tasks import detectability, score


def writes(name: str, text: str, *needs: str) -> Step:
    """A step that appends to the file of its name."""
    code = f"open(r'{{state}}/{name}', 'a').write('{text}')"
    return Step(name, (sys.executable, "-c", code), needs)


def run(folder: Path, *steps: Step) -> Steps:
    found = Steps(steps, folder, "test", jobs=2)
    found.run()
    return found


def test_a_second_run_does_nothing_and_a_changed_command_runs_with_what_needs_it(tmp_path: Path) -> None:
    first, second = writes("first", "a"), writes("second", "b", "first")
    run(tmp_path, first, second)
    assert run(tmp_path, first, second).pending == []
    assert ((tmp_path / "first").read_text(), (tmp_path / "second").read_text()) == ("a", "b")
    run(tmp_path, first, writes("second", "c", "first"))
    assert ((tmp_path / "first").read_text(), (tmp_path / "second").read_text()) == ("a", "bc")
    run(tmp_path, writes("first", "d"), writes("second", "c", "first"))
    assert ((tmp_path / "first").read_text(), (tmp_path / "second").read_text()) == ("ad", "bcc")


def test_a_step_runs_only_for_steps_that_are_not_done(tmp_path: Path) -> None:
    steps = writes("training", "a"), writes("measure", "b", "training")
    run(tmp_path, *steps)
    (tmp_path / "done" / "training.json").unlink()  # as where measures came from another machine
    assert Steps(steps, tmp_path, "test").pending == []


def test_a_failed_step_is_named_with_the_end_of_its_log_and_the_same_call_continues(tmp_path: Path) -> None:
    failing = Step("second", (sys.executable, "-c", "raise SystemExit('no scenes here')"), ("first",))
    with pytest.raises(StepError, match=r"(?s)second.*no scenes here"):
        run(tmp_path, writes("first", "a"), failing, writes("third", "c", "second"))
    assert not (tmp_path / "third").exists()
    assert Steps([writes("first", "a"), failing], tmp_path, "test").pending == ["second"]
    assert "second" in (tmp_path / "progress.html").read_text()


@pytest.mark.parametrize("name", BUDGETS)
def test_every_arm_and_seed_is_trained_and_measured_before_the_report(name: str) -> None:
    steps = steps_of(BUDGETS[name], name)
    assert len({step.name for step in steps}) == len(steps)
    before: set[str] = set()
    for step in steps:
        assert set(step.needs) <= before
        before.add(step.name)
    report = steps[-1]
    for arm in BUDGETS[name].arms:
        for seed in BUDGETS[name].seeds:
            assert f"measure {arm}, seed {seed}" in report.needs
    of_primary = {arm for pair in PRIMARY for arm in pair if BUDGETS[name].like is None}
    assert of_primary <= set(BUDGETS[name].arms) <= set(ARMS)


def test_no_two_sets_of_scenes_share_a_generator_seed() -> None:
    for budget in BUDGETS.values():
        assert len({draw.seed for draw in budget.draws.values()}) == len(budget.draws)


def test_intervals_draw_scenes_names_and_seeds() -> None:
    generator = np.random.default_rng(0)
    regions = pd.DataFrame({"image": np.repeat(np.arange(40), 3), "label": np.tile(np.arange(12), 10)})
    scores = [generator.normal(size=120) for _ in range(3)]
    scores[0][5] = np.nan
    bootstrap = Bootstrap(regions)
    found = bootstrap.mean(scores)
    means = [np.nanmean(of_seed) for of_seed in scores]
    np.testing.assert_allclose(found.of_seed, means, rtol=1e-12)
    assert found.value == pytest.approx(np.mean(means), rel=1e-12)

    # Every draw, by a loop over regions.
    draws = np.zeros((len(bootstrap.weights), 3))
    for column, of_seed in enumerate(scores):
        for row, weights in enumerate(bootstrap.weights):
            known = [(w, s) for w, s in zip(weights.tolist(), of_seed.tolist(), strict=True) if s == s]
            draws[row, column] = sum(w * s for w, s in known) / sum(w for w, _ in known)
    low, high = np.quantile(resampled_over_seeds(draws, seed=0), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.low < found.value < found.high
    assert bootstrap.difference(scores, scores).high == 0
    shifted = bootstrap.difference([of_seed + 2 for of_seed in scores], scores)
    np.testing.assert_allclose([shifted.value, shifted.low, shifted.high], 2, atol=1e-12)


def test_d_prime_is_that_of_two_normal_distributions_and_ignores_a_bias() -> None:
    generator = np.random.default_rng(0)
    is_present = np.arange(4000) % 2 == 0
    margins = generator.normal(size=4000) + 1.5 * is_present
    weights = np.stack([np.ones(4000), generator.integers(0, 3, size=4000).astype(float)])
    found = detectability(margins, is_present, weights)
    np.testing.assert_allclose(found, 1.5, atol=0.12)
    np.testing.assert_allclose(detectability(margins - 7, is_present, weights), found, rtol=1e-12)
    repeated = np.repeat(np.arange(4000), weights[1].astype(int))
    of_copies = detectability(margins[repeated], is_present[repeated], np.ones((1, len(repeated))))
    assert found[1] == pytest.approx(of_copies[0], rel=1e-9)


def test_scores_of_tasks_by_hand() -> None:
    questions = pd.DataFrame({"task": "name", "answer": [1, 0], "log_p": [[-2.0, -1.0], [-3.0, -2.0]]})
    weights = np.array([[1.0, 1.0], [3.0, 1.0]])
    np.testing.assert_allclose(score(questions, weights), [0.5, 0.75])
    captions = pd.DataFrame({"task": "caption", "answer": [0, 0], "log_p": [[-4.0], [-2.0]]})
    np.testing.assert_allclose(score(captions, weights), [-3.0, -3.5])


def test_questions_of_a_scene_become_one_dialogue() -> None:
    rounds = [[{"from": "human", "value": f"<image>\n{ask}"}, {"from": "gpt", "value": answer}]
              for ask, answer in (("Where?", "There."), ("Who?", "A cat."), ("Why?", "So."))]  # fmt: skip
    records = [{"id": str(row), "image": image, "conversations": rounds[row]} for row, image in enumerate("aab")]
    first, second = by_scene(records)
    assert [turn["value"] for turn in first["conversations"]] == ["<image>\nWhere?", "There.", "Who?", "A cat."]
    assert second == {"id": "b", "image": "b", "conversations": rounds[2]}


def test_log_p_of_an_answer_is_that_of_a_sample_of_its_own(golden_world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")
    model = LlavaLlamaForCausalLM.from_pretrained("tiny-llava", dtype=torch.float32).eval()
    model.get_vision_tower().load_model()
    texts = ["<image>\nWhat is it?", "A dog.", "Where?", "On the street, left."]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    arguments = SimpleNamespace(is_multimodal=True)
    template = conv_templates["v1"]

    def batch(dialogue: list[dict[str, str]]) -> dict[str, Any]:
        sample = preprocess_independent_turns(dialogue, tokenizer, template, arguments)
        image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
        rows = {key: tensor[None] for key, tensor in sample.items()}
        return {**rows, "attention_mask": torch.ones_like(rows["turns"]), "images": image, "image_sizes": [(56, 56)]}

    alone = [turns[:2], [{**turns[2], "value": "<image>\nWhere?"}, turns[3]]]
    expected = []
    for dialogue in alone:
        own = batch(dialogue)
        tokens = int((own["labels"] != IGNORE_INDEX).sum())
        del own["turns"]
        expected.append(-float(model(**own).loss.detach()) * tokens)
    np.testing.assert_allclose(log_p(model, batch(turns)), expected, rtol=1e-5)


def test_cells_that_a_box_covers_by_half() -> None:
    edges = (0.0, 10.0, 20.0, 30.0)
    boxes = np.array([[0, 0, 15, 10], [4, 0, 30, 30], [0, 0, 4, 30]])
    found = boxed_tokens(boxes, edges, edges)
    for row, (x0, y0, x1, y1) in enumerate(boxes):
        for cell in range(9):
            x, y = edges[cell % 3], edges[cell // 3]
            width, height = min(x1, x + 10) - max(x0, x), min(y1, y + 10) - max(y0, y)
            assert found[row, cell] == (max(width, 0) * max(height, 0) >= 50)
    assert boxed_tokens(np.zeros((0, 4)), edges, edges).shape == (0, 9)
