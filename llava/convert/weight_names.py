"""The names of a tensor in LLaVA's checkpoints, in transformers' modules, and in the files that engines read."""

from __future__ import annotations

OUR_TOWER = "model.vision_tower.vision_tower."
NESTED = "vision_model."

# LLaVA's name, the name in a published folder. The first match decides; each list is read both ways.
_PARTS_TO_FILE = (
    (OUR_TOWER, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_PARTS_FROM_MODULE = (
    ("model.vision_tower.", OUR_TOWER),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)


def file_name_of(name: str, tower_type: str) -> str:
    """Name in a folder for Hugging Face of the tensor that LLaVA's model calls `name`.

    These are the names of the published `llava-hf` folders: transformers reads them whatever its version, and vLLM
    looks for the encoder of CLIP and SigLIP in a `vision_model` that transformers' own modules no longer have.
    """
    renamed = _renamed(name, _PARTS_TO_FILE)
    if not renamed.startswith("vision_tower."):
        return renamed
    inner = renamed.removeprefix("vision_tower.").removeprefix(NESTED)
    return f"vision_tower.{NESTED if tower_type in ('clip_vision_model', 'siglip_vision_model') else ''}{inner}"


def name_of_module_tensor(name: str) -> str:
    """LLaVA's name of the tensor that `LlavaForConditionalGeneration` calls `name`."""
    return _renamed(name, _PARTS_FROM_MODULE)


def _renamed(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for old, new in parts:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"{name}: no such tensor in a LLaVA-1.5 model; expected a name that starts with {parts[0][0]} ...")
