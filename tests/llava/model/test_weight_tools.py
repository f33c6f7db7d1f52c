"""`consolidate`, `make_delta`, `apply_delta` and `auto_upgrade`, upstream's tools for the weights of checkpoints."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.command import run_command
from llava.model import consolidate, utils
from llava.model.apply_delta import apply_delta
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointTensors
from llava.model.consolidate import consolidate_ckpt
from llava.model.make_delta import make_delta
from llava.model.utils import auto_upgrade

WEIGHTS = "model.safetensors"


def shard_as_bin(folder: str) -> None:
    """Rewrites a folder's weights as two torch files with an index, as old checkpoints have them."""
    weights = load_file(f"{folder}/{WEIGHTS}")
    Path(folder, WEIGHTS).unlink()
    index = {}
    for number in (0, 1):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        part = {name: weights[name] for name in sorted(weights)[number::2]}
        torch.save(part, f"{folder}/{file}")
        index |= dict.fromkeys(part, file)
    Path(folder, "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def coarse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights on a grid on which differences are exact in half precision."""
    return {name: (tensor.clamp(-1, 1) * 256).round() / 256 for name, tensor in weights.items()}


@pytest.fixture
def exact_pair(golden_world: Path) -> None:
    """tiny-vicuna and tiny-llava with weights whose differences need no rounding."""
    for folder in ("tiny-vicuna", "tiny-llava"):
        save_file(coarse(load_file(f"{folder}/{WEIGHTS}")), f"{folder}/{WEIGHTS}", metadata={"format": "pt"})
    weights = load_file(f"tiny-llava/{WEIGHTS}")
    trained = {name: tensor + 0.25 if "mlp" in name else tensor for name, tensor in weights.items()}
    save_file(trained, f"tiny-llava/{WEIGHTS}", metadata={"format": "pt"})


def test_a_delta_applied_is_the_target(exact_pair: None) -> None:
    make_delta("tiny-vicuna", "tiny-llava", "delta")
    apply_delta("tiny-vicuna", "again", "delta")
    target, again, delta = (load_file(f"{folder}/{WEIGHTS}") for folder in ("tiny-llava", "again", "delta"))
    assert again.keys() == target.keys()
    assert all(tensor.dtype == torch.float16 for tensor in again.values())
    assert not [name for name in target if not torch.equal(again[name].float(), target[name])]
    assert not delta["model.layers.0.self_attn.q_proj.weight"].any()
    assert delta["model.layers.0.mlp.up_proj.weight"].eq(0.25).all()
    assert torch.equal(delta["model.mm_projector.0.weight"].float(), target["model.mm_projector.0.weight"])
    _, model, _, _ = load_pretrained_model("again", None, "again", device="cpu")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"


def test_rounding_of_half_precision_is_all_that_a_delta_loses(golden_world: Path) -> None:
    make_delta("tiny-vicuna", "tiny-llava", "delta")
    apply_delta("tiny-vicuna", "again", "delta")
    target, again = load_file(f"tiny-llava/{WEIGHTS}"), load_file(f"again/{WEIGHTS}")
    for name in target:
        torch.testing.assert_close(again[name].float(), target[name], rtol=2**-9, atol=2**-9)


def test_rows_that_the_target_added_are_kept_as_they_are(exact_pair: None) -> None:
    weights = load_file(f"tiny-llava/{WEIGHTS}")
    new_rows = torch.full((2, 64), 0.5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], new_rows])
    save_file(weights, f"tiny-llava/{WEIGHTS}", metadata={"format": "pt"})
    make_delta("tiny-vicuna", "tiny-llava", "delta")
    assert torch.equal(load_file(f"delta/{WEIGHTS}")["lm_head.weight"][-2:].float(), new_rows)
    apply_delta("tiny-vicuna", "again", "delta")
    assert torch.equal(load_file(f"again/{WEIGHTS}")["lm_head.weight"].float(), weights["lm_head.weight"])


def test_a_tensor_of_another_shape_is_named(golden_world: Path) -> None:
    weights = load_file(f"tiny-llava/{WEIGHTS}")
    weights["model.norm.weight"] = torch.zeros(65)
    save_file(weights, f"tiny-llava/{WEIGHTS}", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has the shape \(65,\), and \(64,\) in the base"):
        make_delta("tiny-vicuna", "tiny-llava", "delta")


def test_a_tensor_without_a_counterpart_is_named(golden_world: Path) -> None:
    weights = load_file(f"tiny-vicuna/{WEIGHTS}")
    del weights["model.norm.weight"]
    save_file(weights, f"tiny-vicuna/{WEIGHTS}", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not in the base model"):
        make_delta("tiny-vicuna", "tiny-llava", "delta")


def test_consolidating_reads_old_shards_and_writes_half_precision(golden_world: Path) -> None:
    before = load_file(f"tiny-llava/{WEIGHTS}")
    shard_as_bin("tiny-llava")
    consolidate_ckpt("tiny-llava", "whole")
    after = load_file(f"whole/{WEIGHTS}")
    assert after.keys() == before.keys()
    assert not [name for name in before if not torch.equal(after[name], before[name].half())]
    assert json.loads(Path("whole/config.json").read_text())["torch_dtype"] == "float16"
    assert Path("whole/tokenizer.model").is_file()
    load_pretrained_model("whole", None, "whole", device="cpu")


def test_no_tool_writes_into_a_folder_with_files_in_it(golden_world: Path) -> None:
    before = Path(f"tiny-llava/{WEIGHTS}").read_bytes()
    with pytest.raises(FileExistsError, match="tiny-llava is not empty: name a new folder"):
        consolidate_ckpt("tiny-llava", "tiny-llava")
    with pytest.raises(FileExistsError, match="tiny-llava is not empty"):
        make_delta("tiny-vicuna", "tiny-llava", "tiny-llava")
    with pytest.raises(FileExistsError, match="tiny-llava is not empty"):
        apply_delta("tiny-vicuna", "tiny-llava", "delta")
    assert Path(f"tiny-llava/{WEIGHTS}").read_bytes() == before


def test_wrong_input_ends_with_one_sentence(golden_world: Path) -> None:
    with pytest.raises(SystemExit, match="error: No weights at images: expected"):
        run_command(consolidate.main, consolidate.argument_parser(), ["--src", "images", "--dst", "new"])


def test_tensors_are_read_one_by_one_from_any_kind_of_file(golden_world: Path) -> None:
    before = load_file(f"tiny-llava/{WEIGHTS}")
    assert dict(CheckpointTensors("tiny-llava")).keys() == before.keys()
    shard_as_bin("tiny-llava")
    tensors = CheckpointTensors("tiny-llava")
    assert not [name for name in before if not torch.equal(tensors[name], before[name])]
    Path("tiny-llava/pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00001-of-00002\.bin is missing"):
        dict(CheckpointTensors("tiny-llava"))
    with pytest.raises(FileNotFoundError, match="No weights at images"):
        CheckpointTensors("images")


def as_v0(folder: str) -> Path:
    path = Path(folder, "config.json")
    values = json.loads(path.read_text()) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    path.write_text(json.dumps(values))
    return path


def test_a_checkpoint_of_v0_is_upgraded_after_a_yes(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_v0("tiny-llava")
    monkeypatch.setattr(utils.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: "n")
    with pytest.raises(SystemExit):
        auto_upgrade("tiny-llava")
    assert json.loads(path.read_text())["model_type"] == "llama"
    monkeypatch.setattr(builtins, "input", lambda question: "Y")
    auto_upgrade("tiny-llava")
    values = json.loads(path.read_text())
    assert (values["model_type"], values["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])


def test_where_nobody_can_be_asked_the_upgrade_is_described(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_v0("tiny-llava")
    monkeypatch.setattr(utils.sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ValueError, match="set `model_type` to `llava_llama`"):
        auto_upgrade("tiny-llava")


def test_other_checkpoints_are_left_alone(golden_world: Path) -> None:
    for folder in ("tiny-vicuna", "tiny-llava"):
        before = Path(folder, "config.json").read_bytes()
        auto_upgrade(folder)
        assert Path(folder, "config.json").read_bytes() == before


@pytest.mark.slow
def test_upstreams_flags_are_read(exact_pair: None) -> None:
    runs = [
        "consolidate --src tiny-llava --dst whole",
        "make_delta --base-model-path tiny-vicuna --target-model-path tiny-llava --delta-path delta",
        "apply_delta --base-model-path tiny-vicuna --target-model-path again --delta-path delta",
    ]
    for run in runs:
        module, *flags = run.split()
        command = [sys.executable, "-m", f"llava.model.{module}", *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("Wrote ")
    for folder in ("whole", "delta", "again"):
        assert Path(folder, WEIGHTS).is_file()


@pytest.mark.parametrize("layout", ["sharded safetensors", "bin", "sharded bin"])
def test_tensors_are_read_from_every_layout(tmp_path: Path, layout: str):
    wanted, other = torch.arange(6.0).reshape(3, 2), torch.zeros(2)
    shards = [{"model.embed_tokens.weight": wanted}, {"lm_head.weight": other}]
    stem, ending = ("pytorch_model", "bin") if "bin" in layout else ("model", "safetensors")
    save = torch.save if ending == "bin" else save_file
    if "sharded" in layout:
        names = [f"{stem}-0000{index + 1}-of-00002.{ending}" for index in range(2)]
        for name, shard in zip(names, shards, strict=True):
            save(shard, tmp_path / name)
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save(shards[0] | shards[1], tmp_path / f"{stem}.{ending}")
    found = CheckpointTensors(str(tmp_path))
    assert set(found) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(found["model.embed_tokens.weight"], wanted)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path):
    (tmp_path / "inside").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"w": "../outside.safetensors"}}
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"outside\.safetensors is missing"):
        CheckpointTensors(str(tmp_path / "inside"))["w"]
