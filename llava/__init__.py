"""LLaVA-1.5 for today's torch and transformers.

Names are resolved on first use: `import llava.constants` costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.model import LlavaLlamaForCausalLM

__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llava import model

        return getattr(model, name)
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
