"""`patch-aligned reselect`: other thresholds, NMS or labels for annotated images, without a model.

Records keep all of the detector's candidates, but masks only of those that became regions. So a new choice may rename
regions and drop some. If it adds a box that has no mask it is refused, and the error lists the boxes: lower thresholds
do that, a higher `nms_iou`, and a lower one if it drops a box that had suppressed others. After `annotate
--segment_candidates` every candidate has its mask, and any choice is possible. A region that is dropped leaves its mask
with its candidate, so that it can become a region again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patch_aligned.annotate.folder import Record, RunFolder, merge
from patch_aligned.annotate.options import CandidateThresholds, Selection
from patch_aligned.annotate.regions import Candidate, mask_of_candidate, mask_of_label, select
from patch_aligned.files import refuse_inputs, validated, written_whole
from patch_aligned.pad import read_annotations
from patch_aligned.record_files import SETTINGS_SUFFIX, write_records

_RESELECTABLE = ("ok", "no_boxes", "no_masks")
_SHOWN = 5


@dataclass
class Counts:
    """What a choice of candidates gives."""

    images: int = 0  # with regions
    regions: int = 0
    tags: set[str] = field(default_factory=set)  # different ones

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record's labels."""
        self.images += bool(record["labels"])
        self.regions += len(record["labels"])
        self.tags.update(label["tag"] for label in record["labels"])


def reselect(
    source: Path, output: Path, changes: Mapping[str, Any], *, keep_candidates: bool = False
) -> tuple[Counts, Counts]:
    """Write a PAD file with the labels that a selection with other attributes gives; return counts before and after.

    Of a run's folder what `merge` would take is written; of a PAD file that was merged with its candidates all records,
    some perhaps without regions. `<output>.settings.json` has the new `selection`. Nothing is written, and `ValueError`
    says why, where thresholds are below those of the candidates, or candidates or masks are missing.
    """
    if not source.exists():
        raise ValueError(f"{source}: found no such file or folder, expected a run's folder or a PAD file")
    refuse_inputs(output, [source])
    run = RunFolder(source) if source.is_dir() else None
    settings = run.settings if run else _settings_beside(source)
    found_by = settings.get("detector") or settings.get("sam3")
    if not found_by:
        raise ValueError(f"{source}: found no detector in its settings, expected candidates that a detector found")
    selection = replace(Selection(**settings["selection"]), **changes)
    selection.require_within(CandidateThresholds(**found_by["candidate_thresholds"]))
    before, after = Counts(), Counts()

    def records(old: Iterable[Record]) -> Iterator[Record]:
        unsegmented: list[str] = []
        images = 0
        for record in old:
            new, without_mask = reselected(record, selection, source, overlap_by_masks="sam3" in settings)
            unsegmented += without_mask
            images += bool(without_mask)
            before.add(record)
            after.add(new)
            if not keep_candidates and run is None:  # merge removes them itself
                del new["candidates"]
            yield new
        if unsegmented:
            raise ValueError(_refusal(source, unsegmented, images))

    if run:
        merge(run, output, keep_candidates=keep_candidates, change=records)
    else:
        write_records(records(image.to_record() for image in read_annotations(source)), output)
    with written_whole(output.with_name(output.name + SETTINGS_SUFFIX)) as temporary:
        text = json.dumps(settings | {"selection": asdict(selection)}, indent=1, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")
    return before, after


def reselected(
    record: Record, selection: Selection, source: str | Path = "record", *, overlap_by_masks: bool = False
) -> tuple[Record, list[str]]:
    """Return a record with the labels of another selection, and the boxes that would be labels but have no mask.

    Images without detection (unreadable ones and others) stay as they are. SAM 3's candidates overlap by their masks.
    """
    place = f"{source}: image_id {record.get('image_id')!r}"
    entries = record.get("candidates")
    if not isinstance(entries, list):
        raise ValueError(
            f"{place}, field 'candidates': found none, expected the detector's boxes. Give the run's folder, or a file "
            "merged with --keep_candidates"
        )
    if record.get("status") not in _RESELECTABLE:
        return dict(record), []
    candidates = [
        Candidate.from_record(entry, f"{place}, candidates[{position}]") for position, entry in enumerate(entries)
    ]
    masks = dict(enumerate(map(mask_of_candidate, entries)))
    for number, label in enumerate(record["labels"]):
        position = label.get("candidate")
        if type(position) is not int or position not in masks:
            raise ValueError(
                f"{place}, field 'labels[{number}].candidate': found {position!r}, expected the position of the "
                "region's box among the candidates. Give the run's folder, or the file as `patch-aligned merge` "
                "wrote it"
            )
        masks[position] = mask_of_label(label)
    if overlap_by_masks:
        candidates = [replace(candidate, mask=masks[position]) for position, candidate in enumerate(candidates)]
    empty = {position for position, mask in masks.items() if mask.get("area_px") == 0}
    empty.update(record.get("empty_masks", ()))
    chosen = select(candidates, selection, record["size"])
    labels = []
    without_mask = []
    for position in chosen:
        candidate = candidates[position]
        if position in empty:
            continue
        if mask := masks[position]:
            labels.append(candidate.to_label(position, selection, mask))
        else:
            box = ", ".join(f"{number:.0f}" for number in candidate.bbox_xyxy_px)
            tag = candidate.tag(selection)
            without_mask.append(f"{record['image_id']}: {tag!r} at [{box}], score {candidate.score:.3f}")
    labelled = {label["candidate"] for label in labels}
    # A region that is dropped leaves its mask with its candidate.
    kept = [entry if at in labelled else {**entry, **masks[at]} for at, entry in enumerate(entries)]
    status = "ok" if labels else "no_masks" if chosen else "no_boxes"
    return {**record, "labels": labels, "candidates": kept, "status": status, "reason": None}, without_mask


def _settings_beside(pad: Path) -> dict[str, Any]:
    path = pad.with_name(pad.name + SETTINGS_SUFFIX)
    if not path.is_file():
        raise ValueError(
            f"{path}: found no such file, expected the settings that `patch-aligned merge` wrote beside the PAD file"
        )
    return validated(dict[str, Any], path.read_bytes(), path)


def _refusal(source: Path, unsegmented: list[str], images: int) -> str:
    more = f"\n  and {len(unsegmented) - _SHOWN} more" if len(unsegmented) > _SHOWN else ""
    return (
        f"{source}: {len(unsegmented)} boxes of {images} images would become regions but have no mask. Nothing was "
        "written. Choose thresholds at least as high as those of the run and its nms_iou, or annotate with "
        "--segment_candidates:\n  " + "\n  ".join(unsegmented[:_SHOWN]) + more
    )
