"""A check by eye: a page that shows regions drawn at random, and takes for each whether name and mask are right."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patch_aligned.images import ImageFileError, thumbnail
from patch_aligned.intervals import wilson_interval
from patch_aligned.pad import AnnotationIndex
from patch_aligned.record_files import iter_records
from patch_aligned.web import jpeg_address, render
from patch_aligned.web.server import post, serve_page

if TYPE_CHECKING:
    from starlette.applications import Starlette

JUDGED = ("right", "wrong name", "wrong mask")
_SHOWN_SIDE = 1200


@dataclass(frozen=True)
class Answer:
    """What the page sends: the place of a region in the draw, and what is said of it; None takes the answer back."""

    number: int
    answer: Literal["right", "wrong name", "wrong mask", "skip"] | None


class SpotCheck:
    """Regions in a random order that the seed decides, and the answers, each saved before the page goes on.

    The first ones of the order are shown, so that a larger number continues a check.
    """

    def __init__(self, index: AnnotationIndex, image_folder: Path, folder: Path, count: int, seed: int) -> None:
        self.index, self.image_folder, self.seed = index, image_folder, seed
        self.order = np.random.default_rng(seed).permutation(index.regions)
        self.count, self.path, self.lock = min(count, index.regions), folder / "answers.jsonl", Lock()
        self.answers: dict[int, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:  # a line that was cut off was never confirmed
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        for line in iter_records(self.path):
            if self._line(line["number"], line["answer"]) != line:
                raise ValueError(
                    f"{self.path}: found {line}; expected answers about this file and seed. Name another folder"
                )
            self._take(line["number"], line["answer"])

    def _line(self, number: int, answer: str | None) -> dict[str, Any]:
        """What is saved: also which region it is, so that answers are never taken for those about another file."""
        image, place = self.index.find_region(self.order[number])
        region = {"image_id": image.image_id, "region": place, "tag": image.regions[place].tag}
        return {"seed": self.seed, "number": number, **region, "answer": answer}

    def _take(self, number: int, answer: str | None) -> None:
        self.answers.pop(number, None)
        if answer is not None:
            self.answers[number] = answer

    def answer(self, given: Answer) -> dict[str, Any]:
        """Save an answer, and return what the page shows next: the same region where its answer is taken back."""
        if not 0 <= given.number < self.count:
            raise ValueError(f"number: found {given.number}, expected one of the {self.count} regions that are drawn.")
        line = json.dumps(self._line(given.number, given.answer), ensure_ascii=False)
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
            self._take(given.number, given.answer)
        return self.state()

    def summary(self) -> dict[str, Any]:
        """Return counts, and the share of each judgement among those that are not skipped, with Wilson's interval."""
        counts = Counter(answer for number, answer in self.answers.items() if number < self.count)
        judged = sum(counts[name] for name in JUDGED)
        shares = {name: [counts[name] / judged, *wilson_interval(counts[name], judged)] for name in JUDGED if judged}
        return {"regions": self.count, "judged": judged, "skipped": counts["skip"], "shares": shares}

    def state(self) -> dict[str, Any]:
        """Return the summary, the region that was answered last, and the first one without an answer."""
        number = next((number for number in range(self.count) if number not in self.answers), None)
        state = {"summary": self.summary(), "number": number, "last": next(reversed(self.answers), None)}
        if number is None:
            return state
        image, place = self.index.find_region(self.order[number])
        region, shown = image.regions[place], {"picture": None, "problem": ""}
        try:
            picture = thumbnail(self.image_folder, image.image_id, image.size_wh, _SHOWN_SIDE)
            shown["picture"] = jpeg_address(picture)
        except ImageFileError as error:
            shown["problem"] = str(error)
        about = {"image_id": image.image_id, "tag": region.tag, "rle_mask": region.rle_mask, "size": image.size_wh}
        return state | about | shown


def create_app(check: SpotCheck, hosts: Sequence[str]) -> Starlette:
    """Return the page's server. Browsers may call it under the names `hosts`."""
    title = f"Spot check of {check.index.source.name}"
    page = render(__package__, "spot_check.html.j2", title=title, data={"seed": check.seed})
    routes = [post("/state", dict, lambda asked: check.state()), post("/answer", Answer, check.answer)]
    return serve_page(page, routes, hosts)
