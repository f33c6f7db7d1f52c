"""Read, write and combine checkpoints: lazy tensors, small files, adapters and configs."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from llava.checkpoint_files import ADAPTER_FILES, UNSHARDED_FILES, find_file, no_checkpoint, no_config, require_place
from llava.model.language_model.families import llava_config
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.weights import differences, fill_strictly, open_safetensors, projector_state, read_tensors
from llava.utils import follow_umask, require_package

VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with one row per token of the vocabulary."""

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


class CheckpointTensors(Mapping[str, Tensor]):
    """Lazy mapping of a checkpoint's tensors by name. Each tensor is read on access.

    Args:
        checkpoint: folder or hub name; safetensors or `pytorch_model.bin`, one file or shards.

    Raises:
        FileNotFoundError: there are no weights, or a shard named in the index is missing.
    """

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in UNSHARDED_FILES:
            if index := find_file(checkpoint, f"{name}.index.json"):
                shard_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                # Only the file name, so that an index cannot point outside the folder.
                self._file_of = {name: Path(shard).name for name, shard in shard_of.items()}
                return
            if find_file(checkpoint, name):
                self._file_of = dict.fromkeys(self._opened(name).keys(), name)
                return
        raise FileNotFoundError(
            f"No weights at {checkpoint}: expected {' or '.join(UNSHARDED_FILES)}, or an index of shards."
        )

    def __getitem__(self, name: str) -> Tensor:
        opened = self._opened(self._file_of[name])
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            path = find_file(self.checkpoint, file)
            if path is None:
                raise FileNotFoundError(f"{self.checkpoint}: {file} is missing, though the index names it.")
            self._open[file] = open_safetensors(path) if path.endswith(".safetensors") else read_tensors(path)
        return self._open[file]


def require_new_folder(destination: Path) -> None:
    """Raise `FileExistsError` if the folder is not empty, since files of an old checkpoint would remain."""
    if destination.is_file():
        raise FileExistsError(f"{destination} is a file: name a new folder.")
    if destination.is_dir() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty: name a new folder, or remove its files.")


def save_weights(weights: Mapping[str, Tensor], folder: Path, max_shard_size: str = "5GB") -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_size` and their index."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(weights), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    follow_umask(folder)


def copy_file(checkpoint: str, folder: Path, name: str) -> None:
    """Copy a file of a checkpoint (folder or hub name), if it exists."""
    if source := find_file(checkpoint, name):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def save_checkpoint(weights: Mapping[str, Tensor], folder: Path, source: str, dtype: torch.dtype) -> None:
    """Write weights, and copy config and tokenizer of `source`, with the config's `dtype` updated."""
    save_weights(weights, folder)
    for name in SMALL_FILES:
        copy_file(source, folder, name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a pickled dict of tensors, upstream's format, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def save_config(config: Any, folder: Path) -> None:
    """Write `config.json` without quantisation: saved weights never are, though frozen ones may be in training."""
    config = copy.copy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


# Weights trained on top of an LLM: a projector, a LoRA adapter, and other tensors.

logger = logging.getLogger(__name__)

WRAPPER = "base_model.model."
"""Prefix that peft adds to the names of a wrapped model."""
PROJECTOR = "model.mm_projector."
IMAGE_NEWLINE = "model.image_newline"
TOWER = "model.vision_tower."


def read_trained_tensors(path: str) -> dict[str, Tensor]:
    """Read an `mm_projector.bin` or `non_lora_trainables.bin`, with names as in the model."""
    state = read_tensors(path)
    projector = {PROJECTOR + name: tensor for name, tensor in projector_state(state).items()}
    return projector | {own_name(name): state[name] for name in state if not projector_state({name: state[name]})}


def own_name(name: str) -> str:
    """Convert a weight's name in peft's wrapper to its name in the model."""
    return name.removeprefix(WRAPPER).replace(".base_layer.", ".")


def fill_trained(model: Any, trained: dict[str, Tensor], to_come: Iterable[str], source: str) -> None:
    """Load the output of `read_trained_tensors` into `model`, except a vision tower.

    `to_come` are the names of weights that the LLM's files lack. `source` names the origin in messages.
    """
    parameters = dict(model.named_parameters())
    tensors = {name: tensor for name, tensor in trained.items() if not name.startswith(TOWER)}
    wanted = set(to_come) | (tensors.keys() & parameters.keys())
    if any(name.startswith(PROJECTOR) for name in tensors):  # a base may be a LLaVA: replace its projector completely
        wanted |= {name for name in parameters if name.startswith(PROJECTOR)}
    hint = "It was trained with another LLM (--model-base), another vision tower or another --mm_projector_type."
    fill_strictly({name: parameters[name] for name in wanted}, tensors, source, hint)
    if getattr(model.config, "mm_use_im_start_end", False) and not tensors.keys() & set(VOCABULARY_TABLES):
        logger.warning(
            "%s: has no word embeddings of the tokens around an image (mm_use_im_start_end), which its training did "
            "not save. Answers may be worse than in training.",
            source,
        )


def is_of_llm(name: str) -> bool:
    """Whether an adapter's tensor belongs to the LLM. Adapters with all biases may include those of vision modules."""
    return not name.startswith((WRAPPER + PROJECTOR, WRAPPER + TOWER))


def apply_adapter(model: Any, adapter_path: str, *, merge: bool) -> Any:
    """Add a LoRA adapter to `model`, strictly, and return it without peft's wrapper.

    Call it before the vision tower is loaded: adapters name layers by their last part, and a tower has some of the same
    names. Do not merge into quantised weights: the sum would be rounded again, and small adapters would be lost.
    """
    require_package("peft", "A LoRA adapter")
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(adapter_path)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter_path} holds an adapter of type {config.peft_type}; expected LORA.")
    config.inference_mode = True
    source = next((path for name in ADAPTER_FILES if (path := find_file(adapter_path, name))), None)
    if source is None:
        raise FileNotFoundError(f"{adapter_path} holds an adapter_config.json, but no {' or '.join(ADAPTER_FILES)}.")
    state = read_tensors(source)

    wrapped = PeftModel(model, config)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items() if is_of_llm(name)}
    found_shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if is_of_llm(name)}
    if expected_shapes != found_shapes:
        raise ValueError(
            f"{source} does not fit this model. {differences(expected_shapes, found_shapes)}. "
            f"Pass as --model-base the LLM it was trained on ({config.base_model_name_or_path})."
        )
    set_peft_model_state_dict(wrapped, state)
    return wrapped.merge_and_unload() if merge else wrapped.get_base_model()


# Configs of checkpoints of all ages and kinds.


def choose_config(model_path: str, weights_path: str, customized: Any, overwrites: dict[str, Any]) -> Any:
    """Return the config to build the model from. If it names a vision tower, it is a LLaVA config."""
    if customized is not None:
        config = read_config(customized) if isinstance(customized, str) else customized
    else:  # adapters written by peft alone have no model config
        config = read_config(model_path if find_file(model_path, "config.json") is not None else weights_path)
    for name, value in overwrites.items():
        setattr(config, name, value)
    return llava_config(config) if getattr(config, "mm_vision_tower", None) else config


def read_config(model_path: str, **kwargs: Any) -> Any:
    """Read the config of a checkpoint, or a JSON file.

    LLaVA checkpoints from before 2024 have model type `llava`, which transformers has since used for its own model.

    Args:
        model_path: folder, hub name or JSON file.
        **kwargs: arguments of transformers' `from_pretrained`, such as `cache_dir`.

    Raises:
        FileNotFoundError: there is no config, and no such name on the hub.
        ValueError: the model type is not supported, such as transformers' own LLaVA.
    """
    require_place(model_path)
    try:
        values, _ = PreTrainedConfig.get_config_dict(model_path, **kwargs)
    except OSError as error:
        raise no_checkpoint(model_path, error) from error
    if not values:
        raise no_config(model_path)
    model_type = values.get("model_type")
    if model_type == "llava" and "text_config" in values:
        raise ValueError(
            f"{model_path} is a LLaVA of transformers (LlavaForConditionalGeneration), whose weights have other names. "
            "Convert it with llava-convert, or load it with transformers."
        )
    try:
        if model_type == "llava":
            config: Any = LlavaConfig.from_dict(values | {"model_type": LlavaConfig.model_type})
        else:
            config = AutoConfig.from_pretrained(model_path, **kwargs)
        if tower := getattr(config, "mm_vision_tower", None):
            config.mm_vision_tower = tower_place(tower, model_path)
    except (ValueError, ArithmeticError, TypeError, StrictDataclassError) as error:  # invalid values
        raise ValueError(
            f"The config.json of {model_path} has model type `{model_type}`, which cannot be read: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return config


def tower_place(tower: str, model_path: str) -> str:
    """Return the path of the tower named in a config: a folder inside the checkpoint, else `tower` itself."""
    own = Path(model_path, tower)
    return str(own) if own.is_dir() else tower


def context_length(config: Any) -> int:
    """Return the config's `max_sequence_length`, else 2048 (upstream's rule)."""
    return getattr(config, "max_sequence_length", None) or 2048
