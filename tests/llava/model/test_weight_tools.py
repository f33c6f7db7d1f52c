"""`consolidate`, upstream's tool for the weights of checkpoints, and how it reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.command import run_command
from llava.model import consolidate
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointTensors
from llava.model.consolidate import consolidate_ckpt

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


def test_consolidating_into_a_folder_with_files_in_it_is_refused(golden_world: Path) -> None:
    before = Path(f"tiny-llava/{WEIGHTS}").read_bytes()
    with pytest.raises(FileExistsError, match="tiny-llava is not empty: name a new folder"):
        consolidate_ckpt("tiny-llava", "tiny-llava")
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


def test_upstreams_flags_are_read(golden_world: Path, run_python: Any) -> None:
    result = run_python("-m", "llava.model.consolidate", "--src", "tiny-llava", "--dst", "whole")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Wrote ")
    assert Path("whole", WEIGHTS).is_file()


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
