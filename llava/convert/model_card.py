"""The README.md of a folder for Hugging Face: what the model is, where it comes from, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.checkpoint_files import Form, checkpoint_form, find_file
from llava.utils import sha256

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
---
<!-- Fill in before you publish: `license:` above (it follows from the licences of the language model, the vision tower
and the training data), what the model is for, and what it was trained on. -->

# {title}

A LLaVA-1.5 model in the format of `LlavaForConditionalGeneration`, converted by `llava-convert to-hf`.

| | |
|---|---|
{facts}

## Load

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its name on the hub
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(folder, backend="pil")

question = [{{"type": "image", "path": "view.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
messages = [{{"role": "user", "content": question}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, dtype=model.dtype)
answer = model.generate(**inputs, max_new_tokens=128)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

`backend="pil"` gives the pixels that the model was trained on; the default backend resizes slightly differently. The
chat template writes the BOS token: where you render it to text first, tokenise with `add_special_tokens=False`.

## Files

| file | sha256 |
|---|---|
{hashes}
"""


def write_model_card(
    folder: Path, source: str, base: str | None, config: Any, conversation: str, tower_type: str
) -> None:
    """Write `README.md` into a converted folder that is complete otherwise; `base` is the LLM that `source` needed."""
    facts = {
        "converted from": shown(source),
        "language model": shown(base) if base else "part of the checkpoint",
        "its config": f"`{config.model_type}`, {config.num_hidden_layers} layers, width {config.hidden_size}",
        "vision tower": f"{shown(config.mm_vision_tower)} (`{tower_type}`), layer {config.mm_vision_select_layer}, "
        f"`{getattr(config, 'mm_vision_select_feature', 'patch')}`",
        "trained": training_stage(source, base),
        "patch-aligned": patch_aligned(source, config),
        "images that are not square": "padded to a square of the mean colour"
        if getattr(config, "image_aspect_ratio", None) == "pad"
        else "cropped at the centre",
        "conversation template": f"`{conversation}`",
        "licence": "to be filled in by whoever publishes this folder",
    }
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    card = _CARD.format(
        title=folder.name,
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        hashes="\n".join(f"| {path.name} | `{sha256(path)}` |" for path in files),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def shown(name: str) -> str:
    """Return a hub name, or the last part of a local path: a card must not leak local paths."""
    return Path(name).name if Path(name).exists() else name


def training_stage(source: str, base: str | None) -> str:
    """Describe the training stage that wrote the checkpoint, by its files."""
    llm = shown(base or "")
    return {
        Form.WHOLE_MODEL: "stage 2, or a checkpoint of unknown training: all weights come from it",
        Form.PROJECTOR: f"stage 1: the projector alone; the language model is {llm} as it was",
        Form.ADAPTER: f"stage 2 by LoRA on {llm}, merged",
    }[checkpoint_form(source)]


def patch_aligned(source: str, config: Any) -> str:
    """Whether stage 1 had the patch loss, as far as the checkpoint's files say."""
    recorded = {key: value for key, value in config.to_dict().items() if key.startswith("patch_")}
    if recorded:
        return "yes, with " + ", ".join(f"{key}={value}" for key, value in sorted(recorded.items()))
    if state := find_file(source, "trainer_state.json"):
        history = json.loads(Path(state).read_text(encoding="utf-8")).get("log_history", [])
        if any("loss/patch" in entry for entry in history):
            return "yes (its training log has a patch loss)"
    return "not recorded in the checkpoint"
