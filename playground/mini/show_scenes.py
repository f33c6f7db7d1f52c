"""Draws an overview of a data set: pictures with the outlines and labels of their regions, and their captions."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from llava.command import command_parser, run_command

CELL_WH = (336, 336)
_CAPTION_PX = 58
_OBJECT_COLOURS = ("#ff2d55", "#ffd60a", "#30d158", "#0a84ff", "#ff9f0a", "#bf5af2", "#64d2ff")
_BACKGROUND_COLOUR = "#ffffff"


def draw_regions(picture: Image.Image, record: dict[str, Any]) -> Image.Image:
    """The picture with the outline of every region and its label at a visible place of the region."""
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(11)
    width, height = record["size"]
    names = []
    for number, label in enumerate(record["labels"]):
        is_object = label.get("kind", "object") == "object"
        colour = _OBJECT_COLOURS[number % len(_OBJECT_COLOURS)] if is_object else _BACKGROUND_COLOUR
        rle = {"size": [height, width], "counts": label["rle_mask"].encode("ascii")}
        mask = coco_mask.decode(rle).astype(bool)  # [height, width]
        inner = mask.copy()
        inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        edge = Image.fromarray(((mask & ~inner) * 255).astype(np.uint8))
        if is_object:
            drawn.paste(colour, (0, 0), edge)
        rows, cols = np.nonzero(mask)
        middle = int(np.argmin(np.abs(rows - np.median(rows)) + np.abs(cols - np.median(cols))))
        names.append((float(cols[middle]), float(rows[middle]), label["tag"], colour))
    for x, y, text, colour in names:
        draw.text((x, y), text, fill=colour, font=font, anchor="mm", stroke_width=2, stroke_fill="black")
    return drawn


def contact_sheet(folder: Path, count: int, columns: int) -> Image.Image:
    """The first `count` scenes of the data set in `folder`, `columns` in a row."""
    records = json.loads((folder / "pad.json").read_text(encoding="utf-8"))[:count]
    rows = -(-len(records) // columns)
    cell_width, cell_height = CELL_WH[0], CELL_WH[1] + _CAPTION_PX
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for position, record in enumerate(records):
        left, top = position % columns * cell_width, position // columns * cell_height
        with Image.open(folder / record["image_id"]) as picture:
            drawn = draw_regions(picture.convert("RGB"), record)
        sheet.paste(drawn, (left + (CELL_WH[0] - drawn.width) // 2, top + CELL_WH[1] - drawn.height))
        caption = "\n".join(textwrap.wrap(record["caption"], 58)[:4])
        draw.multiline_text((left + 8, top + CELL_WH[1] + 4), caption, fill="black", font=ImageFont.load_default(11))
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.show_scenes", __doc__)
    parser.add_argument("folder", type=Path, help="what make_scenes --out wrote")
    parser.add_argument("--count", type=int, default=20, help="scenes to show, from the first on (default: 20)")
    parser.add_argument("--columns", type=int, default=5, help="scenes in a row (default: 5)")
    parser.add_argument("--out", type=Path, help="picture to write (default: FOLDER/overview.png)")
    run_command(_show, parser, argv)


def _show(arguments: argparse.Namespace) -> None:
    if not (arguments.folder / "pad.json").is_file():
        raise FileNotFoundError(
            f"{arguments.folder}/pad.json does not exist. Make a data set first:\n"
            f"    python -m playground.mini.make_scenes --count 100 --out {arguments.folder}"
        )
    out = arguments.out or arguments.folder / "overview.png"
    contact_sheet(arguments.folder, arguments.count, arguments.columns).save(out)
    print(out)


if __name__ == "__main__":
    main()
