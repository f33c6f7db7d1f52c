"""The one place where losses are weighted, summed and logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.plugin import AlignmentContext, AuxiliaryOutput, TrainingPlugin
from llava.train.checkpointing import CheckpointingTrainer
from llava.train.llava_trainer import LLaVATrainer, run_progress
from tests.training import logged


class SquaresPlugin(TrainingPlugin):
    """Adds the mean square of the visual tokens, and a metric that is reported for one image in two."""

    def __init__(self, weight: float):
        self.weight = weight
        self.progress: list[float] = []
        self.pictures: list[tuple[torch.Size, float, float]] = []

    def auxiliary_losses(self, context: AlignmentContext, batch: Any) -> AuxiliaryOutput:
        count = context.visual_tokens.shape[0]
        metric = torch.tensor(float(count) if len(self.progress) % 2 else math.nan)
        return AuxiliaryOutput({"squares": context.visual_tokens.square().mean()}, {"squares/images": metric})

    def loss_weights(self, progress: float) -> dict[str, float]:
        self.progress.append(progress)
        return {"squares": self.weight * progress}

    def describe_first_batch(self, images: torch.Tensor, grid: tuple[int, int], batch: Any, path: Path) -> None:
        self.pictures.append((images.shape, images.min().item(), images.max().item()))


def same_captions(count: int) -> None:
    """A data file whose samples have different images and equally many supervised tokens."""
    records = json.loads(Path("data_plain.json").read_text())[:1] * count
    records = [record | {"id": f"s{i}", "image": f"im{i}.png"} for i, record in enumerate(records)]
    Path("same.json").write_text(json.dumps(records))


def test_a_plugin_of_weight_zero_leaves_every_bit_as_it_is_and_is_shown_the_first_batch(run_stage_1: Any) -> None:
    plugin = SquaresPlugin(0.0)
    plain, with_plugin = run_stage_1("plain"), run_stage_1("zero", plugin=plugin)
    assert logged(plain) == logged(with_plugin)
    ours, theirs = (torch.load(f"{name}/mm_projector.bin") for name in ("plain", "zero"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    [(shape, low, high)] = plugin.pictures
    assert shape == (4, 3, 56, 56)
    assert 0 <= low < 0.01 and 0.9 < high <= 1  # not normalised: the synthetic images use nearly the whole range
    again = LLaVATrainer(model=plain.model, tokenizer=plain.processing_class, args=plain.args)  # upstream's name of it
    assert again.processing_class is plain.processing_class


@pytest.mark.parametrize("flags", ["", "--bf16 True"])
def test_the_total_is_the_weighted_sum_of_what_is_logged(flags: str, run_stage_1: Any) -> None:
    trainer = run_stage_1("run", flags, plugin=SquaresPlugin(3.0))
    assert logged(trainer, "squares/beta") == [3.0 * step / 4 for step in range(5)]
    totals = [
        caption + beta * squares
        for caption, beta, squares in zip(
            logged(trainer, "loss/caption"),
            logged(trainer, "squares/beta"),
            logged(trainer, "loss/squares"),
            strict=True,
        )
    ]
    assert logged(trainer) == pytest.approx(totals, rel=1e-6)
    assert logged(trainer)[4] > logged(trainer, "loss/caption")[4] + 0.01


def test_metrics_are_averaged_over_the_micro_batches_that_report(run_stage_1: Any) -> None:
    flags = "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 --logging_steps 5"
    plugin = SquaresPlugin(1.0)
    trainer = run_stage_1("run", flags, plugin=plugin)
    # constant within a step, and the same number of values for each
    assert plugin.progress == [step / 4 for step in range(5) for _ in range(4)]
    assert logged(trainer, "squares/images") == [1.0]  # NaN on every other micro-batch
    assert logged(trainer, "squares/beta") == [0.5]


@pytest.mark.parametrize("plugin", [None, SquaresPlugin(2.0)], ids=["plain", "plugin"])
def test_accumulation_in_four_equals_one_batch(run_stage_1: Any, plugin: Any) -> None:
    same_captions(4)
    at_once = run_stage_1("one", "--data_path same.json", plugin=plugin)
    flags = "--data_path same.json --per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    in_four = run_stage_1("four", flags, plugin=plugin)
    assert logged(in_four) == pytest.approx(logged(at_once), rel=2e-6)


def test_an_engine_that_rounds_the_model_leaves_its_rotary_frequencies_exact(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run_stage_1("exact", "--max_steps 1").model.get_model().rotary_emb.inv_freq
    prepare = CheckpointingTrainer._prepare_for_training

    def prepare_and_round(trainer: Any, *arguments: Any) -> Any:
        prepared = prepare(trainer, *arguments)
        trainer.model.get_model().rotary_emb.bfloat16()  # as DeepSpeed before 0.19.2 does
        return prepared

    monkeypatch.setattr(CheckpointingTrainer, "_prepare_for_training", prepare_and_round)
    assert torch.equal(run_stage_1("rounded", "--max_steps 1").model.get_model().rotary_emb.inv_freq, exact)


def test_progress_runs_from_zero_to_one() -> None:
    assert [run_progress(step, 3) for step in range(3)] == [0.0, 0.5, 1.0]
    assert run_progress(0, 1) == 1.0
    assert run_progress(7, 3) == 1.0


def test_a_loss_without_weight_is_refused(run_stage_1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SquaresPlugin(1.0)
    monkeypatch.setattr(plugin, "loss_weights", lambda progress: {})
    with pytest.raises(ValueError, match="no weight for its loss 'squares'"):
        run_stage_1("run", plugin=plugin)


def test_a_loss_that_is_not_finite_stops_and_names_its_samples(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = SquaresPlugin(1.0)
    lost = AuxiliaryOutput({"squares": torch.tensor(math.nan)})
    monkeypatch.setattr(plugin, "auxiliary_losses", lambda context, batch: lost)
    monkeypatch.setattr(plugin, "loss_weights", lambda progress: {"squares": 1.0})
    with pytest.raises(ValueError, match=r"Step 0: the loss is nan .*loss/squares nan.*Samples: p\d, p\d, p\d, p\d\."):
        run_stage_1("run", plugin=plugin)


def test_an_image_that_does_not_fit_stops_and_names_the_sample(run_stage_1: Any) -> None:
    records = json.loads(Path("data_mix.json").read_text())
    records[0]["conversations"][0]["value"] = "word " * 30 + "\n<image>"
    Path("long.json").write_text(json.dumps(records[:1]))
    with pytest.raises(ValueError, match="c0"):
        run_stage_1("run", "--version v1 --data_path long.json --model_max_length 40")


def test_a_sequence_without_room_for_image_and_text_is_refused(run_stage_1: Any) -> None:
    with pytest.raises(ValueError, match="--model_max_length: found 20"):
        run_stage_1("run", "--model_max_length 20")


def test_several_gpus_in_one_process_are_refused(run_stage_1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.train.arguments import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="One process sees 2 GPUs"):
        run_stage_1("run")
