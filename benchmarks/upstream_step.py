"""A step of stage 1, or 32 new tokens, with the `llava` that is first on PYTHONPATH, in the environment it needs.

`benchmarks/run_all.py --upstream DIR` starts it with the original LLaVA. Names are those that both have.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

import torch
from served_steps import Step, serve

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

NEW_TOKENS = 32


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> Step:
    """Forward, backward, clipping and AdamW of the projector, as a Trainer does."""
    start = time.perf_counter()
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.get_model().mm_projector.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return Step(time.perf_counter() - start, loss.item())


def generate(model: Any, batch: dict[str, Any]) -> Step:
    """New tokens for the first prompt."""
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            batch["input_ids"][:1], images=batch["images"][:1], image_sizes=[(336, 336)], do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, use_cache=True,
        )  # fmt: skip
    return Step(time.perf_counter() - start, math.nan)


def main() -> None:
    """Load a checkpoint, and serve its steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("train", "generate"))
    parser.add_argument("model")
    parser.add_argument("batch", help="a file of tensors")
    args = parser.parse_args()
    batch = torch.load(args.batch, weights_only=True)
    model: Any = LlavaLlamaForCausalLM.from_pretrained(args.model, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    model.float()
    if args.task == "generate":
        serve(partial(generate, model.eval(), batch))
        return
    model.train().requires_grad_(False)
    model.config.use_cache = False
    trained = model.get_model().mm_projector.requires_grad_(True).parameters()
    serve(partial(train_step, model, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0), batch))


if __name__ == "__main__":
    main()
