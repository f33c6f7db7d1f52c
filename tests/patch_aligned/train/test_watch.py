"""What is measured and drawn on held-out images while a projector trains, which changes no number of the training."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations import WandbCallback

from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models
from patch_aligned.intervals import Resampling
from patch_aligned.train.watch import COLUMNS, PAGE, AlignmentWatch
from tests.training import run_in_two_processes

IMAGES = [f"im{number}.png" for number in range(6)]
WATCH = "--eval_align_steps 2 --patch_picture_steps 3 --eval_align_images 2"
KEYS = {"eval/align": "align_px", "eval/contrast": "contrast", "eval/retrieval": "retrieval_top1"}


def figures(log_history: list[dict[str, float]]) -> dict[int, list[float]]:
    """The figures of the held-out images, by step."""
    return {line["step"]: [line[key] for key in KEYS] for line in log_history if "eval/align" in line}


def columns(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, COLUMNS).read_text().splitlines()]


def test_losses_and_weights_are_bit_for_bit_those_of_a_run_without_the_held_out_images(run_stage_1: Any) -> None:
    flags = "--max_steps 5 --gradient_accumulation_steps 2"
    watched, plugin = run_stage_1(IMAGES, f"{WATCH} {flags} --output_dir watched")
    assert len(plugin.held_out) == 2
    silent, _ = run_stage_1([image for image in IMAGES if image not in plugin.held_out], flags)
    of_runs = [
        [{key: line[key] for key in line if key != "patch/floor"} for line in run.state.log_history if "loss" in line]
        for run in (watched, silent)
    ]
    assert len(of_runs[0]) == 5 and of_runs[0] == of_runs[1]  # the floor is of the whole PAD file
    projectors = [torch.load(f"{run}/mm_projector.bin") for run in ("watched", "run")]
    assert all(torch.equal(tensor, projectors[1][name]) for name, tensor in projectors[0].items())
    assert not figures(silent.state.log_history) and not Path("run", PAGE).exists()


@pytest.mark.parametrize("more", [[], ["--image_aspect_ratio", "pad"]], ids=["crop", "pad"])
def test_figures_are_those_of_an_analysis_of_the_same_images(run_stage_1: Any, more: list[str]) -> None:
    trainer, plugin = run_stage_1(IMAGES, f"{WATCH} --max_steps 5 --learning_rate 3e-2", more)
    logged = figures(trainer.state.log_history)
    assert list(logged) == [0, 2, 4, 5]
    records = json.loads(Path("pad.json").read_text())
    Path("held_out.json").write_text(json.dumps([one for one in records if one["image_id"] in plugin.held_out]))
    measure = MeasureSettings(Path("held_out.json"), Path("images"))
    models = load_models(("p=run",), "tiny-vicuna", "tiny-clip")
    metrics = analyse(models, AnalysisSettings(measure, Resampling(2), ())).models["p"].metrics["value"]
    assert logged[5] == pytest.approx([metrics[name] for name in KEYS.values()], rel=1e-5)
    assert logged[5] != logged[0]


def test_the_strip_has_a_row_a_label_and_a_column_a_step_and_escapes_labels(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.patch_aligned.conftest.QUADRANTS", ("<b>&", "light", "dog", "boat"))
    _, plugin = run_stage_1(IMAGES, f"{WATCH} --max_steps 4")
    page = Path("run", PAGE).read_text()
    assert re.findall(r'<th scope="col">(.*?)</th>', page) == ["label", "step 0", "step 3", "step 4"]
    assert page.count("<tr>") == 1 + 2 and page.count('src="data:image/jpeg') == 2 * (1 + 3)
    assert page.count("<b>&lt;b&gt;&amp;</b>") == 2 and "<b>&<" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    assert {image for image, _ in columns("run")[0]["of"]} == plugin.held_out


def test_a_resumed_run_continues_strip_and_curve(run_stage_1: Any) -> None:
    flags = f"{WATCH} --max_steps 6 --save_strategy steps --save_steps 2"
    whole, _ = run_stage_1(IMAGES, flags)
    drawn, page = columns("run"), Path("run", PAGE).read_bytes()
    assert [column["step"] for column in drawn] == [0, 3, 6]
    shutil.copytree("run/checkpoint-2", "killed/checkpoint-2")
    for name in (COLUMNS, "run.json"):
        shutil.copy(f"run/{name}", "killed")
    resumed, _ = run_stage_1(IMAGES, f"{flags} --output_dir killed")
    assert figures(resumed.state.log_history) == figures(whole.state.log_history)
    assert columns("killed") == drawn
    assert Path("killed", PAGE).read_bytes() == page.replace(b"Training run<", b"Training killed<")


def test_maps_go_to_wandb_and_tensorboard_where_these_are_reported_to(run_stage_1: Any) -> None:
    trainer, _ = run_stage_1(IMAGES, f"{WATCH} --max_steps 1")
    [watch] = [one for one in trainer.callback_handler.callbacks if isinstance(one, AlignmentWatch)]
    sent: list[dict[str, Any]] = []
    wandb = WandbCallback.__new__(WandbCallback)
    wandb._wandb = SimpleNamespace(Image=lambda picture: picture.size, log=sent.append)
    trainer.callback_handler.callbacks.append(wandb)
    trainer.log = lambda logs: None
    watch.measure()
    [maps] = sent
    assert maps.pop("train/global_step") == 1
    assert list(maps) == ["pictures/1 water", "pictures/2 water"] and all(min(size) > 99 for size in maps.values())

    pytest.importorskip("tensorboard", reason="tensorboard is part of the extra `train`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    run_stage_1(IMAGES, f"{WATCH} --max_steps 4 --report_to tensorboard --output_dir board")
    events = EventAccumulator(str(next(Path("board").rglob("events.out*")).parent), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == set(maps)
    assert [image.step for image in events.Images("pictures/1 water")] == [0, 3, 4]
    assert "train/eval/align" in events.Tags()["scalars"]


def test_images_that_cannot_be_held_out_are_named_before_the_first_step(run_stage_1: Any) -> None:
    with pytest.raises(ValueError, match=r"--eval_align_images 6: found 6 images .* 6 records"):
        run_stage_1(IMAGES, f"{WATCH} --eval_align_images 6 --max_steps 1")
    with pytest.raises(ValueError, match="--eval_align_images 0: found 0 images"):
        run_stage_1(IMAGES, f"{WATCH} --eval_align_images 0 --max_steps 1")


@pytest.mark.slow
def test_two_processes_measure_as_one_and_the_first_draws(
    run_stage_1: Any, patch_flags: Callable[..., list[str]]
) -> None:
    flags = f"{WATCH} --max_steps 3 --save_strategy steps --save_steps 3 --mm_projector_type mlp2x_gelu"
    start = "--pretrain_mm_mlp_adapter train_init/mm_projector.bin"
    one, _ = run_stage_1(IMAGES, f"{flags} {start} --per_device_train_batch_size 4")
    words = patch_flags(IMAGES, f"{flags} {start} --ddp_backend gloo --output_dir two")
    run_in_two_processes("-m", "patch_aligned.train_mem", *words)
    logged = figures(json.loads(Path("two/checkpoint-3/trainer_state.json").read_text())["log_history"])
    expected = figures(one.state.log_history)
    assert list(logged) == list(expected) == [0, 2, 3]
    for step, values in expected.items():
        assert logged[step] == pytest.approx(values, rel=1e-4), step
    assert [column["step"] for column in columns("two")] == [0, 3]
