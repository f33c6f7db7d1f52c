"""Measures as files: every number as JSON, and a table in Markdown beside the paper's own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patch_aligned.analysis.measure import Measures
from patch_aligned.analysis.measured_images import MeasureSettings
from patch_aligned.analysis.plain_json import plain_json

PAPER_TABLE_3 = {
    "random": {"entropy_drop_nats": 0.0108, "align_px": 0.065, "cosine": 0.06},
    "LLaVA (captions only)": {"entropy_drop_nats": 2.7991, "align_px": 0.142, "cosine": 0.07},
    "patch-aligned": {"entropy_drop_nats": 3.8352, "align_px": 0.279, "cosine": 0.56},
}
"""The paper's Table 3: CLIP-L/336, Vicuna-1.5-7B and a two-layer MLP, on 100 images of COCO 2017."""

PAPER_ENTROPY_BEFORE_NATS = 4.8353
"""The paper's Table 1: entropy of CLIP-L/336's features on 100 images of COCO 2017."""

COLUMNS = ("Projector", "H before", "H after", "ΔH", "Align(V, W)", "cosine", "cosine, shuffled labels")


def as_json(measures: Measures, settings: MeasureSettings, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers with the rules, settings and counts that belong to them; NaN becomes null.

    Args:
        measures: what the run found.
        settings: what decided the numbers.
        provenance: further entries for `settings`: models, device, versions.
    """
    projectors = {}
    for name, projector in measures.projectors.items():
        alignment = asdict(projector.alignment)
        flat = {key: value for key, value in asdict(projector).items() if key != "alignment"}
        projectors[name] = {**flat, "align_rule": settings.threshold_rule, **alignment}
    document = {
        "settings": {**asdict(settings), **provenance},
        "images": measures.images,
        "entropy_before_nats": measures.entropy_before_nats,
        "effective_rank_before": measures.effective_rank_before,
        "projectors": projectors,
        "picture": [
            {
                "image_id": row.image_id,
                "label": row.label,
                "iou_px": {name: cell.iou_px for name, cell in row.cells.items()},
            }
            for row in measures.picture
        ],
        "paper_table_3_at_7b_scale": PAPER_TABLE_3,
    }
    return plain_json(document)


def table_rows(measures: Measures) -> list[tuple[str, ...]]:
    """The table's cells, one row a projector, in the order of `COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for name, projector in measures.projectors.items():
        alignment = projector.alignment
        rows.append(
            (
                name,
                _number(measures.entropy_before_nats),
                _number(projector.entropy_after_nats),
                _number(projector.entropy_drop_nats),
                _number(alignment.align_px),
                _number(alignment.cosine, 2),
                _number(alignment.shuffled_cosine, 2),
            )
        )
    return rows


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def as_markdown(measures: Measures, settings: MeasureSettings) -> str:
    """The table, what it was taken on, and the paper's Table 3 for comparison of the order, not of the numbers."""
    counts = [projector.alignment for projector in measures.projectors.values()]
    first = counts[0]
    kind = f" of kind `{settings.region_kind}`" if settings.region_kind else ""
    outside = (
        f"{first.regions_outside} of them outside the model's image and left out, " if first.regions_outside else ""
    )
    paper_rows: list[tuple[str, ...]] = [
        (name, _number(PAPER_ENTROPY_BEFORE_NATS), _number(PAPER_ENTROPY_BEFORE_NATS - row["entropy_drop_nats"]),
         _number(row["entropy_drop_nats"]), _number(row["align_px"]), _number(row["cosine"], 2), "–")
        for name, row in PAPER_TABLE_3.items()
    ]  # fmt: skip
    return "\n".join(
        [
            "# Measures of the projectors",
            "",
            *_table(table_rows(measures)),
            "",
            f"{measures.images} images, {first.regions} regions{kind}: {outside}{first.regions_without_token} cover no "
            "token and count in Align alone.",
            "Entropies H in nats; ΔH is before minus after. Align is the mean over regions of the IoU by area, with "
            f"the threshold rule `{settings.threshold_rule}`. The last column is a control: the same cosine with "
            f"another region's label (seed {settings.seed}).",
            "All numbers, with means over images and IoU over tokens, are in `measures.json`.",
            "",
            "## The paper's Table 3, at 7B scale",
            "",
            "Other models, other images: what can be compared is the order of the rows, not the numbers.",
            "",
            *_table(paper_rows),
            "",
            "CLIP-L/336, Vicuna-1.5-7B, two-layer MLP, 100 images of COCO 2017. H after is H before, from the "
            "paper's Table 1, less ΔH.",
            "",
        ]
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    header = "| " + " | ".join(COLUMNS) + " |"
    rule = "|---|" + "--:|" * (len(COLUMNS) - 1)
    return [header, rule, *("| " + " | ".join(row) + " |" for row in rows)]


def write_report(
    measures: Measures, settings: MeasureSettings, provenance: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Writes `measures.json` and `measures.md` into `folder`, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(as_json(measures, settings, provenance), indent=2, ensure_ascii=False, allow_nan=False)
    json_path, markdown_path = folder / "measures.json", folder / "measures.md"
    json_path.write_text(document + "\n", encoding="utf-8")
    markdown_path.write_text(as_markdown(measures, settings), encoding="utf-8")
    return [json_path, markdown_path]
