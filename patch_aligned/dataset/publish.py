"""Publish a PAD file as a folder for the Hugging Face hub: Parquet files and a dataset card. Nothing is uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from patch_aligned.dataset.stats import TokenSettings, as_markdown, gather_statistics, write_statistics
from patch_aligned.files import validated
from patch_aligned.pad import AnnotatedImage, read_annotations, write_annotations
from patch_aligned.record_files import SETTINGS_SUFFIX, with_progress

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Published:
    """What was written."""

    files: list[Path]
    images: int


def publish(
    pad: Path,
    folder: Path,
    *,
    name: str,
    licence: str | None = None,
    settings: Path | None = None,
    records_per_file: int = 100_000,
    tokens: TokenSettings | None = None,
    plots: bool = True,
) -> Published:
    """Write `README.md`, `data/train-00000-of-....parquet`, `stats.json` and `stats.png`, and copy `settings.json`.

    The PAD file is read twice. Without a licence the card leaves it open; without `settings` those beside the PAD file
    are taken, if there are any.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: found files there; expected a new or empty folder. Name another, or clear it")
    beside = pad.with_name(pad.name + SETTINGS_SUFFIX)
    settings = settings or (beside if beside.is_file() else None)
    where = f"{settings}, settings of an annotation run"
    made_with = validated(dict[str, Any], settings.read_bytes(), where) if settings else None

    statistics = gather_statistics(pad, tokens)
    if not statistics.images:
        raise ValueError(f"{pad}: found no record; expected at least one image to publish")
    statistics.file = Path(pad.name)  # do not leak local paths
    numbers = write_statistics(statistics, folder, plots)
    for unwanted in ("stats.md", "tags.tsv"):  # the card has the first, stats.json the second
        (folder / unwanted).unlink()

    record_keys: set[str] = set()
    label_keys: set[str] = set()

    def with_keys_noted() -> Iterator[AnnotatedImage]:
        for image in with_progress(read_annotations(pad), "Publishing"):
            record_keys.update(image.extra)
            label_keys.update(key for region in image.regions for key in region.extra)
            yield image

    images = with_keys_noted()
    total = -(-statistics.images // records_per_file)
    files = [folder / "data" / f"train-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    for path in files:
        write_annotations(islice(images, records_per_file), path)
    if settings is not None:
        shutil.copyfile(settings, folder / "settings.json")
    card = _card(
        name=name,
        licence=licence,
        size=next((text for most, text in _SIZES if statistics.images < most), "1M<n<10M"),
        statistics=as_markdown(numbers),
        plots=plots,
        record_keys=record_keys,
        label_keys=label_keys,
        settings=made_with,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return Published(files, statistics.images)


def _card(**values: Any) -> str:
    """The dataset card, from `card.md.j2`."""
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(leaves=_leaves, **values)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts of nested settings, for cells of a table."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield key, " ".join(text.replace("|", "\\|").replace("`", "'").split())
