"""Build tiny random copies of vision-language models: all widths and depths shrunk, the geometry kept."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

WIDTH, HEADS, LAYERS, EXPERTS = 32, 2, 2, 2
# Whatever is a width gets the same one, so that parts fit each other.
_WIDTHS = """
    hidden_size embed_dim ffn_dim out_hidden_size projection_dim projection_hidden_size projector_hidden_size
    text_hidden_size alignment_intermediate_size vision_output_dim projector_input_dim projector_output_dim
    q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp
    output_proj_dims mm_embed_dim
"""
_HEADS = "num_attention_heads num_heads num_key_value_heads linear_num_key_heads linear_num_value_heads"
_HEAD_WIDTHS = """
    head_dim global_head_dim linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim
"""
_EXPERTS = "num_experts num_local_experts num_experts_per_tok n_routed_experts n_group topk_group moe_num_experts moe_k"
_SHRUNK: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS.split(), WIDTH),
    **dict.fromkeys(_HEADS.split(), HEADS),
    **dict.fromkeys(_HEAD_WIDTHS.split(), WIDTH // HEADS),
    **dict.fromkeys(_EXPERTS.split(), EXPERTS),
    "num_hidden_layers": LAYERS,
    "depth": LAYERS,
    "intermediate_size": 4 * WIDTH,  # Llama 4 shuffles 2 x 2 patches into one of this width
    "first_k_dense_replace": LAYERS,
    "partial_rotary_factor": 1.0,
    "hidden_size_per_layer_input": 8,
    "fullatt_block_indexes": [LAYERS - 1],
    "deepstack_visual_indexes": list(range(LAYERS)),
    "mrope_section": [3, 3, 2],
    "insert_layer_id": 0,
    "moe_layers": [],
    "mlp_only_layers": [],
    "num_kv_shared_layers": 0,
    "per_layer_config": {},
    "vision_use_head": False,
}
_OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers", "rope_scaling_layers", "full_attn_idxs")


def tiny_config(config: PreTrainedConfig) -> Any:
    """Return a copy of a config with tiny widths and depths. Sizes of images, patches and vocabulary stay."""
    return type(config).from_dict(_shrink(config.to_dict()))


def tiny_copy(config: PreTrainedConfig, auto_class: Any = AutoModel) -> Any:
    """Build a random model of a config's family with tiny widths and depths, float32, for evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(tiny_config(config), dtype=torch.float32)
        for parameter in model.parameters():  # some fresh projectors are zero
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return model.eval()


def _shrink(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: _shrink(_tiny_value(name, value)) for name, value in values.items()}


def _tiny_value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name == "vision_feature_layer":
        layers = [min(max(layer, -LAYERS), LAYERS - 1) for layer in ([value] if isinstance(value, int) else value)]
        return layers[0] if isinstance(value, int) else layers
    if name in _OF_LAYERS:
        return value[:LAYERS]
    if name == "moe_intermediate_size" and isinstance(value, list):  # of text and of images
        return [WIDTH] * len(value)
    return _SHRUNK.get(name, value)
