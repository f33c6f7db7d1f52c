"""The patch loss in any trainer: what it teaches, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from patch_aligned import PatchAlignedMixin, PatchAlignment, train_projector_only
from patch_aligned.masks import PatchMaskError, rle_of_mask
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.tokens import visual_tokens
from tests.patch_aligned.models import families
from tests.patch_aligned.train.world import (
    COLOURS,
    SIZE,
    captioned,
    collator_of,
    held_out_retrieval,
    metrics_of,
    model_of,
    processor_of,
    remembering,
    sample_of,
    sft_trainer,
    trainer_of,
)
from tests.training import logged

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "llava", "llava_next", "mistral3")
UNDER_SFT = ("qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25", "internvl", "llava", "llava_onevision", "molmo2")
ALIGNING: dict[str, Any] = {"beta": (50, 50), "max_steps": 24}


@pytest.fixture
def wrong_layouts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns all layouts by 180 degrees until it is called."""

    def turned(processor: Any, images: Any) -> Any:
        return [
            replace(layout, grids=tuple(replace(grid, tokens=grid.tokens[::-1, ::-1]) for grid in layout.grids))
            for layout in layouts_of(processor, images)
        ]

    monkeypatch.setattr("patch_aligned.train.regions.layouts_of", turned)
    return lambda: monkeypatch.setattr("patch_aligned.train.regions.layouts_of", layouts_of)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_learn_to_name_regions_of_unseen_images(name: str, tmp_path: Path, wrong_layouts: Any) -> None:
    wrong = trainer_of(name, tmp_path, **ALIGNING)
    wrong.train()
    wrong_layouts()
    right = trainer_of(name, tmp_path, **ALIGNING)
    right.train()
    retrieval = held_out_retrieval(name, right)
    assert retrieval >= 0.8
    assert held_out_retrieval(name, wrong) <= retrieval - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", UNDER_SFT)
def test_families_learn_under_trl(name: str, tmp_path: Path) -> None:
    if not families.FAMILIES[name].is_installed:
        pytest.skip(f"needs transformers >= {families.FAMILIES[name].since}")
    trainer = sft_trainer(name, tmp_path, **ALIGNING)
    trainer.train()
    assert held_out_retrieval(name, trainer) >= 0.8


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("make", [trainer_of, sft_trainer])
def test_beta_0_equals_no_attach_bit_for_bit(make: Any, tmp_path: Path) -> None:
    runs = [make("qwen3_vl", tmp_path, beta=beta, max_steps=3) for beta in (None, (0, 0), (0, 5))]
    for run in runs:
        run.train()
    plain, zero, five = runs
    assert logged(plain) == logged(zero)
    assert all(torch.equal(weight, weights(zero)[name]) for name, weight in weights(plain).items())
    assert logged(plain)[0] == logged(five)[0] and logged(plain)[2] != logged(five)[2]
    assert logged(five, "patch/beta") == [0, 2.5, 5]
    assert logged(zero, "loss/caption") == pytest.approx(logged(plain), rel=1e-5)


def test_the_gradient_reaches_exactly_the_projector(tmp_path: Path) -> None:
    for name in ("qwen3_vl", "glm4v", "ovis2", "llava_next"):
        trainer = trainer_of(name, tmp_path, max_steps=1, beta=(1, 1), warmup_steps=1)
        trainer.patch_alignment._is_warm_up = True  # the patch loss alone
        trainer.compute_loss(trainer.model, trainer.data_collator(trainer.train_dataset[:2])).backward()
        reached = {key for key, weight in trainer.model.named_parameters() if weight.grad is not None}
        trained = {key for key, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert reached and reached <= trained
        # Row separators, and what only later layers of the LLM read, have no place.
        assert all("image_newline" in key or "deepstack" in key for key in trained - reached), name


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_several_images_of_several_sizes_count_as_each_alone(name: str, tmp_path: Path) -> None:
    """The loss is a mean over images with regions, so a batch's loss follows from those of its images."""
    trainer = trainer_of(name, tmp_path, max_steps=1, beta=(1, 1))
    first, second, third = sample_of(1), sample_of(2, (100, 300)), sample_of(3)
    moved = [region | {"image": 1} for region in second["regions"]]
    pair = first | {"images": first["images"] + second["images"], "regions": first["regions"] + moved}
    without = sample_of(4) | {"images": [], "regions": []}
    processor = trainer.processing_class
    lengths = [layout.length for layout in layouts_of(processor, pair["images"])]
    assert len(set(lengths)) == 2

    def patch_loss(samples: list[dict[str, Any]]) -> float:
        batch = trainer.data_collator(captioned(name, samples))
        trainer.compute_loss(trainer.model, batch)
        return metrics_of(trainer)["loss/patch"]

    alone = [patch_loss([sample]) for sample in (first, second, third)]
    assert patch_loss([without, pair, third]) == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert patch_loss([pair, without, third | {"regions": None}]) == pytest.approx(sum(alone[:2]) / 2, rel=1e-5)


def test_views_of_a_region_count_alike(tmp_path: Path) -> None:
    """A region's cosine is the mean over the grids in which it covers a token, and `grids` picks among them."""
    sample, name = sample_of(5, (448, 336)), "internvl"
    [layout] = layouts_of(processor_of(name), [(448, 336)])
    assert [grid.kind for grid in layout.grids] == ["tiles", "whole"]
    found = {}
    for grids in ("all", "whole", "tiles"):
        trainer = trainer_of(name, tmp_path, max_steps=1, beta=(1, 1), grids=grids)
        batch = trainer.data_collator(captioned(name, [sample]))
        inputs = {key: value for key, value in batch.items() if key != "patch_targets"}
        trainer.compute_loss(trainer.model, batch)
        found[grids] = metrics_of(trainer)["patch/cosine"]
    tokens = visual_tokens(trainer.model, inputs)
    expected = {}
    for grid in layout.grids:
        cosines = []
        for quarter, region in enumerate(sample["regions"]):
            rows = np.array_split(grid.tokens, 2)[quarter // 2]  # the quarters end at edges of cells
            cells = np.array_split(rows, 2, axis=1)[quarter % 2].ravel()
            word = trainer.processing_class.tokenizer(region["tag"], add_special_tokens=False)["input_ids"]
            label = trainer.model.get_input_embeddings().weight[word].mean(dim=0)
            cosines.append(torch.cosine_similarity(tokens[cells].mean(dim=0), label, dim=0).item())
        expected[grid.kind] = sum(cosines) / 4
    expected["all"] = sum(expected.values()) / 2
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])  # the first takes no `num_items_in_batch`, the second does
@pytest.mark.parametrize("make", [trainer_of, sft_trainer])
def test_accumulated_and_checkpointed_steps_equal_one_batch(make: Any, name: str, tmp_path: Path) -> None:
    more = {"max_steps": 2, "beta": (1, 5), "learning_rate": 1e-3, "optim": "sgd"}
    whole = make(name, tmp_path, per_device_train_batch_size=4, **more)
    parts = make(name, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **more)
    recomputed = make(name, tmp_path, per_device_train_batch_size=4, gradient_checkpointing=True, **more)
    for run in (whole, parts, recomputed):
        run.train()
    for key in ("loss", "loss/caption", "loss/patch"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-5), key
        assert logged(recomputed, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    for key, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[key], weight, rtol=1e-5, atol=1e-7)


def test_peft_trains_a_saved_projector_as_it_is_trained_without(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is part of the extra `train`")
    model = model_of("internvl", projector_only=False)
    llm = r".*language_model.*q_proj"
    lora = peft.LoraConfig(target_modules=llm, modules_to_save=["multi_modal_projector"])
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    frozen = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=llm))
    with pytest.raises(ValueError, match="modules_to_save"):
        trainer_of("internvl", tmp_path, model=frozen, beta=(5, 5))
    # In the second step the adapters have moved, but not yet the caption loss's gradient into the projector.
    more: dict[str, Any] = {"beta": (5, 5), "max_steps": 2, "max_grad_norm": 0}
    runs = [trainer_of("internvl", tmp_path, model=one, **more) for one in (None, adapted)]
    for run in runs:
        run.train()
    assert logged(runs[1], "loss/patch") == pytest.approx(logged(runs[0], "loss/patch"), rel=1e-5)


def test_regions_without_caption_and_the_warm_up_do_not_run_the_llm(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_of("qwen2_5_vl", tmp_path, max_steps=3, beta=(5, 5), warmup_steps=8, learning_rate=0.02)
    silent = [sample | {"completion": ""} for sample in trainer.train_dataset]
    batch = trainer.data_collator(silent[:3])
    assert not batch["patch_targets"]["has_text"] and (batch["labels"] == -100).all()
    expected_batch = trainer.data_collator(trainer.train_dataset[:3])
    trainer.train()
    state = json.loads((tmp_path / "patch_warmup" / "trainer_state.json").read_text())
    warm = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(warm) == 8 and "loss/caption" not in warm[0] and warm[0]["loss"] == pytest.approx(warm[0]["loss/patch"])
    assert warm[-1]["loss"] < warm[0]["loss"] - 0.3
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3 and entries[0]["loss/patch"] < warm[0]["loss"] - 0.3
    trainer.compute_loss(trainer.model, expected_batch)
    expected = metrics_of(trainer)
    for layer in trainer.model.get_decoder().layers:
        monkeypatch.setattr(layer, "forward", None)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(5 * expected["loss/patch"], rel=1e-6)
    assert "loss/caption" not in metrics_of(trainer)


def test_a_warm_up_that_was_killed_resumes_exactly(tmp_path: Path) -> None:
    def trainer_in(folder: str) -> Any:
        rows = captioned("internvl", [sample_of(number, (64, 64)) for number in range(6)])
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        shuffled: dict[str, Any] = {"train_sampling_strategy": "random", "per_device_train_batch_size": 2}
        return trainer_of("internvl", tmp_path / folder, rows=rows, max_steps=2, warmup_steps=6, **saving, **shuffled)

    def warm_losses(folder: str) -> list[float]:
        state = json.loads((tmp_path / folder / "patch_warmup" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    whole, killed = trainer_in("whole"), trainer_in("killed")
    whole.train()
    place = Path("patch_warmup", "checkpoint-4")  # in the second epoch; that of the last step is not kept
    shutil.copytree(tmp_path / "whole" / place, tmp_path / "killed" / place)
    killed.train(resume_from_checkpoint=True)
    assert len(warm_losses("whole")) == 6 and warm_losses("killed") == warm_losses("whole")
    assert logged(killed) == logged(whole) and len(logged(whole)) == 2
    for one, other in zip(killed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_warm_up_that_fails_leaves_model_and_trainer_as_they_were(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_of("internvl", tmp_path, max_steps=2, warmup_steps=2)
    layers = list(trainer.model.get_decoder().layers)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.patch_alignment._objective, "loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert list(trainer.model.get_decoder().layers) == layers
    assert (trainer.args.output_dir, trainer.args.max_steps) == (str(tmp_path), 2)
    trainer.train()
    assert trainer.state.global_step == 2


TEMPLATE = """{% for turn in messages %}{% if turn.content is string %}{{ turn.content }}{% else %}
{% for part in turn.content %}{{ part.text if part.type == "text" else "<image_token>" }}{% endfor %}{% endif %}
{% endfor %}"""


def test_an_empty_answer_in_a_conversation_is_no_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_of("qwen2_5_vl"), "chat_template", TEMPLATE, raising=False)
    answers = ("a cat", "", "a cat", "a cat")
    rows = [
        sample_of(number)
        | {"messages": [{"role": "user", "content": "what is"}, {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers)
    ]
    trainer = sft_trainer("qwen2_5_vl", tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=4)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    assert (batch["labels"] != -100).any(dim=1).tolist() == [True, False, True, True]
    trainer.train()
    assert logged(trainer, "patch/regions") == [16]


def write_pad(path: Path, samples: list[dict[str, Any]], size: tuple[int, int] = SIZE) -> Path:
    records = [
        {
            "image_id": f"{sample['id']}.png",
            "size": list(size),
            "caption": "",
            "labels": [{**region, "bbox": [0, 0, 1, 1]} for region in sample["regions"]],
        }
        for sample in samples
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_pad_file_gives_what_a_column_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(tmp_path / "cache"))
    column = sft_trainer("smolvlm", tmp_path, beta=(5, 5), max_steps=2)
    samples = [sample_of(number) for number in range(16)]
    pad = write_pad(tmp_path / "pad.jsonl", samples[:15])
    rows = [{key: sample[key] for key in sample if key != "regions"} for sample in captioned("smolvlm", samples)]
    rows = [row | {"image_id": f"./{row['id']}.png"} for row in rows]
    joined = sft_trainer("smolvlm", tmp_path, rows=rows, regions=pad, beta=(5, 5), max_steps=2)
    column.train()
    joined.train()
    assert logged(joined, "loss/patch")[0] == logged(column, "loss/patch")[0]
    assert logged(joined, "patch/images_without_record") == [0, 1]
    assert 0 < logged(joined, "patch/floor")[0] < 1 and len(logged(joined, "patch/floor")) == 1
    assert (tmp_path / "first_batch.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"pad\.jsonl: found none of the 16 images of the data set, such as \['a'\]"):
        sft_trainer("smolvlm", tmp_path, rows=[row | {"image_id": "a"} for row in rows], regions=pad)
    with pytest.raises(ValueError, match=r"expected 'image_id' among them"):
        sft_trainer("smolvlm", tmp_path, rows=captioned("smolvlm", samples), regions=pad)


def test_subclasses_attach_by_a_mixin(tmp_path: Path) -> None:
    class Mine(PatchAlignedMixin, Trainer):
        """As users write it."""

    attached = trainer_of("llava", tmp_path, beta=(5, 5), max_steps=2)
    name = "llava"
    mixed = Mine(
        patch_alignment=PatchAlignment(beta=(5, 5)),
        model=model_of(name),
        args=attached.args,
        train_dataset=attached.train_dataset,
        data_collator=remembering(collator_of(name)),
        processing_class=processor_of(name),
    )
    attached.train()
    mixed.train()
    assert logged(mixed) == logged(attached)
    with pytest.raises(ValueError, match="already"):
        PatchAlignment().attach(mixed)


def test_packed_samples_are_read_by_their_offsets(tmp_path: Path) -> None:
    """A collator that puts all samples into one row, as some frameworks do."""
    trainer = trainer_of("llava", tmp_path, max_steps=1)
    plain, samples = trainer.data_collator, trainer.train_dataset[:3]

    def packed(rows: list[dict[str, Any]]) -> Any:
        batch = collator_of("llava")(rows)
        is_text = batch["attention_mask"] == 1
        return {key: value[is_text][None] if key != "pixel_values" else value for key, value in batch.items()}

    found = []
    for collator in (plain, replace(plain, collator=packed)):
        trainer.compute_loss(trainer.model, collator(samples))
        found.append(metrics_of(trainer)["loss/patch"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_projector_of_zeros_is_named_and_gets_no_gradient_that_explodes(tmp_path: Path, caplog: Any) -> None:
    model = model_of("gemma3")
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.zero_()
    trainer = trainer_of("gemma3", tmp_path, model=model, beta=(5, 5), max_steps=1)
    assert "mm_input_projection_weight: all zero" in caplog.text
    trainer.patch_alignment._is_warm_up = True  # the patch loss alone
    loss = trainer.compute_loss(model, trainer.data_collator(trainer.train_dataset[:2]))
    loss.backward()
    assert loss.item() == 1
    weight = model.model.multi_modal_projector.mm_input_projection_weight
    assert weight.grad is not None and not weight.grad.any()


def test_evaluation_and_generation_are_left_alone(tmp_path: Path) -> None:
    plain = trainer_of("smolvlm", tmp_path, beta=None, max_steps=1)
    attached = trainer_of("smolvlm", tmp_path, beta=(5, 5), max_steps=1)
    rows = plain.train_dataset[:4]
    assert attached.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    inputs = collator_of("smolvlm")(rows[:1])
    inputs.pop("labels")
    ids = [run.model.generate(**inputs, max_new_tokens=3, do_sample=False) for run in (plain, attached)]
    assert torch.equal(*ids)


def changed(**more: Any) -> list[dict[str, Any]]:
    return [captioned("qwen2_5_vl", [sample_of(0)])[0] | more]


WATER = {"tag": "red", "rle_mask": sample_of(0)["regions"][0]["rle_mask"]}


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (changed(regions=[WATER | {"image": 1}]), "sample n0, region 0: found image 1, but the sample has 1 images"),
        (changed(regions=[WATER | {"rle_mask": rle_of_mask(np.ones((10, 10)))}]), "n0.*region 0, rle_mask"),
        (changed(size=[168, 224]), r"n0.*found \[168, 224\], expected \[224, 168\]"),
        (changed(regions=[WATER | {"tag": " "}]), "label ' ': found no token"),
        (changed(regions=[{"tag": "red"}]), r"n0, region 0: found \['tag'\], expected 'tag', and 'rle_mask'"),
        (changed(prompt="what is"), "n0: found 0 image tokens in input_ids, expected 48 by Qwen2_5_VLProcessor"),
        (changed(images=[np.zeros((10, 10, 3))]), "n0: found an image of type ndarray"),
    ],
)
def test_bad_samples_are_named(rows: list[dict[str, Any]], error: str, tmp_path: Path) -> None:
    trainer = trainer_of("qwen2_5_vl", tmp_path, max_steps=1)
    if "input_ids" in error:  # without the placeholder, and so without pixels
        collate = collator_of("qwen2_5_vl")
        trainer.data_collator.collator = lambda samples: collate([sample | {"images": None} for sample in samples])
    with pytest.raises((ValueError, PatchMaskError), match=error):
        trainer.data_collator(rows)


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: Any) -> None:
    name = "qwen2_5_vl"
    with pytest.raises(ValueError, match=r"columns .*'images'.*expected 'boxes' among them"):
        trainer_of(name, tmp_path, regions="boxes")
    with pytest.raises(ValueError, match=r"Pass remove_unused_columns=False"):
        trainer_of(name, tmp_path, remove_unused_columns=True)
    frozen = model_of(name).requires_grad_(False)
    with pytest.raises(ValueError, match="train_projector_only"):
        trainer_of(name, tmp_path, model=frozen)
    with pytest.raises(ValueError, match="grids: found 'tile'"):
        PatchAlignment(grids="tile")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--patch_beta_end: found -1"):
        PatchAlignment(beta=(0, -1))
    text = [{**sample_of(0), "images": None, "regions": None, "prompt": "what", "completion": " a cat"}]
    trainer = trainer_of(name, tmp_path, rows=text * 2, max_steps=1)
    collate = collator_of(name)
    trainer.data_collator.collator = lambda rows: collate([row | {"images": None} for row in rows])
    with pytest.raises(ValueError, match=r"batch of text alone trains nothing.*n0"):
        trainer.train()
    trainer = trainer_of(name, tmp_path, beta=None)
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(ValueError, match="One process sees 2 GPUs"):
        PatchAlignment().attach(trainer)


def test_train_projector_only_prints_sizes_and_fails_where_it_finds_none(capsys: Any) -> None:
    model = model_of("qwen3_vl", projector_only=False)
    sizes = train_projector_only(model)
    assert list(sizes) == ["visual.merger", "visual.deepstack_merger_list"]
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"merger", "deepstack_merger_list"}
    assert sum(sizes.values()) == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert f"visual.merger: {sizes['visual.merger']:,} parameters" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"found no projector \['bridge'\].*'visual'"):
        train_projector_only(model, ["bridge"])


def test_rows_of_a_table_reach_the_loss(tmp_path: Path) -> None:
    """Arrow fills missing keys of a region with None; a box alone is a filled box."""
    sample = sample_of(0)
    box = {"tag": sample["regions"][0]["tag"], "bbox": [0, 0, 112, 84]}
    rows = [sample | {"regions": [WATER | {"tag": box["tag"]}]}, sample | {"regions": [box]}]
    table = Dataset.from_list(captioned("qwen2_5_vl", rows))
    trainer = trainer_of("qwen2_5_vl", tmp_path, rows=table, max_steps=1)
    targets = trainer.data_collator([table[0], table[1]])["patch_targets"]
    first, second = targets["region_tokens"].reshape(2, 2, -1)[[0, 1], [0, 1]]
    assert first.any() and torch.equal(first, second)
    assert len(COLOURS) == 8
