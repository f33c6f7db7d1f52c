"""A check by eye: a page that shows regions drawn at random, and takes for each whether its name and mask are right."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from patch_aligned.files import validated
from patch_aligned.images import ImageFileError, thumbnail
from patch_aligned.intervals import wilson_interval
from patch_aligned.pad import AnnotationIndex
from patch_aligned.record_files import iter_records
from patch_aligned.web import jpeg_address, post, render, serve_page

if TYPE_CHECKING:
    from starlette.applications import Starlette

JUDGEMENTS = ("right", "wrong name", "wrong mask")
_SHOWN_SIDE = 1200
Judgement = Literal["right", "wrong name", "wrong mask", "skip"]


class SpotCheck:
    """Regions in a random order that the seed decides, of which the first `count` are shown, and the answers.

    Each answer is on disk before the next region is shown. A larger `count` continues a check.
    """

    def __init__(self, index: AnnotationIndex, image_folder: Path, folder: Path, count: int, seed: int) -> None:
        if index.rejected:
            raise ValueError(index.rejection_message())
        self.index, self.image_folder, self.seed = index, image_folder, seed
        self.order = np.random.default_rng(seed).permutation(index.regions)
        self.count, self.path, self._lock = min(count, index.regions), folder / "answers.jsonl", Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._open().close()
        self.lines: list[dict[str, Any]] = list(iter_records(self.path))
        for line in self.lines:
            try:
                known = self._line(line["number"], line["answer"])
            except (IndexError, KeyError, TypeError):
                known = {}
            if line != known:
                message = f"found {line!r:.200}; expected answers about this PAD file and seed. Name another folder."
                raise ValueError(f"{self.path}: {message}")

    def _open(self) -> IO[bytes]:
        """Open the file for another line, without one that was cut off: its answer was never confirmed."""
        file = self.path.open("ab+")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        return file

    def _line(self, number: int, answer: Judgement | None) -> dict[str, Any]:
        """What is saved: also which region it is, so that answers about another file are never taken for these."""
        image, place = self.index.find_region(self.order[number])
        region = {"image_id": image.image_id, "region": place, "tag": image.regions[place].tag}
        return {"seed": self.seed, "number": number, **region, "answer": answer}

    def answer(self, number: int, answer: Judgement | None) -> dict[str, Any]:
        """Save an answer, None to take it back; return what the page shows next: the same region in that case."""
        if not 0 <= number < self.count:
            raise ValueError(f"number: found {number}, expected one of the {self.count} regions that are drawn.")
        line = self._line(number, answer)
        with self._lock, self._open() as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.lines.append(line)
        return self.state()

    def state(self) -> dict[str, Any]:
        """Return counts, the share of each judgement with Wilson's interval, and the first region without an answer."""
        answers: dict[int, str] = {}
        for line in self.lines:
            answers.pop(line["number"], None)  # the last answer is the last one here too
            if line["answer"] is not None and line["number"] < self.count:
                answers[line["number"]] = line["answer"]
        counts = Counter(answers.values())
        judged = sum(counts[name] for name in JUDGEMENTS)
        shares = {
            name: [counts[name] / judged, *wilson_interval(counts[name], judged)] for name in JUDGEMENTS if judged
        }
        number = next((number for number in range(self.count) if number not in answers), None)
        state = {"regions": self.count, "judged": judged, "skipped": counts["skip"], "shares": shares}
        state |= {"number": number, "last": next(reversed(answers), None), "picture": None, "problem": ""}
        if number is None:
            return state
        image, place = self.index.find_region(self.order[number])
        try:
            state["picture"] = jpeg_address(thumbnail(self.image_folder, image.image_id, image.size_wh, _SHOWN_SIDE))
        except ImageFileError as error:
            state["problem"] = str(error)
        return state | self._line(number, None) | {"size": image.size_wh, "rle_mask": image.regions[place].rle_mask}


def create_app(check: SpotCheck) -> Starlette:
    """Return the server of the page."""
    title = f"Spot check of {check.index.source.name}"
    page = render(__package__, "spot_check.html.j2", title=title, data={"seed": check.seed})
    routes = [
        post("/state", lambda content: check.state()),
        post("/answer", lambda content: check.answer(*validated(tuple[int, Judgement | None], content, "request"))),
    ]
    return serve_page(page, routes, ("127.0.0.1", "localhost"))
