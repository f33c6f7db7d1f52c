"""Compares a PAD file with another that is taken for the truth: ids, captions, tags, boxes, and the IoU of masks.

    python scripts/compare_pad.py found.jsonl.gz truth.json

Regions are compared by their place in the record. Ends with exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pycocotools import mask as coco_mask

from patch_aligned.pad import AnnotatedImage, Region, read_annotations


def differences(found: AnnotatedImage, truth: AnnotatedImage) -> list[str]:
    """What differs between two records of an image, but for masks, in words."""
    place = truth.image_id
    problems = [
        f"{place}, {name}: found {was!r}, expected {expected!r}"
        for name, was, expected in (
            ("size", found.size_wh, truth.size_wh),
            ("caption", found.caption, truth.caption),
            ("number of regions", len(found.regions), len(truth.regions)),
        )
        if was != expected
    ]
    for position, (region, expected_region) in enumerate(zip(found.regions, truth.regions, strict=False)):
        if (region.tag, region.bbox_xyxy_px) != (expected_region.tag, expected_region.bbox_xyxy_px):
            problems.append(
                f"{place}, labels[{position}]: found {region.tag!r} at {list(region.bbox_xyxy_px)}, "
                f"expected {expected_region.tag!r} at {list(expected_region.bbox_xyxy_px)}"
            )
    return problems


def mask_iou(region: Region, other: Region, size_wh: tuple[int, int]) -> float:
    """Intersection over union of the masks of two regions, by pixels."""
    masks = [{"size": [size_wh[1], size_wh[0]], "counts": one.rle_mask.encode("ascii")} for one in (region, other)]
    return float(coco_mask.iou(masks[:1], masks[1:], [0])[0, 0])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("found", type=Path, help="PAD file")
    parser.add_argument("truth", type=Path, help="PAD file that is right")
    arguments = parser.parse_args()
    found = {image.image_id: image for image in read_annotations(arguments.found)}
    truth = {image.image_id: image for image in read_annotations(arguments.truth)}
    problems = [f"{image_id}: only in {arguments.found}" for image_id in found.keys() - truth.keys()]
    problems += [f"{image_id}: only in {arguments.truth}" for image_id in truth.keys() - found.keys()]
    ious = []
    for image_id in [image_id for image_id in truth if image_id in found]:
        problems += differences(found[image_id], truth[image_id])
        ious += [
            mask_iou(region, expected, truth[image_id].size_wh)
            for region, expected in zip(found[image_id].regions, truth[image_id].regions, strict=False)
        ]
    for problem in problems:
        print(problem)
    print(f"{len(truth)} images, {len(ious)} regions; {len(problems)} differences in ids, captions, tags and boxes")
    if ious:
        print(f"IoU of masks: mean {sum(ious) / len(ious):.4f}, lowest {min(ious):.4f}")
    return int(bool(problems) or min(ious, default=1.0) < 1)


if __name__ == "__main__":
    sys.exit(main())
