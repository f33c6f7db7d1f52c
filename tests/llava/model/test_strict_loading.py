"""`load_pretrained_model` reads weights strictly, from every layout, and runs no pickle."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel
from transformers.utils import is_flash_attn_2_available

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.weights import read_tensors
from tests.folders import save_shards, set_config

TOWER = "model.vision_tower.vision_tower.vision_model."


def load(folder: str, base: str | None = None) -> Any:
    return load_pretrained_model(folder, base, "x", device="cpu").model


@pytest.mark.parametrize("layout", ["bin", "old bin", "bin shards", "safetensors shards"])
def test_every_layout_gives_the_same_weights(golden_world: Path, layout: str) -> None:
    expected = load("tiny-llava").state_dict()
    folder = golden_world / "tiny-llava"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as transformers 4.31 saved
    (folder / "model.safetensors").unlink()
    if "shards" in layout:
        save_shards(weights, folder, layout.split()[0])
    else:
        zipped = layout == "bin"
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = load("tiny-llava").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_pickled_object_is_ever_built(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    state = torch.load("stage1/mm_projector.bin", weights_only=True)
    torch.save(state | {"surprise": Fraction(1, 2)}, "stage1/mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector\.bin cannot be read as a file of tensors.*never loaded"):
        load("stage1", "tiny-vicuna")
    weights = load_file("tiny-llava/model.safetensors")
    Path("tiny-llava/model.safetensors").unlink()
    torch.save(weights | {"surprise": Fraction(1, 2)}, "tiny-llava/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"tiny-llava cannot be read as a file of tensors.*never loaded"):
        load("tiny-llava")


def test_files_that_are_no_state_dict_are_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match=r"list\.bin holds a list"):
        read_tensors(tmp_path / "list.bin")
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "more.bin")
    with pytest.raises(ValueError, match=r"more\.bin holds more than tensors: \['epoch'\]"):
        read_tensors(tmp_path / "more.bin")
    for name in ("cut.bin", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"cut off")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_tensors(tmp_path / name)


def test_a_torch_file_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.bin", tmp_path / "cut.bin"
    torch.save({"weight": torch.zeros(5000)}, whole)
    content = whole.read_bytes()
    for length in (*range(0, len(content), 997), len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.bin cannot be read as a file of tensors\. It is cut off"):
            read_tensors(cut)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "missing.bin")


def test_missing_and_unexpected_weights_are_named(golden_world: Path) -> None:
    weights = load_file("tiny-llava/model.safetensors")
    weights["model.surprise"] = weights.pop("model.mm_projector.2.bias")
    save_file(weights, "tiny-llava/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.mm_projector\.2\.bias.*model\.surprise"):
        load("tiny-llava")


def test_a_weight_of_another_shape_is_named_with_both_shapes(golden_world: Path) -> None:
    set_config("tiny-llava", intermediate_size=96)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight: model \(64, 96\), file \(64, 128\)"):
        load("tiny-llava")


def test_a_projector_of_another_width_names_both_shapes(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    state = torch.load("stage1/mm_projector.bin", weights_only=True)
    state["model.mm_projector.0.weight"] = torch.zeros(64, 48)
    torch.save(state, "stage1/mm_projector.bin")
    with pytest.raises(ValueError, match=r"0\.weight: model \(64, 32\), file \(64, 48\)"):
        load("stage1", "tiny-vicuna")


def test_a_stranger_in_a_projector_file_is_named(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    state = torch.load("stage1/mm_projector.bin", weights_only=True)
    torch.save(state | {"model.vision_resampler.weight": torch.zeros(2)}, "stage1/mm_projector.bin")
    with pytest.raises(ValueError, match=r"vision_resampler\.weight: model has no such tensor, file \(2,\)"):
        load("stage1", "tiny-vicuna")


def test_start_and_end_tokens_of_stage_1_get_their_trained_rows(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    set_config("stage1", mm_use_im_start_end=True, vocab_size=1002)
    state = torch.load("stage1/mm_projector.bin", weights_only=True)
    table = torch.randn(1002, 64)
    torch.save(state | {"model.embed_tokens.weight": table}, "stage1/mm_projector.bin")
    tokenizer, model, _, _ = load_pretrained_model("stage1", "tiny-vicuna", "x", device="cpu")
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [1000, 1001]
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert model.lm_head.weight.shape == (1002, 64)


def tower_checkpoint(goldens: Path, trained: bool) -> dict[str, Tensor]:
    """Copies the recorded checkpoint of stage 2, with a tower that differs from the one in its own folder."""
    shutil.copytree(goldens / "ckpt_stage2", "stage2")
    weights = load_file("stage2/model.safetensors")
    weights = {name: tensor + name.startswith(TOWER) for name, tensor in weights.items()}
    save_file(weights, "stage2/model.safetensors", metadata={"format": "pt"})
    set_config("stage2", unfreeze_mm_vision_tower=trained)
    return {name: tensor for name, tensor in weights.items() if name.startswith(TOWER)}


def test_a_copy_of_the_frozen_tower_is_passed_over(golden_world: Path, goldens: Path, capfd: Any) -> None:
    tower_checkpoint(goldens, trained=False)
    tower = load("stage2").get_vision_tower()
    own = load_file("tiny-clip/model.safetensors")
    found = tower.vision_tower.state_dict()
    assert all(torch.equal(found[name.removeprefix("vision_model.")], own[name]) for name in own)
    assert "vision_model" not in capfd.readouterr().err


@pytest.mark.parametrize("layout", ["one file", "bin shards"])
def test_a_trained_tower_is_read_from_the_checkpoint(golden_world: Path, goldens: Path, layout: str) -> None:
    trained = tower_checkpoint(goldens, trained=True)
    if layout == "bin shards":
        weights = load_file("stage2/model.safetensors")
        weights[TOWER + "embeddings.position_ids"] = torch.arange(17)[None]  # as transformers 4.30 saved
        save_shards(weights, Path("stage2"), "bin")
        Path("stage2/model.safetensors").unlink()
    found = load("stage2").get_vision_tower().vision_tower.state_dict()
    assert {TOWER + name for name in found} == trained.keys()
    assert all(torch.equal(found[name.removeprefix(TOWER)], tensor) for name, tensor in trained.items())


def test_a_trained_tower_must_be_whole(golden_world: Path, goldens: Path) -> None:
    tower_checkpoint(goldens, trained=True)
    weights = load_file("stage2/model.safetensors")
    weights[TOWER + "surprise"] = weights.pop(TOWER + "post_layernorm.bias")
    save_file(weights, "stage2/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"post_layernorm\.bias: model \(32,\), file has no.*surprise: model has no"):
        load("stage2")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("content", [LFS_POINTER, None])
@pytest.mark.parametrize("broken", ["tiny-llava", "tiny-clip"])
def test_a_broken_safetensors_file_is_named(golden_world: Path, broken: str, content: bytes | None) -> None:
    file = golden_world / broken / "model.safetensors"
    file.write_bytes(content or file.read_bytes()[:20000])
    with pytest.raises(ValueError, match=rf"{broken}/model\.safetensors.*{'git lfs pull' if content else 'again'}"):
        load("tiny-llava")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10**9}, r"embed_tokens.weight: model \(1000, 1000000000\), file \(1000, 64\)"),
        ({"hidden_size": "64"}, r"hidden_size.*'64'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, but the weights have 3"),
        ({"num_attention_heads": 0}, "config.json of .*tiny-llava"),
        ({"vocab_size": -1}, "config.json of .*tiny-llava"),
        ({"mm_projector_type": 5}, "config.json of .*tiny-llava"),
        ({"mm_vision_select_layer": -20}, "mm_vision_select_layer: found -20, .*tiny-clip has 3 layers"),
    ],
)
def test_a_config_that_describes_other_weights_is_refused(
    golden_world: Path, values: dict[str, Any], message: str
) -> None:
    set_config("tiny-llava", **values)
    with pytest.raises(ValueError, match=message):
        load("tiny-llava")


def test_auto_classes_know_our_folders(golden_world: Path) -> None:
    assert isinstance(AutoModel.from_pretrained("tiny-llava"), LlavaLlamaForCausalLM)


def test_a_tower_that_is_not_loaded_is_named(golden_world: Path) -> None:
    model = LlavaLlamaForCausalLM.from_pretrained("tiny-llava")
    with pytest.raises(ValueError, match=r"get_vision_tower\(\)\.load_model\(\)"):
        model.encode_images(torch.zeros(1, 3, 56, 56))


def test_strings_may_stop_an_answer(golden_world: Path) -> None:
    tokenizer, model, _, _ = load_pretrained_model("tiny-llava", None, "x", device="cpu")
    arguments = {"max_new_tokens": 3, "do_sample": False}
    ids = torch.tensor([[1, 5, 9]])
    stopped = model.generate(ids, stop_strings=["###"], tokenizer=tokenizer, **arguments)
    assert stopped.tolist() == model.generate(ids, **arguments).tolist()


def test_flash_attention_that_is_not_installed_is_passed_over(golden_world: Path, caplog: Any) -> None:
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    load_pretrained_model("tiny-llava", None, "x", device="cpu", use_flash_attn=True)
    assert "flash-attn" in caplog.text


def test_saved_weights_have_the_permissions_of_other_new_files(golden_world: Path) -> None:
    load("tiny-llava").save_pretrained("saved")
    (golden_world / "other").touch()
    assert (golden_world / "saved/model.safetensors").stat().st_mode == (golden_world / "other").stat().st_mode
