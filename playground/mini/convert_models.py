"""Turns what the carrier packages hold into ordinary Hugging Face checkpoints.

SmolLM2-135M-Instruct comes as GGUF (4-bit weights), DINOv2-small as an ONNX graph. Both are saved in float32: the
products of 4-bit integers and float16 scales are exact there, and not in bfloat16 or float16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
PAD = "<|endoftext|>"
"""The pad token. Not the end-of-turn token, as published: attention masks and labels made from `pad_token_id` would
drop the token that ends an answer."""

DINOV2_PATCH_PX = 14
_POSITION_GRID = 37  # positions a side in the published table: 518 px / 14 px


def save_smollm2_from_gguf(gguf_path: Path, folder: Path) -> None:
    """Reads the GGUF file through transformers and saves model and tokenizer to `folder` in float32."""
    source, name = str(gguf_path.parent), gguf_path.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)

    # The loaded model is marked as quantised and refuses to be saved, so its weights move to a plain one.
    config = LlamaConfig(**_plain_llama_settings(loaded.config), dtype="float32")
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(loaded.state_dict())
    save_language_model(model, tokenizer, folder)


def save_language_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Settles the special tokens of a SmolLM2 model, checks that it speaks, and saves it with its tokenizer."""
    _restore_tokenizer_parts(tokenizer)
    end_of_turn, pad = tokenizer.convert_tokens_to_ids([END_OF_TURN, PAD])
    tokenizer.pad_token = PAD
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = pad
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=end_of_turn, pad_token_id=pad
    )
    _check_that_it_speaks(model.eval(), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plain_llama_settings(config: Any) -> dict[str, Any]:
    """The settings of a config read from GGUF that describe the architecture, without traces of the file."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings initializer_range tie_word_embeddings attention_bias mlp_bias "
        "bos_token_id eos_token_id rope_parameters"
    )
    settings = {name: getattr(config, name) for name in names.split()}
    settings["rms_norm_eps"] = round(config.rms_norm_eps, 9)  # GGUF stores 1e-5 as a float32
    return settings


def _restore_tokenizer_parts(tokenizer: Any) -> None:
    """Splits digits one by one and names the special tokens, as SmolLM2's own tokenizer does."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens({"bos_token": START_OF_TURN, "eos_token": END_OF_TURN, "unk_token": PAD})


def _check_that_it_speaks(model: Any, tokenizer: Any) -> None:
    prompt = "The capital of France is"
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    if "Paris" not in answer:
        raise ValueError(
            f"The converted language model continues {prompt!r} with {answer!r}, expected Paris. "
            "The installed transformers probably reads this GGUF file differently: install the versions of "
            "constraints.txt and run the command again."
        )


def save_dinov2_from_onnx(onnx_path: Path, folder: Path, image_size: int) -> None:
    """Collects the backbone's weights from an ONNX graph and saves them as a DINOv2 checkpoint.

    The graph's initialisers keep Hugging Face's names under `backbone.`, except for the linear weights, which are
    constants of MatMul nodes (transposed), and the position table, which was folded into two constants.
    `image_size` is the side in pixels that the saved image processor crops to.
    """
    state = read_dinov2_state(onnx_path)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, patch_size=DINOV2_PATCH_PX,
        image_size=_POSITION_GRID * DINOV2_PATCH_PX, architectures=["Dinov2Model"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    loaded: Any = Dinov2Model.from_pretrained(str(folder), output_loading_info=True)
    _, report = loaded
    problems = {kind: sorted(keys) for kind, keys in report.items() if keys}
    if problems:
        raise ValueError(f"{onnx_path} does not fill a DINOv2-small model: {problems}")
    write_image_processor(folder, image_size)


def read_dinov2_state(onnx_path: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights under the names of published DINOv2 checkpoints, float32.

    `mask_token`, used only in DINOv2's own pretraining, is not in the graph and is set to zero.
    """
    import onnx

    graph = onnx.load(str(onnx_path)).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    state = {
        name.removeprefix("backbone."): torch.from_numpy(array.copy())
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = torch.from_numpy(arrays[node.input[1]].T.copy())  # ONNX: [in, out] -> [out, in]

    width = state["embeddings.cls_token"].shape[-1]
    (cls_position,) = (a for n, a in arrays.items() if n.startswith("onnx::Concat_") and a.shape == (1, 1, width))
    (grid_positions,) = (
        a for n, a in arrays.items() if n.startswith("onnx::Reshape_") and a.shape == (1, _POSITION_GRID**2, width)
    )
    state["embeddings.position_embeddings"] = torch.cat(
        [torch.from_numpy(cls_position.copy()), torch.from_numpy(grid_positions.copy())], dim=1
    )  # [1, 1 + 37 * 37, width]
    state["embeddings.mask_token"] = torch.zeros(1, width)
    return state


def write_image_processor(folder: Path, image_size: int) -> None:
    """Writes the image processor's settings: shortest side to `image_size`, centre crop, ImageNet's mean and deviation.

    The position table stays at its full size and is interpolated by the model when it runs.
    """
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
