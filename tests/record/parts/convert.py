"""What `llava-convert` writes: to Hugging Face's format and back, of stage 2, a projector alone and an adapter."""

from __future__ import annotations

from product import Facts, Product


def record(product: Product) -> Facts:
    """Tensors, configs and names of files of each conversion. The model card is prose: its name alone is recorded."""
    base = ("--base", product.inputs / "models/tiny-vicuna")
    sources = {
        "checkpoint": (product.inputs / "checkpoint_a",),
        "projector": (product.inputs / "projectors/patch_aligned", *base, "--conv-mode", "v1"),
        "half": (product.inputs / "checkpoint_a", "--dtype", "bfloat16", "--max-shard-size", "200KB"),
    }
    facts: Facts = {}
    for name, (source, *flags) in sources.items():
        there, back = product.work / f"{name}_hf", product.work / f"{name}_back"
        product.expect("llava-convert", "to-hf", source, there, *flags)
        product.expect("llava-convert", "from-hf", there, back)
        facts[name] = {"to-hf": product.folder(there), "from-hf": product.folder(back)}
        facts[name]["template"] = (there / "chat_template.jinja").read_text()
    return facts
