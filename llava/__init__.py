"""LLaVA-1.5 for today's torch and transformers.

Names are resolved on first use: `import llava.constants` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.eval.run_llava import chat
    from llava.model import LlavaLlamaForCausalLM

__all__ = ["LlavaLlamaForCausalLM", "chat"]

_MODULES = {"LlavaLlamaForCausalLM": "llava.model", "chat": "llava.eval.run_llava"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
