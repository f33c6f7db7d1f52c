"""LoRA and QLoRA: what is trained, what is saved at every checkpoint, and that a run goes on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

pytest.importorskip("peft", reason="peft is part of the extra `train`")

from llava.model import multimodal_merge
from llava.model.builder import load_pretrained_model
from llava.model.language_model import causal_lm
from llava.train.lora import get_peft_state_maybe_zero_3
from tests.training import logged

LORA = (
    "--version v1 --data_path mix.json --tune_mm_mlp_adapter False --image_aspect_ratio pad --learning_rate 2e-3 "
    "--mm_projector_lr 2e-4 --num_train_epochs 2 --lora_enable True --lora_r 4 --lora_alpha 8"
)
ADAPTED = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
SAVED = {"adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin", "config.json"}


@pytest.fixture
def run_lora(golden_world: Path, run_stage_1: Callable[..., Any]) -> Callable[..., Any]:
    """Trains adapters of the tiny LLM on eight samples with an output folder and further flags."""
    records = [record for record in json.loads(Path("data_mix.json").read_text()) if record["id"] != "c8"]
    Path("mix.json").write_text(json.dumps([*records, records[0] | {"id": "again"}]))
    return lambda output_dir, flags="": run_stage_1(output_dir, f"{LORA} {flags}")


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | torch.load(folder / "non_lora_trainables.bin")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def resume_from(folder: Path, step: int) -> None:
    """Leaves of a finished run what it would have left, had it been killed after `step`."""
    for path in folder.iterdir():
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("adapts", [True, False])
def test_packing_keeps_the_losses(run_lora: Any, adapts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # AdamW's first steps would make rounding as large as gradients.
    flags = f"--lora_enable {adapts} --per_device_train_batch_size 8 --max_steps 3 --optim sgd"
    padded = logged(run_lora("padded", flags))
    rows: list[int] = []

    def counted_pack(*arguments: Any) -> Any:
        packed = multimodal_merge.pack(*arguments)
        rows.append(len(packed.labels))
        return packed

    monkeypatch.setattr(causal_lm, "pack", counted_pack)
    assert logged(run_lora("packed", f"{flags} --pack_samples True")) == pytest.approx(padded, rel=1e-5)
    assert len(rows) == 3 and max(rows) < 8  # samples of a batch


@pytest.mark.parametrize("flags", ["", "--bits 4", "--unfreeze_mm_vision_tower True"], ids=["lora", "qlora", "tower"])
def test_a_run_goes_on_from_any_checkpoint(run_lora: Any, flags: str) -> None:
    flags += " --lora_dropout 0.1 --save_strategy steps --save_steps 2"
    whole = run_lora("run", flags)
    folder = Path("run")
    at_end = saved_tensors(folder)
    for saved in (folder, folder / "checkpoint-2", folder / "checkpoint-4"):
        assert {path.name for path in saved.iterdir()} >= SAVED
    resume_from(folder, 2)
    resumed = run_lora("run", flags)
    assert logged(resumed) == logged(whole)
    assert len(logged(whole)) == 4
    assert_same(saved_tensors(folder), at_end)


def test_a_trained_tower_is_saved_under_the_names_of_checkpoints(run_lora: Any) -> None:
    model = run_lora("run", "--unfreeze_mm_vision_tower True --max_steps 1").model
    saved = torch.load("run/non_lora_trainables.bin")
    prefix = "base_model.model.model.vision_tower.vision_tower.vision_model."
    tower = {name: tensor for name, tensor in saved.items() if name.startswith(prefix)}
    assert len(tower) == len(list(model.get_vision_tower().parameters()))
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(tower[prefix + name], model.get_vision_tower().vision_tower.get_parameter(name))
    assert json.loads(Path("run/config.json").read_text())["unfreeze_mm_vision_tower"] is True


def test_rows_of_the_marks_around_an_image_are_saved_and_read_again(run_stage_1: Any, run_lora: Any) -> None:
    run_stage_1("first", "--mm_use_im_start_end True --max_steps 2")
    flags = "--mm_use_im_start_end True --pretrain_mm_mlp_adapter first/mm_projector.bin"
    trained = run_lora("run", f"{flags} --max_steps 1").model.eval()
    rows = torch.load("first/mm_projector.bin")["model.embed_tokens.weight"][-2:]
    loaded = load_pretrained_model("run", "tiny-vicuna", "llava-lora", device="cpu").model
    assert torch.equal(loaded.get_input_embeddings().weight[-2:], rows)
    batch = {"input_ids": torch.tensor([[1, 5, 1000, -200, 1001, 7]]), "images": torch.randn(1, 3, 56, 56)}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trained(**batch).logits, rtol=1e-5, atol=1e-5)

    # Another stage 1 would bring other rows; those of the adapters' own run count.
    run_stage_1("other", "--mm_use_im_start_end True --max_steps 2 --learning_rate 1e-2")
    again = flags.replace("first", "other") + " --lora_weight_path run --learning_rate 0 --mm_projector_lr 0"
    run_lora("again", f"{again} --max_steps 1")
    assert_same(saved_tensors(Path("again")), saved_tensors(Path("run")))


def test_a_run_that_lost_the_rows_of_the_marks_is_said_to_have(run_lora: Any, caplog: pytest.LogCaptureFixture) -> None:
    run_lora("run", "--mm_use_im_start_end True --max_steps 1")
    state = torch.load("run/non_lora_trainables.bin")
    kept = {name: tensor for name, tensor in state.items() if "mm_projector" in name}
    assert len(kept) == len(state) - 2
    torch.save(kept, "run/non_lora_trainables.bin")
    load_pretrained_model("run", "tiny-vicuna", "llava-lora", device="cpu")
    assert "has no word embeddings of the tokens around an image" in caplog.text


def test_adapters_start_from_another_runs(run_lora: Any) -> None:
    run_lora("first", "--max_steps 2")
    run_lora("second", "--lora_weight_path first --learning_rate 0 --mm_projector_lr 0 --max_steps 1")
    assert_same(saved_tensors(Path("second")), saved_tensors(Path("first")))
    with pytest.raises(ValueError, match=r"first does not fit this model.*down_proj\.lora_A\.weight.*\(4, 128\)"):
        run_lora("third", "--lora_weight_path first --lora_r 8")
    with pytest.raises(FileNotFoundError, match=r"No adapter_model\.safetensors in tiny-vicuna"):
        run_lora("run", "--lora_weight_path tiny-vicuna")


def test_biases_are_trained_and_saved_where_they_are_asked_for(run_lora: Any) -> None:
    LlamaForCausalLM.from_pretrained("tiny-vicuna", attention_bias=True).save_pretrained("tiny-vicuna")
    run_lora("run", "--lora_bias lora_only")
    adapter = load_file("run/adapter_model.safetensors")
    biases = {name: tensor for name, tensor in adapter.items() if name.endswith("bias")}
    assert len(biases) == 3 * 4  # q, k, v and o of each layer; they started at 0
    assert all(tensor.abs().max() > 0 for name, tensor in biases.items() if ".v_proj." in name)
    assert not any(name in torch.load("run/non_lora_trainables.bin") for name in biases)


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ("none", {"q.lora_A.default.weight"}),
        ("lora_only", {"q.lora_A.default.weight", "q.base_layer.bias"}),
        ("all", {"q.lora_A.default.weight", "q.base_layer.bias", "other.bias"}),
    ],
)
def test_biases_of_adapted_layers_and_all_biases_differ(bias: str, names: set[str]) -> None:
    named = ("q.lora_A.default.weight", "q.base_layer.bias", "q.base_layer.weight", "other.bias", "other.weight")
    assert get_peft_state_maybe_zero_3([(name, torch.zeros(1)) for name in named], bias).keys() == names


def test_bfloat16_keeps_adapters_in_float32_and_the_rest_small(run_lora: Any) -> None:
    exact, half = run_lora("exact"), run_lora("half", "--bf16 True --gradient_checkpointing True")
    dtypes = {(param.requires_grad, param.dtype) for param in half.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert logged(half) == pytest.approx(logged(exact), rel=5e-3)  # bfloat16 has eight bits


def test_gradient_checkpointing_changes_nothing(run_lora: Any) -> None:
    # Of the projector nothing is trained, so that no gradient but the adapters' own keeps the first layer alive.
    flags = "--freeze_mm_mlp_adapter True --lora_dropout 0"
    plain = run_lora("plain", flags)
    for way in ("true", "false"):
        kwargs = f'--gradient_checkpointing_kwargs {{"use_reentrant":{way}}}'
        saved = run_lora(way, f"{flags} --gradient_checkpointing True {kwargs}")
        assert logged(saved) == pytest.approx(logged(plain), rel=1e-6), way


def test_only_the_llms_layers_are_quantised(run_lora: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra `train`")
    exact = run_lora("exact", "--lora_dropout 0")
    for bits, layer in ((4, bitsandbytes.nn.Linear4bit), (8, bitsandbytes.nn.Linear8bitLt)):
        trainer = run_lora(f"run{bits}", f"--bits {bits} --lora_dropout 0 --bf16 True")
        model = trainer.model.get_base_model()
        modules = dict(model.named_modules())
        quantised = {name for name, module in modules.items() if isinstance(module, layer)}
        assert quantised == {f"model.layers.{i}.{part}.base_layer" for i in range(3) for part in ADAPTED}
        norms = [module for module in modules.values() if type(module).__name__ == "LlamaRMSNorm"]
        assert {module.weight.dtype for module in norms} == {torch.float32}
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert logged(trainer) == pytest.approx(logged(exact), rel=2e-2)
        assert logged(trainer)[-1] < logged(trainer)[0]
        assert "quantization_config" not in json.loads(Path(f"run{bits}/config.json").read_text())


def test_stage_1_trains_the_projector_over_a_quantised_llm(run_stage_1: Any, goldens: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is part of the extra `train`")
    trainer = run_stage_1("run", "--bits 4")
    assert {name for name, param in trainer.model.named_parameters() if param.requires_grad} == {
        f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    golden = json.loads((goldens / "g_train_stage1.json").read_text())["loss"]
    assert logged(trainer) == pytest.approx(golden, rel=2e-2)
    assert "quantization_config" not in json.loads(Path("run/config.json").read_text())


@pytest.mark.parametrize(
    ("package", "flags"), [("peft", ""), ("bitsandbytes", "--bits 4")], ids=["peft", "bitsandbytes"]
)
def test_a_missing_package_is_named_with_its_extra(
    run_lora: Any, monkeypatch: pytest.MonkeyPatch, package: str, flags: str
) -> None:
    monkeypatch.setattr("llava.utils.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ImportError, match=rf"needs the package {package}\. .*pip install -e '\.\[train\]'"):
        run_lora("run", flags)
