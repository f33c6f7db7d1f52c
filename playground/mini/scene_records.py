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
from playground.mini.choices import choice_questions
from playground.mini.questions import (
    BOX_FORMAT,
    SHORT_ANSWER,
    ask_questions,
    box_text,
    converse,
    converse_without_image,
    refer_to_objects,
)
from playground.mini.scenes import BackgroundRegion, Scene, SceneObject, compose_scene
from playground.mini.sprites import held_out_names

JPEG_QUALITY = 95
SCENES_PER_FOLDER = 1000
TEXT_ONLY_EVERY = 10


@dataclass(frozen=True)
class DatasetSettings:
    """What determines a data set: the same settings give the same files. Pictures do not depend on `held_out_seed`."""

    count: int  # of scenes
    seed: int = 0  # of the random streams
    split: str = "train"  # or `heldout`: streams that never share a scene, even with the same seed
    style: str = "simple"  # or `full`
    size_wh: tuple[int, int] | None = None  # None for the style's own
    held_out_seed: int | None = None  # draws ten names that no text mentions beside `HELD_OUT`; None for those alone
    generator: int = 2  # version of the generator

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written to files."""
        settings = asdict(self)
        settings["size_wh"] = list(self.size_wh) if self.size_wh else None
        return settings


def image_path(settings: DatasetSettings, index: int) -> str:
    """Path of a scene's picture below the data set's folder. Unique over seeds, splits and styles."""
    name = f"{settings.style}_{settings.split}_{settings.seed}_{index:06d}.jpg"
    return f"images/{index // SCENES_PER_FOLDER:05d}/{name}"


def compose(settings: DatasetSettings, index: int) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of a data set, and the generator of its texts."""
    held_out = held_out_names(settings.held_out_seed)
    return compose_scene(settings.seed, settings.split, settings.style, index, settings.size_wh, held_out)


def write_scene(settings: DatasetSettings, index: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Composes scene `index`, saves its picture below `folder`, and returns its records by data file.

    Keys: `train`, `pad`, `instruct`, `questions`, `answers`, `referring`, `choices`, `choices_instruct`.
    """
    scene, rng = compose(settings, index)
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
        instruct.append({"id": f"{scene_id}-text", "conversations": converse_without_image(rng, scene.held_out)})
    questions, answers = _question_records(scene, rng, scene_id, path)
    referring = _referring_records(scene, rng, scene_id, path)
    asked = choice_questions(scene, rng, caption, with_held_out=settings.split != "train")
    return {
        "train": [train],
        "pad": [pad_record(scene, path, caption, settings.split)],
        "instruct": instruct,
        "questions": questions,
        "answers": answers,
        "referring": referring,
        "choices": [{"id": f"{scene_id}-{number}", "image": path, **asdict(q)} for number, q in enumerate(asked)],
        "choices_instruct": [
            {"id": f"{scene_id}-{number}", "image": path, "conversations": question.as_conversation()}
            for number, question in enumerate(asked)
        ],
    }


def pad_record(scene: Scene, path: str, caption: str, split: str) -> dict[str, Any]:
    """The scene as a record of the Patch-Aligned Dataset.

    Each label has the extra key `kind`: object or background. Objects also have `area_px`, `rank` (1: the largest of
    the picture), `colour` (None where not tinted), `in_caption` and `held_out`.
    """
    captioned = {item.sprite.name for item in scene.captioned}
    tags: list[dict[str, Any]] = [
        {
            "tag": item.sprite.name,
            "kind": "object",
            "area_px": item.area_px,
            "rank": 1 + sum(other.area_px > item.area_px for other in scene.objects),
            "colour": item.colour,
            "in_caption": item.sprite.name in captioned,
            "held_out": item.sprite.name in scene.held_out,
        }
        for item in scene.objects
    ]
    tags += [{"tag": region.label, "kind": "background"} for region in scene.background]
    regions: list[SceneObject | BackgroundRegion] = [*scene.objects, *scene.background]
    masks = np.stack([region.mask for region in regions], axis=-1)  # [height, width, regions]
    encoded = coco_mask.encode(np.asfortranarray(masks.astype(np.uint8)))
    places = [
        {"bbox": [float(edge) for edge in region.box_xyxy_px], "rle_mask": rle["counts"].decode("ascii")}
        for region, rle in zip(regions, encoded, strict=True)
    ]
    return {
        "image_id": path,
        "size": list(scene.size_wh),
        "caption": caption,
        "labels": [tag | place for tag, place in zip(tags, places, strict=True)],
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
