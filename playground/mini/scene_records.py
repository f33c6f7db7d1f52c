"""The records that describe one scene in the data files: training JSON, PAD, conversations, questions, expressions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from patch_aligned.cells import boxes_xyxy_to_square01
from playground.mini.captions import caption_prompt, write_caption
from playground.mini.questions import (
    BOX_FORMAT,
    SHORT_ANSWER,
    ask_questions,
    box_text,
    converse,
    converse_without_image,
    refer_to_objects,
)
from playground.mini.scenes import Scene, compose_scene

JPEG_QUALITY = 95
SCENES_PER_FOLDER = 1000
TEXT_ONLY_EVERY = 10


@dataclass(frozen=True)
class DatasetSettings:
    """What determines a data set: the same settings give the same files.

    Attributes:
        count: number of scenes.
        seed: of the random streams.
        split: `train` or `heldout`: streams that never share a scene, even with the same seed.
        style: `simple` or `full`.
        size_wh: fixed picture size, None for the style's own.
        generator: version of the generator.
    """

    count: int
    seed: int = 0
    split: str = "train"
    style: str = "simple"
    size_wh: tuple[int, int] | None = None
    generator: int = 1

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written to files."""
        settings = asdict(self)
        settings["size_wh"] = list(self.size_wh) if self.size_wh else None
        return settings


def image_path(settings: DatasetSettings, index: int) -> str:
    """Path of a scene's picture below the data set's folder. Unique over seeds, splits and styles."""
    name = f"{settings.style}_{settings.split}_{settings.seed}_{index:06d}.jpg"
    return f"images/{index // SCENES_PER_FOLDER:05d}/{name}"


def write_scene(settings: DatasetSettings, index: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Composes scene `index`, saves its picture below `folder`, and returns its records by data file.

    Keys: `train`, `pad`, `instruct`, `questions`, `answers`, `referring`.
    """
    scene, rng = compose_scene(settings.seed, settings.split, settings.style, index, settings.size_wh)
    path = image_path(settings, index)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.picture).save(folder / path, quality=JPEG_QUALITY, subsampling=0)
    return scene_records(settings, scene, rng, path)


def scene_records(
    settings: DatasetSettings, scene: Scene, rng: np.random.Generator, path: str
) -> dict[str, list[dict[str, Any]]]:
    """All records of a scene whose picture is at `path`, by data file."""
    scene_id = f"{settings.style}-{settings.split}-{settings.seed}-{scene.index:06d}"
    caption = write_caption(scene, rng)
    prompt = caption_prompt(rng)
    train = {
        "id": scene_id,
        "image": path,
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption}],
    }
    instruct: list[dict[str, Any]] = [{"id": scene_id, "image": path, "conversations": converse(scene, rng)}]
    if scene.index % TEXT_ONLY_EVERY == TEXT_ONLY_EVERY - 1:
        instruct.append({"id": f"{scene_id}-text", "conversations": converse_without_image(rng)})
    questions, answers = _question_records(scene, rng, scene_id, path)
    return {
        "train": [train],
        "pad": [pad_record(scene, path, caption, settings.split)],
        "instruct": instruct,
        "questions": questions,
        "answers": answers,
        "referring": _referring_records(scene, rng, scene_id, path),
    }


def pad_record(scene: Scene, path: str, caption: str, split: str) -> dict[str, Any]:
    """The scene as a record of the Patch-Aligned Dataset. Each label has the extra key `kind`: object or background."""
    named = [(item.sprite.name, "object", item) for item in scene.objects]
    named += [(region.label, "background", region) for region in scene.background]  # type: ignore[misc]
    masks = np.stack([region.mask for _, _, region in named], axis=-1)  # [height, width, regions]
    encoded = coco_mask.encode(np.asfortranarray(masks.astype(np.uint8)))
    return {
        "image_id": path,
        "size": list(scene.size_wh),
        "caption": caption,
        "labels": [
            {
                "tag": tag,
                "bbox": [float(edge) for edge in region.box_xyxy_px],
                "rle_mask": rle["counts"].decode("ascii"),
                "kind": kind,
            }
            for (tag, kind, region), rle in zip(named, encoded, strict=True)
        ],
        "split": split,
    }


def _question_records(
    scene: Scene, rng: np.random.Generator, scene_id: str, path: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    questions, answers = [], []
    for number, question in enumerate(ask_questions(scene, rng)):
        question_id = f"{scene_id}-{number}"
        text = f"{question.text}\n{SHORT_ANSWER}"
        questions.append({"question_id": question_id, "image": path, "text": text, "category": question.category})
        answers.append({"question_id": question_id, "answer": question.answer, "category": question.category})
    return questions, answers


def _referring_records(scene: Scene, rng: np.random.Generator, scene_id: str, path: str) -> list[dict[str, Any]]:
    records = []
    for expression in refer_to_objects(scene, rng):
        box = scene.objects[expression.object_index].box_xyxy_px
        records.append(
            {
                "id": f"{scene_id}-{expression.object_index}",
                "image": path,
                "size": list(scene.size_wh),
                "expression": expression.text,
                "label_index": expression.object_index,
                "bbox_xyxy_px": [float(edge) for edge in box],
                "bbox_square01": [round(float(edge), 6) for edge in boxes_xyxy_to_square01(box, scene.size_wh)],
                "question": f"Where is {expression.text}? {BOX_FORMAT}",
                "answer": box_text(box, scene.size_wh),
            }
        )
    return records
