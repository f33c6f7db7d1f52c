"""An analysis as files: the page, the headline as Markdown, every number as JSON, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from patch_aligned.analysis.analysed_models import AnalysedModel
from patch_aligned.analysis.analysis_results import Analysis
from patch_aligned.analysis.localisation_figure import save_localisation_figure
from patch_aligned.analysis.plain_json import plain_json
from patch_aligned.analysis.report_page import report_page
from patch_aligned.analysis.report_tables import (
    PAPER_CONDITIONS,
    PAPER_TABLE_3,
    as_markdown,
    headline_table,
    paper_table,
)
from patch_aligned.analysis.spectra_figure import save_spectra_figure
from patch_aligned.analysis.token_map import TokenMaps
from patch_aligned.analysis.token_map_figure import save_token_map_figures
from patch_aligned.analysis.token_map_page import write_token_map_page
from patch_aligned.checkpoint_hash import checkpoint_hash
from patch_aligned.whole_files import written_whole

_PICTURES = ("localisation.png", "token_map.html", "token_map.json", "token_map_[0-9][0-9][0-9]_*.png")


def write_report(
    analysis: Analysis, folder: Path, maps: TokenMaps | None = None, provenance: Mapping[str, Any] | None = None
) -> list[Path]:
    """Writes `report.html`, `report.md`, `analysis.json` and the pictures into a folder, made where it is missing.

    Those of an earlier report there are replaced, and its other pictures removed.

    Args:
        analysis: what was found.
        folder: where everything goes.
        maps: token maps of some images, for the page and for `token_map.html`.
        provenance: what else the numbers hang on, such as `provenance_of` gives.

    Returns:
        The paths written, the page first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    provenance = provenance or {}
    folder.mkdir(parents=True, exist_ok=True)
    spectra = folder / "spectra.svg"
    save_spectra_figure(analysis, spectra)
    pictures = [spectra]
    if analysis.picture:
        pictures.append(folder / "localisation.png")
        save_localisation_figure(analysis.picture, pictures[-1], analysis.settings.measure.threshold_rule)
    if maps:
        pictures += [*write_token_map_page(maps, folder), *save_token_map_figures(maps, folder, prefix="token_map_")]
    for earlier in {path for pattern in _PICTURES for path in folder.glob(pattern)} - set(pictures):
        earlier.unlink()  # or it would pass for this analysis's
    texts = {
        "report.html": report_page(analysis, provenance, spectra.read_text(encoding="utf-8"), maps),
        "report.md": report_markdown(analysis),
        "analysis.json": json.dumps(report_json(analysis, provenance), indent=1, ensure_ascii=False, allow_nan=False),
    }
    for name, text in texts.items():
        with written_whole(folder / name) as file:
            file.write_text(text.rstrip() + "\n", encoding="utf-8")
    return [*(folder / name for name in texts), *pictures]


def report_json(analysis: Analysis, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Every number with its rule, the settings and the provenance; NaN becomes null."""
    extra = plain_json({"provenance": provenance, "paper_table_3_at_7b_scale": PAPER_TABLE_3})
    return {**analysis.to_json(), **extra}


def report_markdown(analysis: Analysis) -> str:
    """The headline table, what it was taken on, and the paper's Table 3."""
    measure = analysis.settings.measure
    first, model = next(iter(analysis.models.items()))
    counts = model.counts
    kind = f" of kind `{measure.region_kind}`" if measure.region_kind else ""
    outside = f"{counts.regions_outside} outside the model's image and left out, " if counts.regions_outside else ""
    broken = (
        f" {len(analysis.broken_images):,} more images were left out: they could not be measured."
        if analysis.broken_images
        else ""
    )
    differing = f" (of {first}; the page has the counts of all)" if analysis.counts_differ else ""
    lines = [
        "# Analysis of projectors",
        "",
        *as_markdown(headline_table(analysis)),
        "",
        f"{analysis.images} images, {counts.regions} regions{kind}: {outside}{counts.regions_without_token} cover no "
        f"token and count in Align alone{differing}.{broken}",
        "Entropies H in nats; ΔH is before minus after. Align is the mean over regions of the IoU by area, with the "
        f"threshold rule `{measure.threshold_rule}`. The last column is a control: the same cosine with another "
        f"region's label (seed {measure.seed}). In brackets {analysis.settings.resampling.confidence:.0%} intervals, "
        "by the bootstrap over images.",
        "",
        "## The paper's Table 3, at 7B scale",
        "",
        "Other models, other images: what can be compared is the order of the rows, not the numbers.",
        "",
        *as_markdown(paper_table()),
        "",
        PAPER_CONDITIONS,
    ]
    return "\n".join(lines)


def provenance_of(models: Sequence[AnalysedModel]) -> dict[str, Any]:
    """Device, versions, and the SHA-256 of all weights that lie in local files, by their path."""
    places = {
        place
        for model in models
        for place in (model.projector.source, model.tower.name, model.projector.words.source)
        if Path(place).exists()
    }
    return {
        "device": models[0].tower.device,
        "dtype": "float32",
        "image_aspect_ratio": ", ".join(sorted({model.tower.image_aspect_ratio for model in models})),
        "versions": {name: version(name) for name in ("patch-aligned-llava", "torch", "transformers")},
        "sha256": {place: checkpoint_hash(place).sha256 for place in sorted(places)},
    }
