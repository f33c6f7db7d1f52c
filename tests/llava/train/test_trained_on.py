"""Training that goes on from a LLaVA: a published checkpoint, or stage 2's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import own_name
from tests.folders import set_config

STEP = "--model_name_or_path tiny-llava --max_steps 1"
STAGE_2 = f"{STEP} --version v1 --data_path data_mix.json --tune_mm_mlp_adapter False"
TOWER = "model.vision_tower.vision_tower."
NORM = "vision_model.post_layernorm.weight"


@pytest.fixture
def train_on(golden_world: Path, run_stage_1: Callable[..., Any]) -> Callable[..., Any]:
    """Trains the tiny LLaVA on, after changing its config; takes changes and further flags, returns the trainer."""

    def run(changes: dict[str, Any], flags: str) -> Any:
        set_config("tiny-llava", **changes)
        return run_stage_1("run", flags)

    return run


def test_a_checkpoint_of_the_old_model_type_is_trained_on(train_on: Any) -> None:
    train_on({"model_type": "llava"}, STAGE_2)
    assert json.loads(Path("run/config.json").read_text())["model_type"] == "llava_llama"


@pytest.mark.parametrize("stage", [STEP, STAGE_2, f"{STAGE_2} --lora_enable True"], ids=["stage 1", "stage 2", "LoRA"])
def test_a_trained_tower_is_the_checkpoints(train_on: Any, stage: str) -> None:
    tower = load_file("tiny-clip/model.safetensors")
    tower[NORM] = tower[NORM] + 1
    weights = {TOWER + name: tensor for name, tensor in tower.items()} | load_file("tiny-llava/model.safetensors")
    save_file(weights, "tiny-llava/model.safetensors", {"format": "pt"})
    trainer = train_on({"unfreeze_mm_vision_tower": True}, stage)
    used = trainer.model.get_vision_tower().vision_tower.post_layernorm.weight
    torch.testing.assert_close(used, tower[NORM], rtol=0, atol=0)


def test_weights_that_do_not_fit_the_config_stop_training_before_it_begins(train_on: Any, run_stage_1: Any) -> None:
    weights = load_file("tiny-vicuna/model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, "tiny-vicuna/model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"tiny-vicuna do not fit .*Missing: \['model.layers.1.mlp.up_proj.weight'\] \(1\)"
    ):
        run_stage_1("run")
    weights["model.layers.1.mlp.up_proj.weight"] = lost[:-1].clone()
    save_file(weights, "tiny-vicuna/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight: model \(128, 64\), file \(127, 64\)"):
        run_stage_1("run")

    weights = load_file("tiny-llava/model.safetensors")
    projector = {name: weights.pop(name) for name in list(weights) if "mm_projector" in name}
    save_file(weights, "tiny-llava/model.safetensors", {"format": "pt"})
    given = "--pretrain_mm_mlp_adapter"
    with pytest.raises(ValueError, match=r"tiny-llava do not fit .*Missing: \['model.mm_projector.0.bias'"):
        train_on({}, f"{STAGE_2} {given}=")
    torch.save(projector, "mm_projector.bin")
    train_on({}, f"{STAGE_2} {given} mm_projector.bin")  # brings what the checkpoint lacks


def test_a_checkpoint_of_tiles_is_not_saved_as_a_flat_one(train_on: Any) -> None:
    with pytest.raises(ValueError, match="--mm_patch_merge_type spatial_unpad"):
        train_on({"mm_patch_merge_type": "spatial_unpad"}, STAGE_2)


@pytest.mark.parametrize(
    "flag", ["--mm_projector_type linear", "--mm_vision_select_layer -1", "--mm_vision_select_feature cls_patch"]
)
def test_flags_that_contradict_the_checkpoint_are_refused(train_on: Any, flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}: tiny-llava was trained with"):
        train_on({}, f"{STAGE_2} {flag}")


def test_a_tower_at_another_place_is_used_and_recorded(train_on: Any) -> None:
    Path("tiny-clip").rename("moved-clip")
    Path("tiny-clip").mkdir()
    for name in ("config.json", "preprocessor_config.json"):  # what the checkpoint's config names has no weights
        (Path("tiny-clip") / name).write_bytes((Path("moved-clip") / name).read_bytes())
    train_on({}, f"{STAGE_2} --vision_tower moved-clip")
    assert json.loads(Path("run/config.json").read_text())["mm_vision_tower"] == "moved-clip"


STAGES = {"stage 1": STEP, "stage 2": STAGE_2, "LoRA": f"{STAGE_2} --lora_enable True"}
TILES = "--image_aspect_ratio anyres --image_grid_pinpoints [[56,112],[112,56]] --mm_patch_merge_type spatial_unpad"


@pytest.mark.parametrize("tiles", ["", TILES], ids=["flat", "tiles"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_training_saves_can_be_loaded(stage: str, tiles: str, run_stage_1: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna", use_fast=False)
    tokenizer.add_tokens(["<row>"])  # of which the LLM knows nothing, as in many tokenizers
    tokenizer.save_pretrained("tiny-vicuna")
    trainer = run_stage_1("run", f"{STAGES[stage]} --model_name_or_path tiny-vicuna {tiles}")
    trained = {own_name(name): weight for name, weight in trainer.model.named_parameters() if "lora_" not in name}
    loaded = load_pretrained_model("run", None if stage == "stage 2" else "tiny-vicuna", "", device="cpu").model
    assert {name: weight.shape for name, weight in loaded.named_parameters()} == {
        name: weight.shape for name, weight in trained.items()
    }
    assert torch.equal(loaded.get_model().mm_projector[0].weight, trained["model.mm_projector.0.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_what_could_not_be_loaded_is_not_trained(stage: str, train_on: Any) -> None:
    config = json.loads(Path("tiny-clip/config.json").read_text())
    wide = CLIPVisionConfig(**{**config, "hidden_size": 48})
    CLIPVisionModel(wide).save_pretrained("wide-clip")
    shutil.copy("tiny-clip/preprocessor_config.json", "wide-clip")
    with pytest.raises(ValueError, match=r"mm_projector.0.weight: model \(64, 48\), file \(64, 32\)"):
        train_on({}, f"{STAGES[stage]} --vision_tower wide-clip")
    assert not Path("run/config.json").exists()


def test_a_newline_is_added_where_tiles_are_new(train_on: Any) -> None:
    train_on({}, f"{STAGE_2} {TILES}")
    assert "model.image_newline" in load_file("run/model.safetensors")
