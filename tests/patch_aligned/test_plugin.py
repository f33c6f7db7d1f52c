"""The plugin from training record to losses, on small images and a small token grid."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, HfArgumentParser

from llava.plugin import AlignmentContext, ImageView
from patch_aligned.masks import PatchMaskError
from patch_aligned.pad import AnnotationError
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.plugin import PatchAlignedPlugin
from tests.pads import rle_of

GRID = (4, 4)
SIDE = 32
D = 6
VIEW = ImageView((SIDE, SIDE), "crop", SIDE, SIDE, SIDE, GRID)  # a token is 8 x 8 pixels of the image


def label_at(tag: str, rows: slice, cols: slice, size_wh: tuple[int, int] = (SIDE, SIDE)) -> dict[str, Any]:
    mask = np.zeros(size_wh[::-1], dtype=np.uint8)
    mask[rows, cols] = 1
    return {"tag": tag, "bbox": [0, 0, 1, 1], "rle_mask": rle_of(mask)}


WATER = label_at("water", slice(0, 8), slice(0, 16))  # tokens 0 and 1
LIGHT = label_at("traffic light", slice(16, 32), slice(24, 32))  # tokens 11 and 15
HALF_CELL = label_at("dog", slice(8, 16), slice(4, 12))  # half of tokens 4 and 5
SPECK = label_at("bird", slice(0, 3), slice(0, 3))  # no token
RECORDS = [
    {"image_id": "a.jpg", "size": [SIDE, SIDE], "caption": "a", "labels": [WATER, SPECK, LIGHT]},
    {"image_id": "b.jpg", "size": [SIDE, SIDE], "caption": "b", "labels": []},
    {"image_id": "c.jpg", "size": [SIDE, SIDE], "caption": "c", "labels": [HALF_CELL]},
    {
        "image_id": "wide.jpg",
        "size": [32, 16],
        "caption": "d",
        "labels": [label_at("sea", slice(0, 8), slice(0, 8), (32, 16))],
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "goldens" / "llava" / "tiny-vicuna")


@pytest.fixture
def make_plugin(tmp_path: Path, tokenizer: Any):
    def make(records: Any = RECORDS, training: Any = None, output_dir: Path | None = None, **flags: Any):
        pad = tmp_path / "pad.json"
        pad.write_text(json.dumps(records))
        data = pad
        if training is not None:
            data = tmp_path / "train.json"
            data.write_text(json.dumps(training))
            flags.setdefault("patch_data_path", str(pad))
        plugin = PatchAlignedPlugin()
        arguments = PatchArguments(patch_cache_dir=str(tmp_path / "cache"), **flags)
        plugin.setup(arguments, tokenizer, data_path=str(data), output_dir=output_dir)
        return plugin

    return make


def label_ids(tokenizer: Any, *labels: str) -> list[list[int]]:
    return [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]


class WordTable(torch.nn.Embedding):
    """A table that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__(2000, D, dtype=torch.float64)
        self.asked = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.asked += 1
        return super().forward(ids)


def context_of(visual_tokens: Tensor, rows: list[int], table: WordTable) -> AlignmentContext:
    return AlignmentContext(visual_tokens, torch.tensor(rows, dtype=torch.int64), GRID, table)


def test_regions_are_found_by_image_path_in_both_kinds_of_record(make_plugin: Any):
    plugin = make_plugin(training=[{"id": "1", "image": "a.jpg", "conversations": []}])
    by_training_record = plugin.transform_sample({"id": "1", "image": "a.jpg"}, VIEW)
    by_pad_record = plugin.transform_sample(RECORDS[0], VIEW)
    assert by_pad_record.keys() == by_training_record.keys()
    for key, value in by_pad_record.items():
        assert torch.equal(value, by_training_record[key]), key


def test_a_sample_holds_covered_tokens_and_label_ids_and_drops_uncovering_regions(make_plugin: Any, tokenizer: Any):
    plugin = make_plugin()
    extra = plugin.transform_sample({"image": "a.jpg"}, VIEW)
    assert [row.nonzero().flatten().tolist() for row in extra["region_tokens"]] == [[0, 1], [11, 15]]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("water", "traffic light")]
    assert extra["label_ids"].tolist() == expected[0] + expected[1]
    assert extra["label_lengths"].tolist() == [len(ids) for ids in expected]
    assert extra["region_position"].tolist() == [0, 2]
    assert extra["counts"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(("min_coverage", "tokens"), [(0.5, [4, 5]), (0.51, [])])
def test_the_threshold_is_inclusive(make_plugin: Any, min_coverage: float, tokens: list[int]):
    plugin = make_plugin(patch_min_coverage=min_coverage)
    covered = plugin.transform_sample({"image": "c.jpg"}, VIEW)["region_tokens"]
    assert covered.any(dim=0).nonzero().flatten().tolist() == tokens


def test_masks_follow_the_image_s_geometry(make_plugin: Any):
    """A 32 x 16 image whose left upper 8 x 8 pixels are sea, on a 4 x 4 grid."""
    plugin = make_plugin()
    padded = plugin.transform_sample(RECORDS[3], ImageView((32, 16), "pad", SIDE, SIDE, SIDE, GRID))
    assert padded["region_tokens"][0].nonzero().flatten().tolist() == [4]  # below 8 rows of padding
    squeezed = plugin.transform_sample(RECORDS[3], ImageView((32, 16), "squeeze", SIDE, SIDE, SIDE, GRID))
    assert squeezed["region_tokens"][0].nonzero().flatten().tolist() == [0, 4]
    cropped = plugin.transform_sample(RECORDS[3], ImageView((32, 16), "crop", SIDE, SIDE, SIDE, GRID))
    assert len(cropped["region_tokens"]) == 0 and cropped["counts"].tolist() == [0, 1, 0]  # cut off


def test_loss_and_metrics_of_a_mixed_batch(make_plugin: Any, tokenizer: Any):
    """Rows: text, a.jpg, no record, b.jpg without regions, c.jpg. Only two images count."""
    plugin = make_plugin()
    names = [None, "a.jpg", "unknown.jpg", "b.jpg", "c.jpg"]
    batch = plugin.collate([plugin.transform_sample({"image": name}, VIEW) if name else {} for name in names])
    table, visual_tokens = WordTable(), torch.randn(4, 16, D, dtype=torch.float64, requires_grad=True)
    output = plugin.auxiliary_losses(context_of(visual_tokens, [1, 2, 3, 4], table), batch)

    def cosine(image: int, tokens: list[int], tag: str) -> Tensor:
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        words = table.weight[ids].detach().mean(dim=0)
        return torch.cosine_similarity(visual_tokens[image, tokens].mean(dim=0), words, dim=0)

    water, light, dog = cosine(0, [0, 1], "water"), cosine(0, [11, 15], "traffic light"), cosine(3, [4, 5], "dog")
    expected = ((1 - (water + light) / 2) + (1 - dog)) / 2
    torch.testing.assert_close(output.losses["patch"], expected, rtol=1e-12, atol=0)
    metrics = {name: value.item() for name, value in output.metrics.items()}
    words = torch.stack(
        [table.weight[ids].mean(dim=0) for ids in label_ids(tokenizer, "water", "traffic light", "dog")]
    )
    means = [visual_tokens[image, tokens].mean(dim=0) for image, tokens in ((0, [0, 1]), (0, [11, 15]), (3, [4, 5]))]
    cosines = torch.stack([torch.cosine_similarity(mean, words, dim=1) for mean in means])  # [R, L]
    contrast = (3 * cosines.trace() - cosines.sum()) / 6
    assert metrics.pop("patch/contrast") == pytest.approx(contrast.item(), rel=1e-12)
    nearest = [row.index(max(row)) for row in cosines.tolist()]
    assert metrics.pop("patch/retrieval") == pytest.approx(sum(map(int.__eq__, nearest, range(3))) / 3, rel=1e-6)
    norm = visual_tokens.norm(dim=-1).mean() / words.norm(dim=-1).mean()
    assert metrics.pop("patch/norm") == pytest.approx(norm.item(), rel=1e-12)
    assert metrics.pop("patch/cosine") == pytest.approx(((water + light + dog) / 3).item(), rel=1e-12)
    assert metrics == {
        "patch/regions": 3,
        "patch/dropped_regions": 1,
        "patch/images_without_record": 1,
        "patch/skipped_images": 0,
    }
    assert table.asked == 1
    output.losses["patch"].backward()
    assert visual_tokens.grad is not None and visual_tokens.grad[0].any() and not visual_tokens.grad[1].any()
    assert table.weight.grad is None


def test_regions_of_a_row_with_several_images_belong_to_its_first(make_plugin: Any):
    plugin = make_plugin()
    batch = plugin.collate([plugin.transform_sample(RECORDS[2], VIEW), plugin.transform_sample(RECORDS[0], VIEW)])
    visual_tokens = torch.randn(5, 16, D, dtype=torch.float64, requires_grad=True)
    output = plugin.auxiliary_losses(context_of(visual_tokens, [0, 0, 0, 1, 1], WordTable()), batch)
    output.losses["patch"].backward()
    assert visual_tokens.grad is not None
    assert visual_tokens.grad.flatten(1).any(dim=1).tolist() == [True, False, False, True, False]


def test_regions_of_a_row_whose_image_is_missing_take_no_part(make_plugin: Any):
    plugin = make_plugin()
    batch = plugin.collate([plugin.transform_sample(RECORDS[number], VIEW) for number in (0, 2)])
    visual_tokens, table = torch.randn(1, 16, D, dtype=torch.float64), WordTable()
    found = plugin.auxiliary_losses(context_of(visual_tokens, [1], table), batch)
    alone = plugin.collate([{}, plugin.transform_sample(RECORDS[2], VIEW)])
    expected = plugin.auxiliary_losses(context_of(visual_tokens, [1], table), alone)
    torch.testing.assert_close(found.losses["patch"], expected.losses["patch"], rtol=1e-12, atol=0)


def test_a_label_of_several_regions_is_embedded_once(make_plugin: Any, tokenizer: Any):
    records = [{**RECORDS[0], "labels": [WATER, LIGHT, {**HALF_CELL, "tag": "water"}]}, RECORDS[2]]
    plugin = make_plugin(records)
    batch = plugin.collate([plugin.transform_sample(record, VIEW) for record in records])
    assert batch["region_label"].tolist() == [0, 1, 0, 2]
    ids = [row[:length].tolist() for row, length in zip(batch["label_ids"], batch["label_lengths"], strict=True)]
    assert ids == label_ids(tokenizer, "water", "traffic light", "dog")


def test_infonce_is_added_with_its_weight(make_plugin: Any):
    flags = {"patch_loss": "cosine+nce", "patch_nce_weight": 0.5, "patch_nce_temperature": 0.3}
    plain, contrastive = make_plugin(), make_plugin(**flags)
    batch = plain.collate([plain.transform_sample(RECORDS[number], VIEW) for number in (0, 2)])
    context = context_of(torch.randn(2, 16, D, dtype=torch.float64), [0, 1], WordTable())
    cosine, both = (plugin.auxiliary_losses(context, batch) for plugin in (plain, contrastive))
    assert "patch/nce" not in cosine.metrics and both.metrics["patch/nce"] > 0
    expected = cosine.losses["patch"] + 0.5 * both.metrics["patch/nce"]
    torch.testing.assert_close(both.losses["patch"], expected, rtol=1e-12, atol=0)


def test_synonyms_are_no_negatives(make_plugin: Any, tokenizer: Any):
    plugin = make_plugin([{**RECORDS[0], "labels": [WATER, {**LIGHT, "tag": "dog"}]}], patch_loss="cosine+nce")
    batch, table = plugin.collate([plugin.transform_sample(RECORDS[0], VIEW)]), WordTable()
    context = context_of(torch.randn(1, 16, D, dtype=torch.float64), [0], table)
    [[*water], [*dog]] = label_ids(tokenizer, "water", "dog")
    with torch.no_grad():
        table.weight[dog], table.weight[water] = torch.eye(D, dtype=torch.float64)[:2]
        assert plugin.auxiliary_losses(context, batch).metrics["patch/nce"] > 0
        table.weight[water] = table.weight[dog] + 0.5 * table.weight[water]  # a cosine of 0.89
        assert plugin.auxiliary_losses(context, batch).metrics["patch/nce"] == 0


def test_no_constant_vector_has_a_higher_cosine_than_the_floor(make_plugin: Any, tokenizer: Any, monkeypatch: Any):
    """Over the regions of the whole file, so that a frequent label counts more; also where it is read in pieces."""
    monkeypatch.setattr("patch_aligned.train.objective._LABELS_AT_ONCE", 2)
    plugin, table = make_plugin([{**RECORDS[0], "labels": [WATER, WATER, LIGHT, SPECK]}]), WordTable()
    [floor] = plugin.initial_metrics(table).values()
    tags = label_ids(tokenizer, "water", "water", "traffic light", "bird")
    units = torch.nn.functional.normalize(torch.stack([table.weight[ids].mean(dim=0) for ids in tags]), dim=1).detach()
    best = units.mean(dim=0)
    assert floor == pytest.approx(torch.cosine_similarity(units, best[None]).mean().item(), rel=1e-6)
    others = best + 0.1 * torch.randn(100, D, dtype=torch.float64)
    assert max(torch.cosine_similarity(units, other[None]).mean().item() for other in others) < floor


@pytest.mark.parametrize("images", [0, 2])
def test_a_batch_without_regions_still_asks_the_table_and_gives_a_connected_zero(make_plugin: Any, images: int):
    plugin = make_plugin()
    batch = plugin.collate([plugin.transform_sample({"image": "b.jpg"}, VIEW) if images else {}, {}])
    table, visual_tokens = WordTable(), torch.randn(images, 16, D, requires_grad=True)
    output = plugin.auxiliary_losses(context_of(visual_tokens, [0, 1][:images], table), batch)
    assert table.asked == 1
    assert output.losses["patch"].item() == 0 and output.losses["patch"].requires_grad
    unreported = ("patch/cosine", "patch/contrast", "patch/retrieval", "patch/norm")
    assert all(output.metrics[name].isnan() for name in unreported)


def test_the_batch_holds_no_floating_point(make_plugin: Any):
    """DeepSpeed casts all floats of a batch to the model's type."""
    plugin = make_plugin()
    batch = plugin.collate([plugin.transform_sample(RECORDS[0], VIEW), {}])
    assert not [key for key, value in batch.items() if value.is_floating_point()]


def test_beta_is_linear_and_exact_at_both_ends():
    plugin = PatchAlignedPlugin()
    plugin.arguments = PatchArguments(patch_beta_start=1.7, patch_beta_end=3.9)
    assert plugin.loss_weights(0.0) == {"patch": 1.7}
    assert plugin.loss_weights(1.0) == {"patch": 3.9}
    assert plugin.loss_weights(0.25)["patch"] == pytest.approx(1.7 + 0.25 * 2.2, rel=1e-12)


def test_a_record_of_another_size_is_named_with_its_hint(make_plugin: Any):
    plugin = make_plugin()
    with pytest.raises(PatchMaskError) as caught:
        plugin.transform_sample({"image": "wide.jpg"}, ImageView((16, 32), "pad", SIDE, SIDE, SIDE, GRID))
    message = str(caught.value)
    assert "pad.json" in message and "'wide.jpg'" in message and "swapped" in message
    assert "[32, 16]" in message and "[16, 32]" in message


def test_skipping_trains_an_image_of_another_size_without_regions_and_counts_it(make_plugin: Any, caplog: Any):
    plugin = make_plugin(patch_on_error="skip")
    with caplog.at_level(logging.WARNING):
        extra = plugin.transform_sample({"image": "wide.jpg"}, ImageView((16, 32), "pad", SIDE, SIDE, SIDE, GRID))
    assert extra["counts"].tolist() == [0, 0, 1] and extra["region_tokens"].shape == (0, 16)
    assert "wide.jpg" in caplog.text


def test_broken_records_stop_the_run_or_are_listed_beside_its_output(make_plugin: Any, tmp_path: Path):
    records = [*RECORDS, {**RECORDS[0], "image_id": "e.jpg", "size": [SIDE, SIDE - 1]}]
    with pytest.raises(
        AnnotationError, match=r"1 broken records.*rejected\.jsonl(.|\n)*'e\.jpg'(.|\n)*--patch_on_error skip"
    ):
        make_plugin(records)
    plugin = make_plugin(records, patch_on_error="skip", output_dir=tmp_path / "out")
    assert plugin.transform_sample({"image": "e.jpg"}, VIEW)["counts"].tolist() == [1, 0, 0]
    listed = [json.loads(line) for line in (tmp_path / "out" / "patch_skipped.jsonl").read_text().splitlines()]
    assert [entry["image_id"] for entry in listed] == ["e.jpg"]


def test_a_training_file_that_no_region_belongs_to_is_refused(make_plugin: Any):
    with pytest.raises(ValueError, match=r"no image that has a region(.|\n)*'images/a\.jpg'.*'a\.jpg'"):
        make_plugin(training=[{"image": "images/a.jpg", "conversations": []}])


def test_a_training_file_without_regions_asks_for_the_pad_file(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "a.jpg", "conversations": []}]))
    with pytest.raises(ValueError, match="--patch_data_path"):
        PatchAlignedPlugin().setup(PatchArguments(), tokenizer, data_path=str(path))


def test_the_share_of_images_with_regions_is_logged_at_the_start(make_plugin: Any, caplog: Any):
    with caplog.at_level(logging.INFO):
        make_plugin(training=[{"image": name} for name in ("a.jpg", "a.jpg", "b.jpg", "none.jpg")])
    assert "2 of 4 training images (50.0%) have regions" in caplog.text


def test_the_plugin_travels_to_spawned_workers(make_plugin: Any):
    plugin = make_plugin()
    copy = pickle.loads(pickle.dumps(plugin))
    expected, found = (p.transform_sample({"image": "a.jpg"}, VIEW) for p in (plugin, copy))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_flags_are_read_from_the_command_line():
    (arguments,) = HfArgumentParser(PatchArguments).parse_args_into_dataclasses(
        ["--patch_data_path", "pad.json", "--patch_beta_end", "2", "--patch_on_error", "skip"]
    )
    assert (arguments.patch_data_path, arguments.patch_beta_end, arguments.patch_on_error) == ("pad.json", 2.0, "skip")
    assert (arguments.patch_min_coverage, arguments.patch_beta_start) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("patch_min_coverage", 0.0),
        ("patch_min_coverage", 1.5),
        ("patch_beta_start", -1.0),
        ("patch_beta_end", float("nan")),
        ("patch_on_error", "ignore"),
        ("patch_loss", "nce"),
        ("patch_nce_weight", -0.1),
        ("patch_nce_temperature", 0.0),
    ],
)
def test_flags_out_of_range_are_named(flag: str, value: Any):
    with pytest.raises(ValueError, match=f"--{flag}: found {value!r}; expected"):
        PatchArguments(**{flag: value})
