"""A PAD file as a folder for the Hugging Face hub: Parquet shards and a dataset card. Nothing is uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from patch_aligned.dataset.stats import TokenSettings, as_markdown, gather_statistics, write_statistics
from patch_aligned.pad import SETTINGS_SUFFIX, AnnotatedImage, read_annotations, write_annotations

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_CARD = """\
# {name}

Images with captions and labelled regions: a tag, a box and a mask for each object, in the format of the Patch-Aligned
Dataset (PAD) of [Analyzing Fine-Grained Alignment and Enhancing Vision Understanding in Multimodal Language
Models](https://arxiv.org/abs/2505.17316). The images themselves are not part of it; `image_id` is the path of each
below its image folder.

## Numbers

{statistics}
{picture}
## Fields

| field | type | meaning |
|---|---|---|
| `image_id` | string | path of the image below the image folder; one row an image |
| `size` | list of 2 int32 | width and height in pixels |
| `caption` | string | caption of the whole image; may be empty |
| `labels` | list of struct | the regions, perhaps none |
| `labels[].tag` | string | the region's label, in words |
| `labels[].bbox` | list of 4 float64 | x1, y1, x2, y2 in pixels; may leave the image slightly |
| `labels[].rle_mask` | string | the mask: `counts` of COCO's compressed RLE; its `size` there is [height, width] |
| `labels[].extra_json` | string | further values of the region as JSON{label_extras}, or null |
| `extra_json` | string | further values of the image as JSON{record_extras}, or null |

A mask as an array:

```python
from pycocotools import mask as coco_mask

width, height = row["size"]
label = row["labels"][0]
mask = coco_mask.decode({{"size": [height, width], "counts": label["rle_mask"].encode()}})  # [height, width], 0 or 1
```

All files as one, to train on (`--patch_data_path pad.parquet`):

```python
from itertools import chain
from pathlib import Path

from patch_aligned.pad import read_annotations, write_annotations

files = sorted(Path("data").glob("train-*.parquet"))
write_annotations(chain.from_iterable(map(read_annotations, files)), "pad.parquet")
```

## How it was made

{origin}

## Licence

{licence}
"""


@dataclass(frozen=True)
class Published:
    """What was written."""

    folder: Path
    files: list[Path]
    images: int
    regions: int


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
    watch: Callable[[Iterator[AnnotatedImage]], Iterable[AnnotatedImage]] = iter,
) -> Published:
    """Writes `README.md`, `data/train-00000-of-....parquet`, `stats.json` and `stats.png`, and copies `settings.json`.

    Args:
        pad: PAD file; it is read twice.
        folder: new, or empty.
        name: of the data set, for the card.
        licence: the hub's name of one, such as `cc-by-4.0`; None leaves the place open.
        settings: settings.json of the annotation run; None takes `<pad>.settings.json` if it is there.
        records_per_file: images of one Parquet file.
        tokens: the grid of the statistics; None means LLaVA-1.5's in stage 1.
        plots: draw `stats.png`; needs matplotlib.
        watch: passes the images on, one by one, in both passes; it may show the progress.

    Raises:
        ValueError: a folder that is in use, settings that cannot be read, or nothing to publish.
        AnnotationError, RecordFileError: a broken record or file.
    """
    if records_per_file < 1:
        raise ValueError(f"records_per_file: found {records_per_file}, expected at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: found files there; expected a new or empty folder. Name another, or clear it")
    settings = settings or _settings_beside(pad)
    made_with = _read_settings(settings) if settings else None

    statistics = gather_statistics(pad, tokens, watch=watch)
    if not statistics.images:
        raise ValueError(f"{pad}: found no record; expected at least one image to publish")
    statistics.file = Path(pad.name)  # the folders of this machine are nobody else's business
    numbers = write_statistics(statistics, folder, plots)
    for unwanted in ("stats.md", "tags.tsv"):  # the card has the first, stats.json the second
        (folder / unwanted).unlink()
    keys = _ExtraKeys()
    images = map(keys.saw, watch(read_annotations(pad)))
    total = -(-statistics.images // records_per_file)
    files = []
    for number in range(total):
        path = folder / "data" / f"train-{number:05d}-of-{total:05d}.parquet"
        write_annotations(islice(images, records_per_file), path)
        files.append(path)
    if settings is not None:
        shutil.copyfile(settings, folder / "settings.json")
    body = _CARD.format(
        name=name,
        statistics=as_markdown(numbers),
        picture="![Tags, regions, masks and tokens](stats.png)\n" if plots else "",
        label_extras=_names(keys.of_labels),
        record_extras=_names(keys.of_records),
        origin=_origin(made_with),
        licence=_licence(licence),
    )
    (folder / "README.md").write_text(_front_matter(name, licence, statistics.images) + body, encoding="utf-8")
    return Published(folder, files, statistics.images, statistics.regions)


class _ExtraKeys:
    """Keys beyond the format, gathered while the images pass."""

    def __init__(self) -> None:
        self.of_records: set[str] = set()
        self.of_labels: set[str] = set()

    def saw(self, image: AnnotatedImage) -> AnnotatedImage:
        self.of_records.update(image.extra)
        for region in image.regions:
            self.of_labels.update(region.extra)
        return image


def _settings_beside(pad: Path) -> Path | None:
    path = pad.with_name(pad.name + SETTINGS_SUFFIX)
    return path if path.is_file() else None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: found no JSON ({error}); expected settings.json of an annotation run") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: found {type(settings).__name__}; expected settings.json of an annotation run")
    return settings


def _front_matter(name: str, licence: str | None, images: int) -> str:
    size = next((text for most, text in _SIZES if images < most), "1M<n<10M")
    lines = [
        "---",
        f"license: {json.dumps(licence)}" if licence else "# license: choose one, such as cc-by-4.0",
        f"pretty_name: {json.dumps(name.rsplit('/', maxsplit=1)[-1], ensure_ascii=False)}",
        "task_categories: [image-text-to-text, image-segmentation, object-detection]",
        "tags: [patch-aligned, grounding, multimodal, llava]",
        f"size_categories: [{size}]",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        "    path: data/train-*.parquet",
        "---",
        "",
    ]
    return "\n".join(lines)


def _origin(settings: Mapping[str, Any] | None) -> str:
    if settings is None:
        return "Not recorded: the file came without the settings of an annotation run. Write here how it was made."
    rows = [f"| `{key}` | `{value}` |" for key, value in _leaves(settings)]
    steps = (
        "By `patch-aligned annotate`, whose stages are tagging (RAM), boxes for the tags (Grounding DINO) with "
        "non-maximum suppression, and a mask for each box (SAM). The settings, also in `settings.json`:"
    )
    if settings.get("stages") == "oracle":
        steps = "By `python -m playground.mini.replay`: tags, boxes and masks were given, no model made them."
    return "\n".join([steps, "", "| setting | value |", "|---|---|", *rows])


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield key, " ".join(text.replace("|", "\\|").replace("`", "'").split())


def _licence(licence: str | None) -> str:
    chosen = f"`{licence}` for the annotations" if licence else "Not chosen yet: name one here and above"
    return f"{chosen}. The images and the captions keep their own licences."


def _names(keys: set[str]) -> str:
    return f" ({', '.join(f'`{key}`' for key in sorted(keys))})" if keys else ""
