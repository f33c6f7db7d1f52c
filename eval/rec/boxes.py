"""Rows of referring-expression benchmarks: their Parquet files, prompts and pictures, and the scores of answers.

Rows contain the path of their picture below the data root, not the picture: a picture has seven expressions on average,
and COCO's pictures are on disk already if LLaVA was trained there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageFile

from llava.mm_utils import load_rgb_image
from patch_aligned.cells import box_iou, boxes_xyxy_from_image01, boxes_xyxy_from_square01
from patch_aligned.files import written_whole
from patch_aligned.images import image_path
from patch_aligned.results.run import ACCURACY, BoxFrame

# As in LLaVA-1.5's training data (llava_v1_5_mix665k.json), where the expression ends with a full stop.
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {expression}."
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("image", pyarrow.string()),
        ("expression", pyarrow.string()),
        ("box_xyxy_px", pyarrow.list_(pyarrow.float64(), 4)),
        ("width", pyarrow.int64()),
        ("height", pyarrow.int64()),
    ]
)


class Row(TypedDict):
    """One expression."""

    id: str  # unique within the file
    image: str  # path of the picture below the data root
    expression: str  # describes one object
    box_xyxy_px: list[float]  # of the object
    width: int  # of the picture, pixels
    height: int


def prompt_of(expression: str) -> str:
    """The question as in training, without the placeholder of the picture."""
    return PROMPT.format(expression=expression.strip().removesuffix("."))


def load_image(row: Row, data_root: Path) -> Image.Image:
    """Load a row's picture as RGB, rotated as its EXIF says, as in training; `ValueError` if it has another size."""
    path = image_path(data_root, row["image"])
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # as it was before lmms-eval was imported, which fills cut images with grey
    try:
        image = load_rgb_image(path)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    if image.size != (row["width"], row["height"]):
        raise ValueError(
            f"{path}: found {image.width} x {image.height} pixels, expected {row['width']} x {row['height']}, on which "
            f"the box of row {row['id']} was drawn; put the original picture there"
        )
    return image


def check_row(row: Row, where: str) -> None:
    """Raise `ValueError` for a row without words, or with a box that is empty or outside the picture.

    `where` is file and record, for the message.
    """
    if not row["expression"].strip():
        raise ValueError(f"{where}, field expression: found {row['expression']!r}, expected words")
    width, height = row["width"], row["height"]
    if width < 1 or height < 1:
        raise ValueError(f"{where}: found a picture of {width} x {height} pixels")
    x1, y1, x2, y2 = row["box_xyxy_px"]
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or not (x1 < x2 and y1 < y2):
        raise ValueError(
            f"{where}, box: found {row['box_xyxy_px']}, expected x1 < x2 and y1 < y2; are these x, y, width, height?"
        )
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise ValueError(f"{where}, box: found {row['box_xyxy_px']}, which is outside its {width} x {height} picture")


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as Parquet, atomically."""
    times = Counter(row["id"] for row in rows)
    if twice := [row_id for row_id, count in times.items() if count > 1]:
        raise ValueError(f"{path}: found the id {twice[0]!r} twice, expected another one for each row")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=SCHEMA), temporary)


# Scores of an answer: its box is read in both frames.
#
# LLaVA-1.5 was trained on boxes in 0..1 of the image *padded to a centred square*, so answers must be read this way.
# Much of the literature reads them in 0..1 of the image itself. The two agree on square images only. Every answer is
# scored both ways, so that a run need not be repeated for the other reading.

BoxXyxy = tuple[float, float, float, float]

MEAN_IOU: dict[BoxFrame, str] = {
    "square": "mean IoU padded frame undone",
    "image": "mean IoU read in image frame",
}
NOT_PARSED = "not parsed"
METRICS = (*ACCURACY.values(), *MEAN_IOU.values(), NOT_PARSED)
MIN_IOU = 0.5

# At most nine digits before the point: a longer number is no coordinate, and its box's area could overflow.
_NUMBER = r"\s*(-?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]", re.ASCII)


def parse_box(text: str) -> BoxXyxy | None:
    """Return the first `[x1, y1, x2, y2]` in an answer, or None.

    Numbers may lack the digit before the point (`.25`) or after it (`1.`). Swapped corners are put in order. Numbers
    outside 0..1 are kept: such an answer is wrong, not unreadable.
    """
    match = _BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def score_answer(text: str, box_xyxy_px: Sequence[float], width: int, height: int) -> dict[str, float]:
    """Score an answer under both readings: a number for each of `METRICS`.

    The box and the size are in pixels of the image file. An answer is right from an IoU of 0.5, up to rounding. Without
    a box it is wrong, with an IoU of 0, and counts as 1 in "not parsed". Boxes are not clipped to the image.
    """
    spoken = parse_box(text)
    if spoken is None:
        return {**dict.fromkeys(METRICS, 0.0), NOT_PARSED: 1.0}
    iou = {
        "square": box_iou(boxes_xyxy_from_square01(spoken, (width, height)).tolist(), box_xyxy_px),
        "image": box_iou(boxes_xyxy_from_image01(spoken, (width, height)).tolist(), box_xyxy_px),
    }
    return {
        **{ACCURACY[frame]: float(iou[frame] >= MIN_IOU - 1e-9) for frame in ACCURACY},
        **{MEAN_IOU[frame]: iou[frame] for frame in MEAN_IOU},
        NOT_PARSED: 0.0,
    }
