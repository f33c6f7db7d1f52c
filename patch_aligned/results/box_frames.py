"""The two readings of a spoken box, and what scores of referring expressions are called.

LLaVA-1.5 speaks boxes in 0..1 of the image padded to a centred square; much else speaks them in 0..1 of the image.
"""

from __future__ import annotations

from typing import Literal

BoxFrame = Literal["square", "image"]

PADDED_FRAME = "acc@0.5 padded frame undone"
IMAGE_FRAME = "acc@0.5 read in image frame"
ACCURACY: dict[BoxFrame, str] = {"square": PADDED_FRAME, "image": IMAGE_FRAME}
LEGACY_METRIC = "refcoco_ACC@0.5"
"""Of lmms-eval's own `*_bbox_rec_*` tasks, which are called legacy here."""
