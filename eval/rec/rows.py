"""What one question of a referring-expression benchmark is: a row of a Parquet file, its prompt and its picture.

Rows name their picture by its path below the data root and do not hold it: a picture has seven expressions on average,
and whoever trained LLaVA has COCO's pictures on disk already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageFile

from llava.mm_utils import load_rgb_image
from patch_aligned.whole_files import written_whole

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
    """A row's picture as RGB, without rotation by EXIF, as in training.

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
    """Writes the rows as Parquet, whole or not at all.

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
