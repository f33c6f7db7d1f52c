"""Which parts a stage trains, in which precision, and how the tokenizer pads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.model.builder import stop_at_end_mark
from llava.train import arguments
from llava.train.assemble import give_padding_token, weights_dtype
from tests.training import logged

LLAMA_3 = ("<|finetune_right_pad_id|>", "<|eot_id|>")
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


def test_bfloat16_keeps_what_is_trained_in_float32(golden_world: Path, run_stage_1: Any, goldens: Path) -> None:
    trainer = run_stage_1("run", "--bf16 True")
    dtypes = {param.requires_grad: param.dtype for param in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    golden = json.loads((goldens / "g_train_stage1.json").read_text())["loss"]
    assert logged(trainer) == pytest.approx(golden, rel=5e-3)  # bfloat16 has eight bits


def test_bf16_auto_rounds_what_is_frozen_alone(
    golden_world: Path, run_stage_1: Any, goldens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "cpu_multiplies_bf16", lambda: True)
    trainer = run_stage_1("run", "--bf16 auto")
    model = trainer.model
    dtypes = {param.requires_grad: param.dtype for param in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert not trainer.args.bf16  # no autocast, under which the projector would compute in bfloat16
    assert model.encode_images(torch.randn(1, 3, 56, 56)).dtype == torch.float32
    golden = json.loads((goldens / "g_train_stage1.json").read_text())["loss"]
    assert logged(trainer) == pytest.approx(golden, rel=5e-3)  # bfloat16 has eight bits
    run_stage_1("exact")
    moved = [
        torch.cat([(state[name] - start[name]).flatten() for name in start])
        for state in (torch.load(f"{name}/mm_projector.bin") for name in ("run", "exact"))
        for start in [torch.load("train_init/mm_projector.bin")]
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"fp16": True, "tune_mm_mlp_adapter": True}, torch.float16),
        ({"fp16": True, "lora_enable": True}, torch.float16),
        ({"bf16": True, "deepspeed": "zero2.json"}, torch.bfloat16),
        ({"bf16": True}, torch.float32),
        ({"bf16": True, "freeze_backbone": True}, torch.float32),  # the lm_head is trained
        ({"tune_mm_mlp_adapter": True}, torch.float32),
    ],
)
def test_half_precision_is_for_what_is_frozen_or_copied(flags: dict[str, Any], dtype: torch.dtype) -> None:
    names = ("bf16", "fp16", "deepspeed", "lora_enable", "tune_mm_mlp_adapter", "freeze_backbone", "frozen_in_bf16")
    given: Any = SimpleNamespace(**(dict.fromkeys(names, False) | flags))
    assert weights_dtype(given, given) is dtype


def test_start_and_end_tokens_are_trained_and_saved_with_the_projector(run_stage_1: Any) -> None:
    model = run_stage_1("run", "--mm_use_im_start_end True --max_steps 2").model
    assert not model.get_output_embeddings().weight.requires_grad
    saved = torch.load("run/mm_projector.bin")
    assert saved["model.embed_tokens.weight"].shape == (1002, 64)


@pytest.mark.parametrize(
    ("version", "tokens", "pad"),
    [
        ("v1", {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}, "<unk>"),
        ("v1", {"unk_token": None, "pad_token": "<pad>", "eos_token": "</s>"}, "<pad>"),
        ("v1", {"unk_token": None, "pad_token": None, "eos_token": "</s>"}, "</s>"),
        ("v1", {"unk_token": None, "pad_token": None, "eos_token": "<|eot_id|>", "vocabulary": LLAMA_3}, LLAMA_3[0]),
        ("v0", {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}, "<pad>"),
    ],
)
def test_padding_token(version: str, tokens: dict[str, Any], pad: str) -> None:
    tokenizer = SimpleNamespace(**tokens, get_vocab=lambda: tokens.get("vocabulary", []))
    give_padding_token(tokenizer, SimpleNamespace(), version)  # type: ignore[arg-type]
    assert tokenizer.pad_token == pad


@pytest.mark.parametrize(
    ("known", "version", "ends"),
    [
        (1, "llava_llama_3", [1, 9]),  # the base model's end of text alone
        ([1, 8, 9], "llava_llama_3", [1, 8, 9]),
        (None, "llava_llama_3", [9]),
        (1, "v0", 1),  # `###` is no token
        (1, "plain", 1),
    ],
)
def test_generation_stops_at_the_templates_end_mark(known: Any, version: str, ends: Any) -> None:
    tokenizer = SimpleNamespace(get_added_vocab=lambda: {"<|end_of_text|>": 1, "<|eom_id|>": 8, "<|eot_id|>": 9})
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=known))
    stop_at_end_mark(tokenizer, model, version)
    assert model.generation_config.eos_token_id == ends


@pytest.mark.golden
@pytest.mark.parametrize(
    ("folder", "flag"), [("ckpt_stage1", "--pretrain_mm_mlp_adapter"), ("ckpt_lora", "--lora_weight_path")]
)
def test_a_folder_without_a_whole_model_is_told_where_it_belongs(
    folder: str, flag: str, goldens: Path, golden_world: Path, run_stage_1: Callable[..., Any]
) -> None:
    shutil.copytree(goldens / folder, folder)
    with pytest.raises(ValueError, match=f"--model_name_or_path {folder} holds .* {flag} {folder}"):
        run_stage_1("run", f"--model_name_or_path {folder}")
