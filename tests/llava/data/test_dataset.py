"""Samples: text, pixels and a plugin's extras of a record; and what happens to records that cannot be read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.collate import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset, make_supervised_data_module
from llava.data.records import RecordError
from llava.plugin import ImageView, TrainingPlugin

pytestmark = pytest.mark.usefixtures("golden_world")

GRID = (4, 4)  # of the tiny tower


@pytest.fixture
def processor(golden_world: Path) -> Any:
    return CLIPImageProcessorPil.from_pretrained(golden_world / "tiny-clip")


@pytest.fixture
def make_dataset(
    tokenizer: Any, data_args: SimpleNamespace, processor: Any, tmp_path: Path
) -> Callable[..., LazySupervisedDataset]:
    """Makes the dataset of a file, or of records, which go to `data.json`."""

    def make(data: Any, **keywords: Any) -> LazySupervisedDataset:
        if isinstance(data, list):
            (tmp_path / "data.json").write_text(json.dumps(data))
            data = tmp_path / "data.json"
        arguments = {"conversation": conv_templates["v1"], "image_processor": processor} | keywords
        return LazySupervisedDataset(data, tokenizer, data_args, **arguments)

    return make


def record(name: str = "r", image: Any = "im1.png", text: str = "<image>\nWhat?") -> dict[str, Any]:
    return {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A boat."}],
    }


class Recording(TrainingPlugin):
    """Hands back what it is asked to transform."""

    def transform_sample(self, record: Mapping[str, Any], view: ImageView) -> dict[str, torch.Tensor]:
        self.seen = (record, view)
        return {"labels_of_record": torch.tensor(len(record.get("labels", [])))}

    def collate(self, extras: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"regions": torch.tensor([int(extra.get("labels_of_record", -1)) for extra in extras])}


@pytest.mark.golden
@pytest.mark.usefixtures("pillow_of_the_recordings")
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_samples_equal_upstreams_recordings(
    aspect_ratio: str, make_dataset: Callable[..., Any], data_args: SimpleNamespace, goldens: Path
) -> None:
    data_args.image_aspect_ratio = aspect_ratio
    pixels = np.load(goldens / "g_images.npz")
    recorded = json.loads((goldens / "g_preprocess.json").read_text())["v1/vicuna/2048"]
    dataset = make_dataset("data_conv.json")
    for number, expected in enumerate(recorded):
        sample = dataset[number]
        assert sample["sample_id"] == f"c{number}"
        assert sample["input_ids"].tolist() == expected["input_ids"]
        image = dataset.records[number].get("image")  # "im3.png" is recorded as image 3
        assert ("image" in sample) == (image is not None)
        if image:
            torch.testing.assert_close(
                sample["image"], torch.from_numpy(pixels[f"{aspect_ratio}/{image[2]}"]), rtol=1e-5, atol=1e-6
            )


@pytest.mark.golden
def test_plain_batch_is_that_of_upstreams_first_stage(
    make_dataset: Callable[..., Any], tokenizer: Any, data_args: SimpleNamespace, processor: Any, goldens: Path
) -> None:
    data_args.data_path, data_args.image_processor = "data_plain.json", processor
    module = make_supervised_data_module(tokenizer, data_args, conversation=conv_templates["plain"])
    assert module["eval_dataset"] is None
    batch = module["data_collator"]([module["train_dataset"][number] for number in range(4)])
    recorded = np.load(goldens / "g_stage1_manual.npz")
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].tolist() == recorded[f"batch/{name}"].tolist()
    torch.testing.assert_close(batch["images"], torch.from_numpy(recorded["batch/images"]), rtol=1e-5, atol=1e-6)


def test_lengths_count_words_and_tell_images_by_sign(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset("data_conv.json")
    words = [
        sum(len(turn["value"].split()) for turn in dialogue["conversations"]) for dialogue in dataset.list_data_dict
    ]
    has_image = ["image" in dialogue for dialogue in dataset.list_data_dict]
    assert dataset.lengths.tolist() == [count + 128 * image for count, image in zip(words, has_image, strict=True)]
    assert dataset.modality_lengths.tolist() == [
        count if image else -count for count, image in zip(words, has_image, strict=True)
    ]


def test_a_plugin_sees_the_whole_record_and_the_view(
    make_dataset: Callable[..., Any], data_args: SimpleNamespace
) -> None:
    """An annotated image alone is enough: caption and regions."""
    data_args.image_aspect_ratio = "square"
    annotated = {"image_id": "im1.png", "size": [80, 40], "caption": "a boat", "labels": [{"tag": "boat"}]}
    plugin = Recording()
    records = [annotated]
    dataset = make_dataset(records, plugin=plugin, grid=GRID, conversation=conv_templates["plain"])
    sample = dataset[0]
    seen, view = plugin.seen
    assert annotated.items() <= seen.items()
    assert view == ImageView((80, 40), "crop", 56, 56, 56, GRID)
    assert sample["image_size"] == (80, 40) and int(sample["plugin_extras"]["labels_of_record"]) == 1


def test_rows_without_image_have_no_extras(
    make_dataset: Callable[..., Any], tokenizer: Any, data_args: SimpleNamespace, processor: Any
) -> None:
    data_args.data_path = "data_conv.json"
    module = make_supervised_data_module(
        tokenizer,
        data_args,
        plugin=Recording(),
        grid=GRID,
        image_processor=processor,
        conversation=conv_templates["v1"],
    )
    batch = module["data_collator"]([module["train_dataset"][number] for number in (2, 0)])
    assert batch["plugin_batch"]["regions"].tolist() == [-1, 0]
    assert batch["images"].shape[0] == 1


def test_several_images_of_a_record(make_dataset: Callable[..., Any]) -> None:
    several = record(image=["im1.png", "im2.png"], text="<image> and <image>?")
    sample = make_dataset([several])[0]
    assert sample["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == 2
    assert [image.shape for image in sample["image"]] == [(3, 56, 56)] * 2
    assert sample["image_size"] == [(80, 40), (37, 91)]
    with pytest.raises(RecordError, match="found 2 images, expected one with a plugin"):
        make_dataset([several], plugin=Recording(), grid=GRID)[0]


def test_workers_give_the_same_samples(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset("data_conv.json")
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for here, there in zip((dataset[number] for number in range(len(dataset))), loader, strict=True):
        assert here["sample_id"] == there["sample_id"] and torch.equal(here["input_ids"], there["input_ids"])
    assert len(pickle.loads(pickle.dumps(dataset))) == len(dataset)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_paths_cannot_leave_the_image_folder(name: str, make_dataset: Callable[..., Any]) -> None:
    records = [record("r1", image=name)]
    with pytest.raises(RecordError, match=r"data.json, record 0 \(id 'r1'\), field image.*expected a path inside"):
        make_dataset(records)[0]


def test_an_absolute_path_inside_the_folder_is_read(make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset([record(image=str(Path("images/im1.png").absolute()))])
    torch.testing.assert_close(dataset[0]["image"], make_dataset([record()])[0]["image"])


def test_a_link_in_the_image_folder_is_followed(make_dataset: Callable[..., Any], golden_world: Path) -> None:
    (golden_world / "elsewhere").mkdir()
    (golden_world / "images" / "im1.png").rename(golden_world / "elsewhere" / "im1.png")
    (golden_world / "images" / "coco").symlink_to(golden_world / "elsewhere")
    assert make_dataset([record(image="coco/im1.png")])[0]["image_size"] == (80, 40)


def spoil(kind: str, folder: Path) -> None:
    path = folder / "images" / "bad.png"
    if kind == "truncated":
        path.write_bytes((folder / "images" / "im5.png").read_bytes()[:-500])
    elif kind == "no image":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "a folder":
        path.mkdir()


@pytest.mark.parametrize("kind", ["missing", "truncated", "no image", "empty", "a folder"])
def test_unreadable_images_are_named_or_skipped(
    kind: str, make_dataset: Callable[..., Any], golden_world: Path, tokenizer: Any
) -> None:
    spoil(kind, golden_world)
    records = [record("good"), record("bad", image="bad.png")]
    with pytest.raises(RecordError, match=r"(?s)record 1 \(id 'bad'\), field image: images/bad.png.*--on_error skip"):
        make_dataset(records)[1]
    sample = make_dataset(records, on_error="skip", output_dir="run")[1]
    assert sample["sample_id"] == "bad" and "images/bad.png" in sample["skipped"] and "input_ids" not in sample
    (line,) = Path("run/skipped_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "bad"


def test_records_are_checked_before_training_starts(make_dataset: Callable[..., Any]) -> None:
    bad = [{"id": "no dialogue", "image": "im1.png"}, record("no mark", text="What?"), record("good"), "text"]
    records = bad
    with pytest.raises(RecordError) as error:
        make_dataset(records)
    for part in ("3 of 4 records", "record 0 (id 'no dialogue')", "found 0 <image>, expected 1", "--on_error skip"):
        assert part in str(error.value)
    dataset = make_dataset(records, on_error="skip", output_dir="run")
    assert len(dataset) == 1 and dataset[0]["sample_id"] == "good"
    assert len(dataset.lengths) == len(dataset.modality_lengths) == 1
    listed = [json.loads(line)["id"] for line in Path("run/skipped_samples.jsonl").read_text().splitlines()]
    assert listed == ["no dialogue", "no mark", "record-3"]
    with pytest.raises(RecordError, match="none of 1 records can be trained on"):
        make_dataset(["text"], on_error="skip")


def test_turns_that_do_not_fit_the_template_name_the_record(
    make_dataset: Callable[..., Any], conversations: list[Any]
) -> None:
    with pytest.raises(RecordError, match=r"record 0 \(id 'c3'\), field conversations: found 6 turns.*--version v1"):
        make_dataset([conversations[3]], conversation=conv_templates["plain"])


QUESTION, ANSWER = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": [QUESTION, {"from": "human", "value": "Well?"}, ANSWER]}, "'human', 'human', 'gpt'"),
        ({"conversations": [QUESTION | {"from": "gpt"}]}, "'human' and 'gpt' in turn"),
        ({"image": "none.png"}, "images/none.png: no such file"),
        ({"image": "nowhere/im1.png"}, "images/nowhere/im1.png: no such file"),
        ({"image": "/images/im1.png"}, "field image: found '/images/im1.png'"),
        ({"image": "a/../im1.png"}, "field image: found 'a/../im1.png'"),
        ({"image": "im1\ud83d.png"}, "half a character"),
        ({"image": {"bytes": "...", "path": "im1.png"}}, "field image: found {'bytes'.*a path"),
        ({"conversations": [QUESTION, ANSWER | {"value": "A boat \ud83d"}]}, "half a character"),
        (
            {"image": ["im1.png"] * 9, "conversations": [QUESTION | {"value": "<image>" * 9}, ANSWER]},
            "9 images take 16",
        ),
    ],
)
def test_what_cannot_be_trained_is_named_before_the_first_step(
    changes: dict[str, Any], message: str, make_dataset: Callable[..., Any], tokenizer: Any
) -> None:
    tokenizer.model_max_length = 128
    records = [record("good"), record("bad") | changes]
    with pytest.raises(RecordError, match=rf"record 1 \(id 'bad'\).*{message}"):
        make_dataset(records, visual_tokens_of=lambda size_wh: 16)
    dataset = make_dataset(records, visual_tokens_of=lambda size_wh: 16, on_error="skip", output_dir="run")
    samples = [dataset[index] for index in range(len(dataset))]  # what breaks the format is no sample at all
    assert ["skipped" in sample for sample in samples] in ([False], [False, True])
    assert "bad" in Path("run/skipped_samples.jsonl").read_text()


def test_only_the_first_rank_of_a_machine_looks_for_files(
    make_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record("bad") | {"image": "none.png"}]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(make_dataset(records)) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RecordError, match=r"none\.png"):
        make_dataset(records)


def test_a_text_that_leaves_no_room_for_its_image_is_skipped(make_dataset: Callable[..., Any], tokenizer: Any) -> None:
    tokenizer.model_max_length = 128
    long = record("long", image=["im1.png"] * 2, text="<image>" + "word " * 120 + "<image>")
    dataset = make_dataset([long, record("good")], visual_tokens_of=lambda size: 16, on_error="skip")
    assert ["skipped" in dataset[index] for index in range(2)] == [True, False]


def test_a_line_of_pixels_is_skipped(make_dataset: Callable[..., Any], data_args: SimpleNamespace) -> None:
    Image.new("RGB", (60000, 2)).save("images/line.png")
    data_args.image_aspect_ratio = "pad"
    dataset = make_dataset([record("bad", image="line.png")], on_error="skip")
    assert "60000 x 2" in dataset[0]["skipped"]


def test_a_sample_id_may_hold_half_a_character(make_dataset: Callable[..., Any]) -> None:
    assert make_dataset([record("r \ud83d")])[0]["sample_id"] == "r \\ud83d"


def test_an_empty_answer_is_left_to_the_count_of_supervised_tokens(make_dataset: Callable[..., Any]) -> None:
    empty = record()
    empty["conversations"][1]["value"] = ""
    assert set(make_dataset([empty])[0]["labels"].tolist()) == {IGNORE_INDEX}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_error": "ignore"}, "--on_error: found 'ignore'"),
        ({"image_processor": None}, "no vision tower"),
        ({"plugin": Recording()}, "without `grid`"),
    ],
)
def test_arguments_that_do_not_go_together(
    change: dict[str, Any], message: str, make_dataset: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset("data_conv.json", **change)


def test_a_tiled_image_comes_with_the_view_of_its_base_tile(
    make_dataset: Callable[..., Any], data_args: SimpleNamespace
) -> None:
    data_args.image_aspect_ratio, data_args.image_grid_pinpoints = "anyres", "[[56, 112], [112, 56], [112, 112]]"
    plugin = Recording()
    [wide, square] = make_dataset([record("wide"), record("square", "im0.png")], plugin=plugin, grid=GRID, seen_side=56)
    assert wide["image"].shape == (3, 3, 56, 56) and wide["image_size"] == (80, 40)  # the whole image, and two tiles
    assert square["image"].shape == (3, 3, 56, 56)
    wide_view = make_dataset([record()], plugin=plugin, grid=GRID)[0] and plugin.seen[1]
    assert wide_view == ImageView((80, 40), "squeeze", 56, 56, 56, GRID)


def test_a_missing_data_path_names_the_flag(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="--data_path is missing"):
        make_supervised_data_module(tokenizer, SimpleNamespace(data_path=None))


def test_images_under_the_key_of_other_trainers_are_read(make_dataset: Callable[..., Any]) -> None:
    ours, theirs = record("a"), record("b")
    theirs["images"] = [theirs.pop("image")]
    first, second = make_dataset([ours, theirs])
    assert first["image"].equal(second["image"]) and first["input_ids"].equal(second["input_ids"])


@pytest.mark.parametrize("place", ["image_path", "the turn", "images"])
def test_a_file_whose_images_are_not_seen_is_refused(place: str, make_dataset: Callable[..., Any]) -> None:
    blind = record("blind", text="What is there?")
    path = blind.pop("image")
    (blind["conversations"][0] if place == "the turn" else blind)[place.replace("the turn", "image")] = (
        [path] if place == "images" else path
    )
    with pytest.raises(ValueError, match="image"):
        make_dataset([blind])
    assert len(make_dataset([blind, record("seen")], on_error="skip")) == (1 if place == "images" else 2)


def test_broken_records_stop_a_run_above_the_limit(make_dataset: Callable[..., Any]) -> None:
    bad = [record(f"bad-{number}", text="no mark") for number in range(11)]
    assert len(make_dataset([record("good"), *bad[:10]], on_error="skip")) == 1
    with pytest.raises(RecordError, match="11 of 12"):
        make_dataset([record("good"), *bad], on_error="skip")


class Supervising(Recording):
    """Trains images whose name it is given."""

    def __init__(self, *images: str) -> None:
        self.images = images

    def supervises(self, records: Any) -> list[bool]:
        return [record["image"] in self.images for record in records]


def bare(image: Any, **keys: Any) -> dict[str, Any]:
    return {"id": f"bare {image}", "image": image, **keys}


def test_images_without_text_are_samples_where_a_plugin_supervises_them(
    make_dataset: Callable[..., Any], data_args: SimpleNamespace
) -> None:
    unanswered = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]
    annotated = {"image_id": "im3.png", "size": [1, 1], "caption": "", "labels": []}
    data_args.on_error = "skip"
    records = [record(), bare("im1.png"), bare("im2.png"), bare("im2.png", conversations=unanswered), annotated]
    dataset = make_dataset(records, plugin=Supervising("im1.png", "im3.png"), grid=GRID)
    assert dataset.rows.tolist() == [0, 1, 3, 4]  # the others of im2.png stay what they were: a problem, a sample
    assert dataset.is_auxiliary.tolist() == [False, True, False, True]
    sample = dataset[1]
    assert sample["auxiliary_only"] and sample["image"].shape == (3, 56, 56)
    assert (sample["input_ids"].tolist(), sample["labels"].tolist()) == ([IMAGE_TOKEN_INDEX], [IGNORE_INDEX])
    assert "auxiliary_only" not in dataset[0]

    images = dataset.without_text()
    assert images.rows.tolist() == [0, 1, 4] and all(images.is_auxiliary)
    assert images[0]["auxiliary_only"] and images[0]["sample_id"] == "r"
    assert not dataset.is_auxiliary[0]
    assert make_dataset(records).rows.tolist() == [0, 3, 4]  # without a plugin


def test_an_image_without_text_that_no_plugin_supervises_is_refused(make_dataset: Callable[..., Any]) -> None:
    records = [record(), bare("im1.png")]
    for plugin in (None, Supervising("im2.png")):
        with pytest.raises(RecordError, match=r"'bare im1\.png'\), field conversations"):
            make_dataset(records, plugin=plugin, grid=GRID)


def test_a_batch_is_of_one_kind(make_dataset: Callable[..., Any], tokenizer: Any) -> None:
    plugin = Supervising("im1.png", "none.png")
    records = [record(), bare("im1.png"), bare("none.png")]
    dataset = make_dataset(records, plugin=plugin, grid=GRID, on_error="skip")
    collator = DataCollatorForSupervisedDataset(tokenizer, plugin)
    text, image, unreadable = (dataset[index] for index in range(3))
    assert "auxiliary_only" not in collator([text])
    assert collator([image])["auxiliary_only"] and collator([image, unreadable])["auxiliary_only"]
    assert collator([unreadable])["auxiliary_only"]  # of what was meant to be there
    with pytest.raises(ValueError, match=r"bare im1\.png"):
        collator([text, image])
