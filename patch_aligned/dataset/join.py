"""Join a PAD file with LLaVA's training JSON by image: take captions and sample ids from there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from patch_aligned.files import refuse_inputs
from patch_aligned.pad import AnnotatedImage, normal_path, read_annotations, write_annotations
from patch_aligned.record_files import ANSWERERS, first_answer, iter_records, with_progress

UNMATCHED_SUFFIX = ".unmatched.jsonl"


@dataclass(frozen=True)
class Joined:
    """Counts of a join."""

    matched: int  # PAD records that have a sample
    pad_only: int  # PAD records without a sample
    samples_only: int  # images of samples without a PAD record
    further_samples: int  # samples of an image with an earlier sample, which gives the caption
    without_image: int  # samples with no image, or several
    written: int  # records of the new file
    unmatched: Path  # lists the images of `pad_only` and `samples_only`


def join(pad: Path, samples: Path, output: Path, *, only_matched: bool = False) -> Joined:
    """Copy a PAD file, taking each image's caption and `id` from its first training sample.

    The caption is the sample's first answer. Records without a sample keep their own caption. Images that are in one
    file only are listed in `<output>.unmatched.jsonl`, and left out of `output` with `only_matched`. Captions of all
    samples are held in memory: some 100 MB for LLaVA's 558K.
    """
    refuse_inputs(output, (pad, samples))
    caption_of, further, without = _captions(samples)
    if not caption_of:
        raise ValueError(
            f"{samples}: found no sample with one image; expected LLaVA's training JSON as the second file"
        )
    asked, first_sample = len(caption_of), next(iter(caption_of))
    matched = pad_only = 0
    first_record: str | None = None
    output.parent.mkdir(parents=True, exist_ok=True)
    unmatched_path = output.with_name(output.name + UNMATCHED_SUFFIX)
    unmatched: list[str] = []

    def joined() -> Iterator[AnnotatedImage]:
        nonlocal matched, pad_only, first_record
        for image in with_progress(read_annotations(pad), "Joining"):
            first_record = first_record or image.image_id
            if found := caption_of.pop(normal_path(image.image_id), None):
                sample_id, caption = found
                matched += 1
                extra = image.extra if sample_id is None else {**image.extra, "id": sample_id}
                yield replace(image, caption=caption, extra=extra)
                continue
            pad_only += 1
            unmatched.append(image.image_id)
            if not only_matched:
                yield image
        if not matched:
            raise ValueError(
                f"{pad} and {samples}: found no image in both; image_id is such as {first_record!r}, image such as "
                f"{first_sample!r}. Expected paths below one folder: strip or add the leading folders in one of them"
            )

    written = write_annotations(joined(), output)
    with unmatched_path.open("w", encoding="utf-8") as file:
        for name, images in ((pad, unmatched), (samples, caption_of)):
            file.writelines(json.dumps({"only_in": str(name), "image": image}) + "\n" for image in images)
    return Joined(matched, pad_only, asked - matched, further, without, written, unmatched_path)


def _captions(samples: Path) -> tuple[dict[str, tuple[str | None, str]], int, int]:
    """Id and caption of each image's first sample; the numbers of further samples, and of those without one image."""
    caption_of: dict[str, tuple[str | None, str]] = {}
    further = without = 0
    for index, sample in enumerate(iter_records(samples)):
        if not isinstance(sample, Mapping):
            raise ValueError(f"{samples}: record {index}: found {sample!r:.80}; expected an object of LLaVA's JSON")
        image = sample.get("image")
        if not isinstance(image, str):
            without += 1
        elif (image := normal_path(image)) in caption_of:
            further += 1
        else:
            sample_id = sample.get("id")
            caption = first_answer(sample)
            if caption is None:
                raise ValueError(
                    f"{samples}: record {index} (image {image!r}), field 'conversations': found no answer; expected a "
                    f"turn whose 'from' is {' or '.join(ANSWERERS)} and whose 'value' is text. Correct the record"
                )
            caption_of[image] = (None if sample_id is None else str(sample_id), caption)
    return caption_of, further, without
