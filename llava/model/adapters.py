"""Files that complete an LLM: a projector, a LoRA adapter, and what else was trained beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from llava.model.checkpoint_files import VOCABULARY_TABLES
from llava.model.multimodal_projector.weights import projector_state
from llava.model.strict_loading import differences, fill_strictly
from llava.model.tensor_files import ADAPTER_FILES, find_file, read_tensors

logger = logging.getLogger(__name__)

WRAPPER = "base_model.model."
"""What peft puts before the names of a model that it wraps."""
PROJECTOR = "model.mm_projector."
IMAGE_NEWLINE = "model.image_newline"
TOWER = "model.vision_tower."


def read_trained_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of an `mm_projector.bin` or `non_lora_trainables.bin`, under the model's own names.

    Raises:
        ValueError: the file cannot be read.
    """
    state = read_tensors(path)
    projector = {PROJECTOR + name: tensor for name, tensor in projector_state(state).items()}
    return projector | {own_name(name): state[name] for name in state if not projector_state({name: state[name]})}


def own_name(name: str) -> str:
    """A weight's name in the model, from its name in peft's wrapper."""
    return name.removeprefix(WRAPPER).replace(".base_layer.", ".")


def fill_trained(model: Any, trained: dict[str, Tensor], to_come: Iterable[str], source: str) -> None:
    """Copies what was trained beside a frozen LLM into `model`, but for a tower's weights.

    Args:
        model: the LLM, with a projector yet to be filled.
        trained: what `read_trained_tensors` gave.
        to_come: names of weights that the LLM's own files did not bring.
        source: the file that `trained` comes from, for messages.

    Raises:
        ValueError: a weight is missing, the model has no place for one, or a shape differs; the message names it.
    """
    parameters = dict(model.named_parameters())
    tensors = {name: tensor for name, tensor in trained.items() if not name.startswith(TOWER)}
    wanted = set(to_come) | (tensors.keys() & parameters.keys())
    if any(name.startswith(PROJECTOR) for name in tensors):  # a base may be a LLaVA: half of its projector is no good
        wanted |= {name for name in parameters if name.startswith(PROJECTOR)}
    hint = "It was trained with another LLM (--model-base), another vision tower or another --mm_projector_type."
    fill_strictly({name: parameters[name] for name in wanted}, tensors, source, hint)
    if getattr(model.config, "mm_use_im_start_end", False) and not tensors.keys() & set(VOCABULARY_TABLES):
        logger.warning(
            "%s: holds no word embeddings of the marks around an image (mm_use_im_start_end), which its training lost: "
            "answers may be worse than in training.",
            source,
        )


def is_of_llm(name: str) -> bool:
    """Whether an adapter's tensor belongs to the LLM; an adapter with all biases may hold those of vision modules."""
    return not name.startswith((WRAPPER + PROJECTOR, WRAPPER + TOWER))


def apply_adapter(model: Any, adapter_path: str, *, merge: bool) -> Any:
    """Adds a LoRA adapter to `model`, strictly.

    Args:
        model: the model that the adapter was trained on, without its vision tower's weights yet: an adapter names its
            layers by their last part, and a tower has some of the same names.
        adapter_path: folder or hub name with `adapter_config.json` and the adapter's weights.
        merge: add the adapter to the weights. Otherwise it stays beside them, as it must where they are quantised:
            the sum would be rounded again, and small adapters lost.

    Returns:
        the model in its own class, without peft's wrapper.

    Raises:
        FileNotFoundError: the adapter has no weights.
        ImportError: peft is not installed.
        ValueError: it is no LoRA adapter, or its weights do not fit.
    """
    if find_spec("peft") is None:
        raise ImportError("A LoRA adapter needs the package peft. Install it with: pip install -e '.[train]'")
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
