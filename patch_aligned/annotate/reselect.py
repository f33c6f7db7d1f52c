"""`patch-aligned reselect`: other thresholds, NMS or labels for images that are annotated already, without a model.

Records keep all of the detector's candidates, but masks of those alone that became regions. So a new choice may rename
regions and leave some out. Where it adds a box that has no mask it is refused, and the boxes are named: lower
thresholds do that, a higher `nms_iou`, and a lower one where it takes away a box that had suppressed others. After
`annotate --segment_candidates` every candidate has its mask, and any choice will do. A region that is left out hands
its mask to its candidate, and so can come back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patch_aligned.annotate.folder import Record, RunFolder, merge
from patch_aligned.annotate.regions import (
    Candidate,
    CandidateError,
    CandidateThresholds,
    Selection,
    mask_fields,
    mask_of_label,
    select,
)
from patch_aligned.files import refuse_inputs, written_whole
from patch_aligned.pad import SETTINGS_SUFFIX, read_annotations, write_records

_RESELECTABLE = ("ok", "no_boxes", "no_masks")
_SHOWN = 5


@dataclass
class Counts:
    """What a choice of candidates gives.

    Attributes:
        images: those with regions.
        regions: of all images.
        tags: different ones.
    """

    images: int = 0
    regions: int = 0
    tags: set[str] = field(default_factory=set)

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts a record's labels."""
        self.images += bool(record["labels"])
        self.regions += len(record["labels"])
        self.tags.update(label["tag"] for label in record["labels"])


def reselect(
    source: Path, output: Path, changes: Mapping[str, Any], *, keep_candidates: bool = False
) -> tuple[Counts, Counts]:
    """Writes a PAD file with the labels that another selection gives.

    Args:
        source: the output folder of `patch-aligned annotate`: what `merge` would take of it is written. Or a PAD file
            that was merged with its candidates: all its records are, some perhaps without regions.
        output: a `.json`, `.jsonl`, `.json.gz`, `.jsonl.gz` or `.parquet` file. Beside it goes
            `<output>.settings.json`, the run's settings with the new `selection`.
        changes: attributes of `Selection` that differ from the run's.
        keep_candidates: so that the output can be reselected again.

    Returns:
        What the labels were, and what they are.

    Raises:
        ValueError: for thresholds below those of the candidates; or records without candidates, or boxes without a
            mask; or an output that is the source. Nothing is written then.
        AnnotationError: for a record of a PAD file that breaks the format.
    """
    if not source.exists():
        raise ValueError(f"{source}: found no such file or folder, expected a run's folder or a PAD file")
    refuse_inputs(output, [source])
    run = RunFolder(source) if source.is_dir() else None
    settings = dict(run.settings) if run else _settings_beside(source)
    if "detector" not in settings:
        raise ValueError(f"{source}: found no detector in its settings, expected candidates that a detector found")
    selection = replace(Selection(**settings["selection"]), **changes)
    selection.require_within(CandidateThresholds(**settings["detector"]["candidate_thresholds"]))
    before, after = Counts(), Counts()

    def records(old: Iterable[Record]) -> Iterator[Record]:
        unsegmented: list[str] = []
        images = 0
        for record in old:
            new, without_mask = reselected(record, selection, source)
            unsegmented += without_mask
            images += bool(without_mask)
            before.add(record)
            after.add(new)
            if not keep_candidates and run is None:  # merge sees to it itself
                del new["candidates"]
            yield new
        if unsegmented:
            raise ValueError(_refusal(source, unsegmented, images))

    if run:
        merge(run, output, keep_candidates=keep_candidates, watch=records)
    else:
        write_records(records(image.to_record() for image in read_annotations(source)), output)
    with written_whole(output.with_name(output.name + SETTINGS_SUFFIX)) as temporary:
        text = json.dumps(settings | {"selection": asdict(selection)}, indent=1, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")
    return before, after


def reselected(record: Record, selection: Selection, source: str | Path = "record") -> tuple[Record, list[str]]:
    """A record with the labels that another selection gives, and its boxes that would be labels but have no mask.

    Images that were never detected in (unreadable ones and others) stay as they are.

    Raises:
        ValueError: for a record without candidates, or broken ones.
    """
    place = f"{source}: image_id {record.get('image_id')!r}"
    if not isinstance(record.get("candidates"), list):
        raise ValueError(
            f"{place}, field 'candidates': found none, expected the detector's boxes. Give the run's folder, or a file "
            "merged with --keep_candidates"
        )
    if record.get("status") not in _RESELECTABLE:
        return dict(record), []
    try:
        candidates = [
            Candidate.from_record(entry, f"candidates[{position}]")
            for position, entry in enumerate(record["candidates"])
        ]
    except CandidateError as error:
        raise ValueError(f"{place}, {error}. Annotate the image again") from error
    masks = {position: mask_fields(entry) for position, entry in enumerate(record["candidates"])}
    for number, label in enumerate(record["labels"]):
        position = label.get("candidate")
        if type(position) is not int or position not in masks:
            raise ValueError(
                f"{place}, field 'labels[{number}].candidate': found {position!r}, expected the place of the region's "
                "box among the candidates. Give the run's folder, or the file as `patch-aligned merge` wrote it"
            )
        masks[position] = mask_of_label(label)
    empty = {position for position, mask in masks.items() if mask.get("area_px") == 0} | set(
        record.get("empty_masks", ())
    )
    chosen = select(candidates, selection, record["size"])
    labels = []
    without_mask = []
    for selected in chosen:
        if selected.position in empty:
            continue
        if mask := masks[selected.position]:
            labels.append(selected.to_label(mask))
        else:
            box = ", ".join(f"{number:.0f}" for number in selected.candidate.bbox_xyxy_px)
            without_mask.append(
                f"{record['image_id']}: {selected.tag!r} at [{box}], score {selected.candidate.score:.3f}"
            )
    labelled = {label["candidate"] for label in labels}
    entries = [  # what is no region any more hands its mask back to the candidate, so that it can be one again
        entry if position in labelled else {**entry, **masks[position]}
        for position, entry in enumerate(record["candidates"])
    ]
    status = "ok" if labels else "no_masks" if chosen else "no_boxes"
    return {**record, "labels": labels, "candidates": entries, "status": status, "reason": None}, without_mask


def _settings_beside(pad: Path) -> dict[str, Any]:
    path = pad.with_name(pad.name + SETTINGS_SUFFIX)
    if not path.is_file():
        raise ValueError(
            f"{path}: found no such file, expected the settings that `patch-aligned merge` wrote beside the PAD file"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _refusal(source: Path, unsegmented: list[str], images: int) -> str:
    more = f"\n  and {len(unsegmented) - _SHOWN} more" if len(unsegmented) > _SHOWN else ""
    return (
        f"{source}: {len(unsegmented)} boxes of {images} images would become regions but have no mask. Nothing was "
        "written. Choose thresholds at least as high as those of the run and its nms_iou, or annotate with "
        "--segment_candidates:\n  " + "\n  ".join(unsegmented[:_SHOWN]) + more
    )
