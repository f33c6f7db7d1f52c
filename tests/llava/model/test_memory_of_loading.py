"""A checkpoint opens without a second copy of its weights in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.model.checkpoint import copy_file, read_config
from llava.model.language_model.families import llava_model_class

# Of memory that the process owns: pages of a mapped file are the system's to take back.
LOAD = """
import json, sys, threading
from llava.model.builder import load_pretrained_model

def owned():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while not done.wait(0.001):
        sizes.append(owned())

sizes, done, before = [0], threading.Event(), owned()
thread = threading.Thread(target=watch)
thread.start()
model = load_pretrained_model("large", None, "", device="cpu", dtype=sys.argv[1]).model
done.set()
thread.join()
weights = sum(weight.nbytes for weight in model.parameters())
print(json.dumps({"peak": max(sizes) - before, "weights": weights, "dtype": str(model.dtype)}))
"""


@pytest.fixture
def shard_bytes(golden_world: Path) -> Iterator[int]:
    """A LLaVA of 0.7 GB in float16 in the folder `large`, a layer in each shard; yields the bytes of the largest."""
    config = read_config("tiny-llava")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 2048, 8192, 5
    config.num_attention_heads = config.num_key_value_heads = 16
    config.dtype = torch.float16
    config.save_pretrained("large")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        copy_file("tiny-llava", Path("large"), name)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in llava_model_class(config)(config).named_parameters()}
    values = torch.randn(8192 * 2048, generator=torch.Generator().manual_seed(0)).half()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = values[: shape.numel()].view(shape)
    for file, tensors in shards.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, f"large/{file}", {"format": "pt"})
    index = {name: file for file, tensors in shards.items() for name in tensors}
    Path("large/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    yield max(path.stat().st_size for path in Path("large").glob("*.safetensors"))
    shutil.rmtree("large")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory a process owns")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loading_takes_the_memory_of_one_copy(shard_bytes: int, dtype: str) -> None:
    command = [sys.executable, "-c", LOAD, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["dtype"] == f"torch.{dtype}" and found["weights"] > 4 * shard_bytes
    assert found["peak"] < found["weights"] + shard_bytes
