"""The published RAM checkpoints' tensors: their names against `RamModel`'s, and the model's sizes read off them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from patch_aligned.annotate.ram.model import DESCRIPTIONS_PER_TAG, PATCH_PX, RamConfig


class RamCheckpointError(ValueError):
    """A RAM checkpoint that is missing, unreadable, or doesn't hold what a RAM model needs."""


# Parts of the training objective (captioning), and tables that the encoder derives from its sizes.
_UNUSED = re.compile(r"(tag_encoder|text_decoder)\.|.*\.(relative_position_index|attn_mask)$")

_BLOCK = r"visual_encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_OUR_BLOCK = r"visual_encoder.encoder.layers.\1.blocks.\2."
_LAYER = r"tagging_head\.encoder\.layer\.(\d+)\."
_RENAMED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embeddings.projection."),
        (r"visual_encoder\.patch_embed\.norm\.", "visual_encoder.embeddings.norm."),
        (r"visual_encoder\.norm\.", "visual_encoder.layernorm."),
        (r"visual_encoder\.layers\.(\d+)\.downsample\.", r"visual_encoder.encoder.layers.\1.downsample."),
        (_BLOCK + r"norm1\.", _OUR_BLOCK + "layernorm_before."),
        (_BLOCK + r"norm2\.", _OUR_BLOCK + "layernorm_after."),
        (_BLOCK + r"attn\.proj\.", _OUR_BLOCK + "attention.o_proj."),
        (_BLOCK + r"attn\.(relative_position_bias_table)", _OUR_BLOCK + r"attention.relative_position_bias.\3"),
        (_BLOCK + r"mlp\.", _OUR_BLOCK + "mlp."),
        (_LAYER + r"crossattention\.self\.", r"decoder.\1."),
        (_LAYER + r"crossattention\.output\.dense\.", r"decoder.\1.attention_output."),
        (_LAYER + r"crossattention\.output\.LayerNorm\.", r"decoder.\1.attention_norm."),
        (_LAYER + r"intermediate\.dense\.", r"decoder.\1.expand."),
        (_LAYER + r"output\.dense\.", r"decoder.\1.contract."),
        (_LAYER + r"output\.LayerNorm\.", r"decoder.\1.output_norm."),
    )
]  # fmt: skip
_QKV = re.compile(_BLOCK + r"attn\.qkv\.(weight|bias)")


def renamed_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under `RamModel`'s names: unused parts left out, q, k and v taken apart.

    Names that aren't known are kept, so that a strict comparison reports them.
    """
    state = {}
    for name, tensor in _used(published).items():
        if qkv := _QKV.fullmatch(name):
            stage, block, kind = qkv.groups()
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"visual_encoder.encoder.layers.{stage}.blocks.{block}.attention.{letter}_proj.{kind}"] = part
        else:
            state[_renamed(name)] = tensor
    return state


def _used(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("vision_multi", "tagging_head"): tensor  # an older name of the decoder
        for name, tensor in published.items()
        if not _UNUSED.match(name)
    }


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        new, count = pattern.subn(replacement, name, count=1)
        if count:
            return new
    return name


def config_of(published: Mapping[str, Tensor]) -> RamConfig:
    """Sizes of the model that a published state dict belongs to.

    Raises:
        RamCheckpointError: names the tensor that is missing, or whose shape fits no such model.
    """
    state = _used(published)
    depths = _lengths(state, _BLOCK)
    layers = _count(state, _LAYER)
    if not depths or not layers:
        raise RamCheckpointError(
            "found no blocks of a Swin encoder (visual_encoder.layers.*) or no layers of a tag decoder "
            "(tagging_head.encoder.layer.*); expected a RAM or RAM++ model. Tag2Text is another one"
        )
    kind: Literal["ram", "ram_plus"] = "ram_plus" if "reweight_scale" in state else "ram"
    labels, label_width = _shape(state, "label_embed", 2)
    if labels % DESCRIPTIONS_PER_TAG[kind]:
        raise RamCheckpointError(
            f"label_embed: found {labels} rows, expected a multiple of {DESCRIPTIONS_PER_TAG[kind]} descriptions a tag"
        )
    tables = [
        _shape(state, f"visual_encoder.layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        for stage in range(len(depths))
    ]
    window_size = (math.isqrt(tables[0][0]) + 1) // 2  # a table has (2 * window - 1) ** 2 rows
    return RamConfig(
        kind=kind,
        image_size=_image_size(published, window_size, len(depths)),
        window_size=window_size,
        embed_dim=_shape(state, "visual_encoder.patch_embed.proj.weight", 4)[0],
        depths=depths,
        num_heads=tuple(heads for _, heads in tables),
        num_tags=labels // DESCRIPTIONS_PER_TAG[kind],
        label_width=label_width,
        hidden_size=_shape(state, "wordvec_proj.weight", 2)[0],
        intermediate_size=_shape(state, "tagging_head.encoder.layer.0.intermediate.dense.weight", 2)[0],
        decoder_layers=layers,
    )


def _image_size(published: Mapping[str, Tensor], window_size: int, stages: int) -> int:
    """Side in pixels: by the windows that the first shifted block masks, else one window in the last stage."""
    mask = published.get("visual_encoder.layers.0.blocks.1.attn_mask")
    windows_a_side = math.isqrt(mask.shape[0]) if mask is not None else 2 ** (stages - 1)
    return windows_a_side * window_size * PATCH_PX


def _lengths(names: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Blocks of each stage."""
    found = {(int(match[1]), int(match[2])) for match in (re.match(pattern, name) for name in names) if match}
    stages = 1 + max((stage for stage, _ in found), default=-1)
    return tuple(1 + max((block for other, block in found if other == stage), default=-1) for stage in range(stages))


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for match in (re.match(pattern, name) for name in names) if match), default=-1)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise RamCheckpointError(
            f"{name}: missing; expected a tensor of {dimensions} dimensions, as RAM and RAM++ have"
        )
    shape = tuple(state[name].shape)
    if len(shape) != dimensions:
        raise RamCheckpointError(f"{name}: found shape {list(shape)}, expected {dimensions} dimensions")
    return shape
