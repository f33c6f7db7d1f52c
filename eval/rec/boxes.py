"""What one question of a referring-expression benchmark is: a row of a Parquet file, its prompt and its picture.

Rows name their picture by its path below the data root and do not hold it: a picture has seven expressions on average,
and whoever trained LLaVA has COCO's pictures on disk already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageFile

from llava.mm_utils import load_rgb_image
from patch_aligned.cells import boxes_xyxy_from_image01, boxes_xyxy_from_square01
from patch_aligned.files import written_whole
from patch_aligned.results.run import ACCURACY, BoxFrame

# The wording of LLaVA-1.5's training data (llava_v1_5_mix665k.json), where the expression ends with a full stop.
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
    """One expression.

    Attributes:
        id: unique within the file.
        image: path of the picture below the data root.
        expression: the words that single out one object.
        box_xyxy_px: the object's box, pixels of the picture.
        width: of the picture, pixels.
        height: of the picture, pixels.
    """

    id: str
    image: str
    expression: str
    box_xyxy_px: list[float]
    width: int
    height: int


def prompt_of(expression: str) -> str:
    """The question as the model was trained on it, without the picture's placeholder."""
    return PROMPT.format(expression=expression.strip().removesuffix("."))


def image_path(image: str, data_root: Path) -> Path:
    """Path of a row's picture.

    Raises:
        ValueError: the path leaves the data root.
    """
    path = Path(image)
    # Links inside the folder may lead elsewhere: whoever set up the folder made them. A data file may not.
    if path.anchor or ".." in path.parts:
        raise ValueError(f"field image: found {image!r}, expected a path inside the data root {data_root}")
    return data_root / path


def load_image(row: Row, data_root: Path) -> Image.Image:
    """A row's picture as RGB, turned as its EXIF says, as in training.

    Raises:
        ValueError: the path leaves the data root, or the picture has another size than the row's box was drawn on.
        FileNotFoundError: there is no such picture.
        UnreadableImageError: it is cut off, or broken otherwise.
    """
    path = image_path(row["image"], data_root)
    with _cut_pictures_are_errors():
        image = load_rgb_image(path)
    if image.size != (row["width"], row["height"]):
        raise ValueError(
            f"{path}: found {image.width} x {image.height} pixels, expected {row['width']} x {row['height']}, on which "
            f"the box of row {row['id']} was drawn; put the original picture there"
        )
    return image


@contextmanager
def _cut_pictures_are_errors() -> Iterator[None]:
    """Pillow's own rule, which lmms-eval, once imported, changes for the process: the rest would be grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def check_row(row: Row, where: str) -> None:
    """Refuses what cannot be asked or scored.

    Args:
        row: fields of the right types.
        where: file and record, for the message.

    Raises:
        ValueError: no words, or a box without area or outside the picture.
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
    """Write the rows as Parquet, atomically.

    Raises:
        ValueError: two rows have the same id.
    """
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"{path}: found the id {row['id']!r} twice, expected another one for each row")
        seen.add(row["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=SCHEMA), temporary)


# Referring expressions: a box read out of an answer, and scored under both frames that it may have been spoken in.
#
# LLaVA-1.5 was trained on boxes in 0..1 of the image *padded to a centred square*, so that is how its answers are to be
# read; much of the literature reads them in 0..1 of the image itself. The two agree on square images only. Every answer
# is scored both ways, so that a run never has to be repeated to learn what the other reading would have given.

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
    """The first `[x1, y1, x2, y2]` anywhere in an answer; None where there is none.

    Numbers may lack the digit before the point (`.25`) or after it (`1.`). Any two opposite corners name a box, so that
    swapped ones are put in order. Numbers outside 0..1 are kept: such an answer is wrong, not unreadable.
    """
    match = _BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def box_iou(a_xyxy: Sequence[float], b_xyxy: Sequence[float]) -> float:
    """Area of the intersection of two boxes over the area of their union; 0 where both are empty."""
    width = min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0])
    height = min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _area(a_xyxy) + _area(b_xyxy) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box_xyxy: Sequence[float]) -> float:
    return (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])


def score_answer(text: str, box_xyxy_px: Sequence[float], width: int, height: int) -> dict[str, float]:
    """Scores of one answer under both readings.

    Args:
        text: the raw answer.
        box_xyxy_px: the box asked for, in pixels of the image file.
        width: of the image file, pixels.
        height: of the image file, pixels.

    Returns:
        A number for each name of `METRICS`. An answer is right from an IoU of 0.5 on, but for rounding. One without a
        box is wrong, with an IoU of 0, in both readings, and counts as 1 in "not parsed". Boxes are not clipped to the
        image.
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
