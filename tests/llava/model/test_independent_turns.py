"""Samples that share a row: questions behind one image (`--independent_turns`) and others (`--pack_samples`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.collate import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.data.records import RecordError
from llava.model import LlavaLlamaForCausalLM
from llava.model.language_model import causal_lm
from llava.model.multimodal_merge import MergedBatch, pack

VISUAL_TOKENS = 16
QUESTIONS = [
    ["What is on the left?", "A dog."],
    ["Is it raining?", "No, the sun is out and the street is dry."],
    ["How many people are there?", "Two."],
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.data.records.HF_HOME", str(tmp_path / "cache"))


def dialogue(questions: list[list[str]]) -> list[dict[str, str]]:
    turns = [
        {"from": who, "value": text} for pair in questions for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return [{**turns[0], "value": f"<image>\n{turns[0]['value']}"}, *turns[1:]]


def without_image(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**turn, "value": turn["value"].replace("<image>\n", "")} for turn in turns]


def batch_of(records: list[dict[str, Any]], world: Path, version: str, independent_turns: bool) -> dict[str, Any]:
    """A batch of all records, in double precision."""
    (world / "data.json").write_text(json.dumps(records))
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")
    tokenizer.model_max_length, tokenizer.pad_token = 2048, tokenizer.unk_token
    arguments = SimpleNamespace(
        image_folder="images", image_aspect_ratio="pad", is_multimodal=True, mm_use_im_start_end=False,
        independent_turns=independent_turns,
    )  # fmt: skip
    dataset = LazySupervisedDataset(
        world / "data.json", tokenizer, arguments,
        conversation=conv_templates[version], image_processor=AutoImageProcessor.from_pretrained("tiny-clip"),
    )  # fmt: skip
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[row] for row in range(len(dataset))])
    return {**batch, "images": batch["images"].double()}


def loss_and_gradients(
    batch: dict[str, Any], attention: str, packs_samples: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    model = LlavaLlamaForCausalLM.from_pretrained("tiny-llava", dtype=torch.float64, attn_implementation=attention)
    model.get_vision_tower().load_model()
    model.get_vision_tower().requires_grad_(False)
    model.get_model().packs_samples = packs_samples
    loss = model.double().train()(**batch).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "v0"])
def test_gradients_are_those_of_a_sample_a_question(golden_world: Path, version: str, attention: str) -> None:
    names = [path.name for path in sorted((golden_world / "images").iterdir()) if path.suffix == ".png"][:2]
    scenes = [(names[0], QUESTIONS), (names[1], QUESTIONS[:2])]
    text = {"id": "text", "conversations": without_image(dialogue(QUESTIONS[1:]))}
    joined = [{"id": name, "image": name, "conversations": dialogue(pairs)} for name, pairs in scenes]
    single = [{**record, "conversations": dialogue([pair])}
              for record, (_, pairs) in zip(joined, scenes, strict=True) for pair in pairs]  # fmt: skip
    expected_loss, expected = loss_and_gradients(batch_of([*single, text], golden_world, version, False), attention)
    batch = batch_of([*joined, text], golden_world, version, True)
    assert len(batch["input_ids"]) == 3 and int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == 2
    loss, gradients = loss_and_gradients(batch, attention)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)  # the loss is summed in float32
    assert gradients.keys() == expected.keys() and any("mm_projector" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
    # The control: with the turns of an ordinary dialogue, later questions see earlier answers.
    dependent, _ = loss_and_gradients(batch_of([*joined, text], golden_world, version, False), attention)
    assert abs(float((dependent - expected_loss).detach())) > 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("independent_turns", [False, True])
@pytest.mark.parametrize("as_one_row", [False, True])
def test_packed_samples_train_as_a_padded_batch(
    golden_world: Path, attention: str, independent_turns: bool, as_one_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sorted((golden_world / "images").iterdir())[0].name
    records = [{"id": str(count), "image": name, "conversations": dialogue(QUESTIONS[:count])} for count in (3, 1, 2)]
    records[1:1] = [{"id": f"text {count}", "conversations": without_image(dialogue(QUESTIONS[:count]))}
                    for count in (1, 3, 1, 2)]  # fmt: skip
    batch = batch_of(records, golden_world, "v1", independent_turns)
    expected_loss, expected = loss_and_gradients(batch, attention)

    rows: list[MergedBatch] = []
    is_apart = True

    def watched_pack(merged: MergedBatch, capacity: int) -> MergedBatch:
        rows.append(pack(merged, 10**6 if as_one_row else capacity))  # one row, as for flash attention
        positions = torch.arange(rows[0].position_ids.shape[1]).expand_as(rows[0].position_ids)
        return rows[0] if is_apart else replace(rows[0], position_ids=positions)

    monkeypatch.setattr(causal_lm, "pack", watched_pack)
    loss, gradients = loss_and_gradients(batch, attention, packs_samples=True)
    shape = rows[0].position_ids.shape  # [B, L]
    assert shape[0] == 1 if as_one_row else shape[0] < len(records)
    assert int(rows[0].attention_mask.sum()) == int(batch["attention_mask"].sum()) + 3 * (VISUAL_TOKENS - 1)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)  # the loss is summed in float32
    assert gradients.keys() == expected.keys()
    for weight, gradient in gradients.items():
        assert (gradient - expected[weight]).abs().max() <= 1e-6 * expected[weight].abs().max(), weight
    # The control: without restarting positions, samples see those before them.
    is_apart = False
    rows.clear()
    dependent, _ = loss_and_gradients(batch, attention, packs_samples=True)
    assert abs(float((dependent - expected_loss).detach())) > 1e-6


@pytest.mark.parametrize("value", ["Where?", "<image>\n<image>\nWhere?"])
def test_a_dialogue_needs_one_image_before_its_questions(golden_world: Path, value: str) -> None:
    name = sorted((golden_world / "images").iterdir())[0].name
    record = {"id": "a", "image": [name] * max(value.count("<image>"), 1)}
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "There."}]
    if "<image>" not in value:
        turns += dialogue(QUESTIONS[:1])
    with pytest.raises(RecordError, match="expected one, in the first turn"):
        batch_of([{**record, "conversations": turns}], golden_world, "v1", True)


def test_a_template_without_questions_has_one_turn(golden_world: Path) -> None:
    record = {"id": "a", "image": sorted((golden_world / "images").iterdir())[0].name}
    batch_of([{**record, "conversations": dialogue(QUESTIONS[:1])}], golden_world, "plain", True)
    with pytest.raises(RecordError, match="expected two"):
        batch_of([{**record, "conversations": dialogue(QUESTIONS)}], golden_world, "plain", True)
