"""What config.json says for readers of other versions."""

from __future__ import annotations

from typing import Any


class ReadableByTransformers4:
    """Mixed in before an LLM's config class: what transformers 5 has renamed is written under its old name too.

    Upstream runs on transformers 4.37, which passes over names it does not know and takes its defaults: a checkpoint of
    another RoPE base or scaling would be read without an error, and answer nonsense.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        """The values for config.json."""
        written: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        rope = {key: value for key, value in (written.get("rope_parameters") or {}).items() if key != "type"}
        if "rope_theta" in rope:
            written["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type") in ("linear", "dynamic"):  # those that 4.37 knows, in the form that it insists on
            written["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        elif rope.get("rope_type", "default") != "default":
            written["rope_scaling"] = rope
        if written.get("dtype"):
            written["torch_dtype"] = written["dtype"]
        return written
