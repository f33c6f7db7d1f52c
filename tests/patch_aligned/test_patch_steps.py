"""Micro-steps of the patch loss alone: images without caption, and the warm-up. One and two processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.train.llava_trainer import LLaVATrainer
from tests.training import run_in_two_processes

IMAGES = [f"im{number}.png" for number in range(6)]
CAPTION = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red boat on a lake"}]


def write_mixed(with_caption: list[str], without: list[str]) -> list[str]:
    """Writes `mixed.json`; returns the flags that train on it."""
    records: list[dict[str, Any]] = [
        {"id": f"c-{name}", "image": name, "conversations": CAPTION} for name in with_caption
    ]
    records += [{"id": f"r-{name}", "image": name} for name in without]
    Path("mixed.json").write_text(json.dumps(records))
    return ["--data_path", "mixed.json", "--patch_data_path", "pad.json"]


def columns(trainer: Any, *names: str) -> list[tuple[float | None, ...]]:
    return [tuple(entry.get(name) for name in names) for entry in trainer.state.log_history if "loss" in entry]


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    "more",
    ["", "--image_aspect_ratio anyres --image_grid_pinpoints [[56,112]] --mm_patch_merge_type spatial_unpad"],
    ids=["square", "tiles"],
)
def test_gradients_are_those_of_the_full_pass_with_masked_captions(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    trainer, _ = run_stage_1(IMAGES[:3], "--max_steps 1 --mm_projector_type mlp2x_gelu --learning_rate 0", more.split())
    model = trainer.model.train()
    dataset = trainer.train_dataset
    full, alone = (trainer.data_collator([data[row] for row in range(3)]) for data in (dataset, dataset.without_text()))
    full["labels"] = torch.full_like(full["labels"], IGNORE_INDEX)
    expected = trainer.compute_loss(model, full)
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr(model.model, "forward", None)  # the LLM does not run
    found = trainer.compute_loss(model, alone)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_mixed_file_trains_in_micro_steps_of_one_kind(run_stage_1: Any) -> None:
    more = write_mixed(IMAGES[:4], IMAGES[2:])
    trainer, _ = run_stage_1(IMAGES, "--num_train_epochs 1 --patch_beta_start 0", more)
    logged = columns(trainer, "loss", "loss/caption", "loss/patch", "patch/beta")
    assert [caption is None for _, caption, _, _ in logged] == [False, True, False, True]
    for loss, caption, patch, beta in logged:
        assert loss == pytest.approx((caption or 0) + beta * patch, rel=1e-6)
    assert logged[0][3] == 0 and logged[3][3] == 5
    assert trainer.unsupervised.unsupervised == 0


def test_a_file_without_any_caption_trains_by_the_patch_loss_alone(run_stage_1: Any) -> None:
    trainer, _ = run_stage_1(IMAGES, "--num_train_epochs 1 --patch_regions_only_ratio 0", write_mixed([], IMAGES[:3]))
    assert [caption for (caption,) in columns(trainer, "loss/caption")] == [None, None]


@pytest.mark.parametrize(("ratio", "steps"), [("0", 2), ("2", 6)])
def test_the_ratio_of_the_kinds_is_a_flag(run_stage_1: Any, ratio: str, steps: int) -> None:
    flags = f"--num_train_epochs 1 --patch_regions_only_ratio {ratio} --save_strategy steps --save_steps {steps}"
    more = write_mixed(IMAGES[:4], IMAGES[2:])
    trainer, _ = run_stage_1(IMAGES, flags, more)
    kinds = [caption is None for (caption,) in columns(trainer, "loss/caption")]
    assert (len(kinds), sum(kinds)) == (steps, steps - 2)
    again, _ = run_stage_1(IMAGES, flags, more)
    assert again is None  # finished


def test_accumulation_averages_captions_over_their_own_micro_steps(run_stage_1: Any) -> None:
    more = write_mixed(IMAGES[:2], IMAGES[2:4])
    flags = "--max_steps 1 --per_device_train_batch_size 2"
    in_one, _ = run_stage_1(IMAGES, flags, [*more, "--patch_regions_only_ratio", "0"])
    mixed, _ = run_stage_1(IMAGES, f"{flags} --gradient_accumulation_steps 2", more)
    [(caption,)], [(mixed_caption,)] = columns(in_one, "loss/caption"), columns(mixed, "loss/caption")
    assert mixed_caption == pytest.approx(caption, rel=1e-6)
    [(loss, patch, regions)] = columns(mixed, "loss", "loss/patch", "patch/regions")
    assert loss == pytest.approx(caption / 2 + 5 * patch, rel=1e-6) and regions == 8


def test_without_such_records_all_numbers_and_bits_are_those_of_captions(run_stage_1: Any) -> None:
    more = write_mixed(IMAGES[:4], [])
    plain, _ = run_stage_1(IMAGES, "--max_steps 3", more)
    flagged, _ = run_stage_1(IMAGES, "--max_steps 3 --patch_regions_only_ratio 2", more)
    names = ("loss", "loss/caption", "loss/patch", "grad_norm")
    assert columns(plain, *names) == columns(flagged, *names)
    sampler = plain.epoch_sampler
    torch.manual_seed(42)
    assert sampler.order(0) == torch.randperm(4).tolist()


def test_records_without_text_are_refused_where_more_than_the_projector_is_trained(run_stage_1: Any) -> None:
    more = write_mixed(IMAGES[:2], IMAGES[2:4])
    with pytest.raises(ValueError, match="--tune_mm_mlp_adapter True"):
        run_stage_1(IMAGES, "--max_steps 1 --tune_mm_mlp_adapter False", more)


def test_a_pad_file_with_some_empty_captions_is_a_mixed_file(
    run_stage_1: Any, patch_flags: Callable[..., list[str]]
) -> None:
    patch_flags(IMAGES[:4], "")
    records = json.loads(Path("pad.json").read_text())
    records[1]["caption"] = ""
    Path("some.json").write_text(json.dumps(records))
    trainer, _ = run_stage_1(IMAGES[:4], "--num_train_epochs 1", ["--data_path", "some.json"])
    assert trainer.train_dataset.is_auxiliary.tolist() == [False, True, False, False]
    assert isinstance(trainer, LLaVATrainer) and trainer.state.max_steps == 3


TRAIN_TWICE = Path(__file__).parents[1] / "llava" / "train" / "train_twice.py"
RUNS = ("plain", "zero2", "zero3")


def engine_of(run: str) -> str:
    if run == "plain":
        return ""
    zero = {"stage": int(run[-1]), "stage3_param_persistence_threshold": 0}
    batch = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    config = dict.fromkeys(batch, "auto") | {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    Path(f"{run}.json").write_text(json.dumps(config))
    return f"--deepspeed {run}.json"


@pytest.mark.slow
def test_two_processes_with_warm_up_mixed_file_and_cached_features_equal_one_and_resume(
    run_stage_1: Any, patch_flags: Callable[..., list[str]]
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is part of the extra `train`")
    more = write_mixed(IMAGES[:4], IMAGES[2:])
    flags = "--num_train_epochs 2 --save_strategy steps --save_steps 2 --mm_projector_type mlp2x_gelu"
    flags += " --patch_warmup_steps 3"
    start = "--pretrain_mm_mlp_adapter train_init/mm_projector.bin"
    single, _ = run_stage_1(IMAGES, f"{flags} {start} --output_dir one --per_device_train_batch_size 4", more)
    commands: list[str] = []
    for run in RUNS:
        own = f"--output_dir {run} --cache_features features-{run} {engine_of(run)}"
        commands += ["--next", *patch_flags(IMAGES, f"{flags} {start} {own}", more)]
    run_in_two_processes(str(TRAIN_TWICE), "--plugin", *commands[1:])
    expected = [loss for (loss,) in columns(single, "loss")]
    projector = torch.load("one/mm_projector.bin")
    assert len(expected) == 4
    for run in RUNS:
        first, resumed = json.loads(Path(run, "losses.json").read_text())
        assert resumed == first
        assert first == pytest.approx(expected, rel=1e-5)
        for name, tensor in torch.load(f"{run}/mm_projector.bin").items():
            # AdamW divides by the gradient's size, so small gradients pass on their rounding: up to 2.5e-5 was seen.
            assert (tensor - projector[name]).norm() < 1e-4 * projector[name].norm(), name


# Warm-up


WARM = "--patch_warmup_steps 40 --max_steps 3 --mm_projector_type mlp2x_gelu --logging_steps 10"


def test_a_warm_up_runs_the_patch_loss_alone_before_the_run(run_stage_1: Any) -> None:
    flags = f"{WARM} --patch_beta_start 0 --logging_steps 1 --num_train_epochs 1"
    trainer, _ = run_stage_1(IMAGES[:4], flags)
    warm = json.loads(Path("run/patch_warmup/trainer_state.json").read_text())["log_history"]
    warm = [entry for entry in warm if "loss" in entry]
    assert [entry["step"] for entry in warm] == list(range(1, 41))
    assert all("loss/caption" not in entry and entry["loss"] == pytest.approx(entry["loss/patch"]) for entry in warm)
    rates = [entry["learning_rate"] for entry in warm]
    assert rates[:3] == pytest.approx([0, 1.5e-3, 3e-3]) and set(rates[2:]) == {3e-3}  # 3% of 40, rounded up
    logged = columns(trainer, "patch/beta", "learning_rate", "loss/patch")
    assert [row[:2] for row in logged] == [(0.0, 3e-3), (2.5, 3e-3), (5.0, 3e-3)]
    assert logged[0][2] == pytest.approx(warm[-1]["loss/patch"], abs=0.1)
    assert warm[-1]["loss/patch"] < warm[0]["loss/patch"] - 0.3
    assert trainer.state.max_steps == 3 and len(logged) == 3


def test_the_run_is_one_that_starts_from_the_warm_projector(run_stage_1: Any) -> None:
    warm, _ = run_stage_1(IMAGES[:4], f"{WARM} --logging_steps 1")
    start = "--pretrain_mm_mlp_adapter run/patch_warmup/mm_projector.bin --output_dir cold --patch_warmup_steps 0"
    cold, _ = run_stage_1(IMAGES[:4], f"{WARM} --logging_steps 1 {start}")
    names = ("loss", "loss/caption", "loss/patch", "grad_norm")
    assert columns(warm, *names) == columns(cold, *names)


def test_a_stopped_warm_up_resumes_exactly_and_is_not_repeated(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = "--pretrain_mm_mlp_adapter train_init/mm_projector.bin"
    run_stage_1(IMAGES[:4], f"{WARM} {start} --output_dir whole")
    flags = f"{WARM} {start} --save_strategy steps --save_steps 2"
    compute_loss = LLaVATrainer.compute_loss

    def signalled(self: LLaVATrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 24:
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(LLaVATrainer, "compute_loss", signalled)
        run_stage_1(IMAGES[:4], flags)
    assert stopped.value.code == 143
    assert "run/patch_warmup/checkpoint-25" in caplog.text and not Path("run/mm_projector.bin").exists()
    resumed, _ = run_stage_1(IMAGES[:4], flags)
    for folder in ("patch_warmup", "."):
        ours, theirs = (torch.load(Path(name, folder, "mm_projector.bin")) for name in ("run", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        ours, theirs = (json.loads(Path(name, folder, "trainer_state.json").read_text()) for name in ("run", "whole"))
        patch = [[entry.get("loss/patch") for entry in state["log_history"]] for state in (ours, theirs)]
        assert patch[0] == patch[1]

    written = Path("run/patch_warmup/trainer_state.json").stat().st_mtime_ns
    again, _ = run_stage_1(IMAGES[:4], flags)
    assert again is None  # a finished run stays finished
    for checkpoint in Path("run").glob("checkpoint-*"):
        checkpoint.rename(f"away-{checkpoint.name}")
    again, _ = run_stage_1(IMAGES[:4], flags)
    assert columns(again, "loss") == columns(resumed, "loss")
    assert Path("run/patch_warmup/trainer_state.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="a checkpoint of the warm-up"):
        run_stage_1(IMAGES[:4], f"{flags} --resume_from_checkpoint run/patch_warmup/checkpoint-40")


def test_a_warm_up_is_refused_where_more_than_the_projector_is_trained(run_stage_1: Any) -> None:
    with pytest.raises(ValueError, match=r"a warm-up.*--tune_mm_mlp_adapter True"):
        run_stage_1(IMAGES[:2], f"{WARM} --tune_mm_mlp_adapter False")
