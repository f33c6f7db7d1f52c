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
from tests.folders import save_shards

WEIGHTS = "model.safetensors"


def shard_as_bin(folder: str) -> None:
    """Rewrites a folder's weights as two torch files with an index, as old checkpoints have them."""
    save_shards(load_file(f"{folder}/{WEIGHTS}"), Path(folder), "bin")
    Path(folder, WEIGHTS).unlink()


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


@pytest.mark.parametrize("layout", ["safetensors shards", "bin"])
def test_tensors_are_read_from_other_layouts(tmp_path: Path, layout: str):
    tensors = {"model.embed_tokens.weight": torch.arange(6.0).reshape(3, 2), "lm_head.weight": torch.zeros(2)}
    if layout == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_shards(tensors, tmp_path, "safetensors")
    found = CheckpointTensors(str(tmp_path))
    assert set(found) == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path):
    (tmp_path / "inside").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"w": "../outside.safetensors"}}
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"outside\.safetensors is missing"):
        CheckpointTensors(str(tmp_path / "inside"))["w"]
