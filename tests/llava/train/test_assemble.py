"""Which parts a stage trains, in which precision, and how the tokenizer pads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.train.assemble import give_padding_token
from llava.train.lora import find_all_linear_names

STAGE_2 = "--version v1 --data_path two.json --tune_mm_mlp_adapter False --num_train_epochs 1"


@pytest.fixture
def trained_parts(golden_world: Path, run_stage_1: Callable[..., Any]) -> Callable[..., set[str]]:
    """Runs a step of stage 2 with further flags; returns the parts whose weights are trained."""
    Path("two.json").write_text(json.dumps(json.loads(Path("data_mix.json").read_text())[:2]))

    def run(flags: str) -> set[str]:
        model = run_stage_1("run", f"{STAGE_2} {flags}").model
        names = [name for name, param in model.named_parameters() if param.requires_grad]
        return {
            next(part for part in ("vision_tower", "mm_projector", "lm_head", "model.") if part in n) for n in names
        }

    return run


def test_stage_2_trains_all_but_the_tower(trained_parts: Any) -> None:
    assert trained_parts("") == {"mm_projector", "lm_head", "model."}


def test_a_frozen_projector_stays_out(trained_parts: Any) -> None:
    assert trained_parts("--freeze_mm_mlp_adapter True") == {"lm_head", "model."}


def test_a_frozen_backbone_leaves_projector_and_head(trained_parts: Any) -> None:
    assert trained_parts("--freeze_backbone True") == {"mm_projector", "lm_head"}  # upstream parity


def test_a_trained_tower_is_marked_in_the_config(trained_parts: Any) -> None:
    assert trained_parts("--unfreeze_mm_vision_tower True") == {"vision_tower", "mm_projector", "lm_head", "model."}
    assert json.loads(Path("run/config.json").read_text())["unfreeze_mm_vision_tower"] is True


def test_bfloat16_keeps_what_is_trained_in_float32(
    golden_world: Path, run_stage_1: Any, logged: Any, goldens: Path
) -> None:
    trainer = run_stage_1("run", "--bf16 True")
    dtypes = {param.requires_grad: param.dtype for param in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    golden = json.loads((goldens / "g_train_stage1.json").read_text())["loss"]
    assert logged(trainer) == pytest.approx(golden, rel=5e-3)  # bfloat16 has eight bits


@pytest.mark.parametrize(
    ("version", "tokens", "pad"),
    [
        ("v1", {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}, "<unk>"),
        ("v1", {"unk_token": None, "pad_token": "<pad>", "eos_token": "</s>"}, "<pad>"),
        ("v1", {"unk_token": None, "pad_token": None, "eos_token": "</s>"}, "</s>"),
        ("v0", {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}, "<pad>"),
    ],
)
def test_padding_token(version: str, tokens: dict[str, str | None], pad: str) -> None:
    tokenizer = SimpleNamespace(**tokens)
    give_padding_token(tokenizer, SimpleNamespace(), version)  # type: ignore[arg-type]
    assert tokenizer.pad_token == pad


@pytest.mark.golden
def test_layers_for_lora(run_stage_1: Any, goldens: Path) -> None:
    model = run_stage_1("run", "--max_steps 1").model
    recorded = json.loads((goldens / "g_projectors.json").read_text())["find_all_linear_names/after_tower"]
    assert find_all_linear_names(model) == sorted(recorded)
