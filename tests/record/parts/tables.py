"""Tables of run files that the baseline wrote: `patch-aligned table` and `compare`. The HTML page is not recorded."""

from __future__ import annotations

from product import Facts, Product


def record(product: Product) -> Facts:
    """Each table in Markdown and LaTeX, line by line."""
    runs = [product.inputs / "runs/checkpoint_a", product.inputs / "runs/checkpoint_b"]
    words = {
        **{f"table {number}": ("table", number, "--runs", *runs) for number in ("4", "5", "6", "7", "8", "runs")},
        "table runs, image frame": ("table", "runs", "--runs", *runs, "--box-frame", "image", "--names", "one,two"),
        "compare": ("compare", *runs),
        "compare, seed 1": ("compare", *runs, "--seed", "1", "--resamples", "500"),
    }
    facts: Facts = {}
    for name, command in words.items():
        for form in ("markdown", "latex"):
            status, text = product.call("patch-aligned", *command, "--format", form)
            facts[f"{name}, {form}"] = {
                "status": status,
                "lines": product.stable(text.splitlines()) if status == 0 else None,
            }
    return facts
