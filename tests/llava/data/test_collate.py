"""Batches from samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collate import SMALLEST_TEXT_BUDGET, DataCollatorForSupervisedDataset, check_sequence_budget
from llava.plugin import TrainingPlugin

PAD = 0


def sample(name: str, ids: list[int], **more: Any) -> dict[str, Any]:
    labels = [IGNORE_INDEX, *ids[1:]]
    return {"sample_id": name, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **more}


def image(value: float, side: int = 2) -> torch.Tensor:
    return torch.full((3, side, side), value)


@pytest.fixture
def collator() -> DataCollatorForSupervisedDataset:
    return DataCollatorForSupervisedDataset(SimpleNamespace(pad_token_id=PAD, model_max_length=6))


def test_rows_are_padded_on_the_right_and_masked_by_length(collator: DataCollatorForSupervisedDataset) -> None:
    batch = collator([sample("a", [1, PAD, 7]), sample("b", [1, 5, 6, 7, 8])])
    assert batch["input_ids"].tolist() == [[1, PAD, 7, PAD, PAD], [1, 5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[-100, PAD, 7, -100, -100], [-100, 5, 6, 7, 8]]
    # Difference: upstream masks the real token with the padding token's id, too.
    assert batch["attention_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch["sample_ids"] == ["a", "b"]
    assert set(batch) == {"input_ids", "labels", "attention_mask", "sample_ids"}


def test_rows_are_cut_at_the_longest_length(collator: DataCollatorForSupervisedDataset) -> None:
    batch = collator([sample("a", list(range(1, 10)))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]] and batch["labels"].shape == (1, 6)


def test_images_come_in_the_order_of_their_places(collator: DataCollatorForSupervisedDataset) -> None:
    batch = collator(
        [
            sample("a", [1, IMAGE_TOKEN_INDEX, 5], image=image(1), image_size=(4, 3)),
            sample("text", [1, 5]),
            sample(
                "two", [IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX], image=[image(2), image(3)], image_size=[(5, 5), (6, 6)]
            ),
        ]
    )
    assert batch["images"].shape == (3, 3, 2, 2)
    assert batch["images"][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert batch["image_sizes"] == [(4, 3), (5, 5), (6, 6)]


def test_images_of_different_shapes_stay_a_list(collator: DataCollatorForSupervisedDataset) -> None:
    rows = [sample("a", [IMAGE_TOKEN_INDEX], image=image(1, side), image_size=(side, side)) for side in (2, 3)]
    assert [picture.shape[-1] for picture in collator(rows)["images"]] == [2, 3]


def test_samples_of_other_datasets_need_no_name(collator: DataCollatorForSupervisedDataset) -> None:
    assert collator([{"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}])["sample_ids"] == ["row 0"]


def test_a_plugin_joins_one_entry_a_row() -> None:
    class Counting(TrainingPlugin):
        def collate(self, extras: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            return {"entries": torch.tensor([len(entry) for entry in extras])}

    collator = DataCollatorForSupervisedDataset(SimpleNamespace(pad_token_id=PAD, model_max_length=6), Counting())
    batch = collator([sample("a", [1], plugin_extras={"x": torch.ones(1)}), sample("b", [1], plugin_extras={})])
    assert batch["plugin_batch"]["entries"].tolist() == [1, 0]


def test_skipped_samples_are_left_out(collator: DataCollatorForSupervisedDataset) -> None:
    skipped = {"sample_id": "bad", "skipped": "unreadable"}
    assert collator([skipped, sample("good", [1, 2])])["sample_ids"] == ["good"]
    alone = collator([skipped, skipped])
    assert alone["input_ids"].tolist() == [[PAD]] and alone["labels"].tolist() == [[IGNORE_INDEX]]
    assert alone["sample_ids"] == ["bad"] and "images" not in alone


def test_a_cut_that_removes_an_image_names_the_sample(collator: DataCollatorForSupervisedDataset) -> None:
    late = sample("late", [1, 2, 3, 4, 5, 6, IMAGE_TOKEN_INDEX], image=image(1), image_size=(2, 2))
    with pytest.raises(ValueError, match="sample late: found 0 <image> among its first 6 tokens, expected 1"):
        collator([late])


def test_no_padding_token_is_refused() -> None:
    collator = DataCollatorForSupervisedDataset(SimpleNamespace(pad_token_id=None, model_max_length=6))
    with pytest.raises(ValueError, match="pad_token_id is None"):
        collator([sample("a", [1])])


def test_a_sequence_must_have_room_for_image_and_text() -> None:
    check_sequence_budget(576 + SMALLEST_TEXT_BUDGET, 576)
    with pytest.raises(ValueError, match="--model_max_length: found 512, expected at least 592"):
        check_sequence_budget(512, 576)
