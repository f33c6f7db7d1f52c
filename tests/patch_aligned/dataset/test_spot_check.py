"""The page of the spot check, in a real browser: keys, undo, intervals, and answers that survive whatever ends it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.spot_check import SpotCheck, create_app
from patch_aligned.intervals import wilson_interval
from patch_aligned.masks import rle_of_mask
from patch_aligned.pad import open_annotation_index
from patch_aligned.web import listen
from tests.patch_aligned.browser import CHROMIUM, Page
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]
SCRIPTS = (("patch_aligned.web", "masks.js"), ("patch_aligned.dataset", "spot_check.js"))
SHOWN = "#answers button, #tools button, #picture svg, #question"
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which drives the page")


@pytest.fixture(autouse=True)
def needs_the_extra() -> None:
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason="extra `explore`")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    opened = Page(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def pad(write_pad: Make) -> Path:
    """Twelve regions in four images, of one, two, three and six."""
    images = [
        [label(8 * n, 8 * image, 8 * n + 30, 8 * image + 20, f"thing {image} {n}") for n in range(count)]
        for image, count in enumerate((1, 2, 3, 6))
    ]
    return write_pad(*(record(f"{n}.png", *labels) for n, labels in enumerate(images)))


@pytest.fixture
def check(pad: Path, tmp_path: Path) -> Make:
    """Begins the check, or continues it, as the command does."""

    def begin(count: int = 12, seed: int = 0, file: Path = pad) -> SpotCheck:
        index = open_annotation_index(file, tmp_path / "cache")
        return SpotCheck(index, tmp_path / "images", tmp_path / "answers", count, seed)

    return begin


@contextmanager
def served(check: SpotCheck) -> Iterator[str]:
    """The address of the page while it is served, as by the command."""
    import uvicorn

    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(check), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def saved(check: SpotCheck) -> list[tuple[int, str | None]]:
    lines = map(json.loads, check.path.read_text().splitlines())
    return [(line["number"], line["answer"]) for line in lines]


def progress(page: Page, text: str) -> None:
    page.until(f"document.getElementById('progress').textContent === {text!r}")


@browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_keys_judge_undo_and_resume_where_the_page_was(check: Make, page: Page, width: int, height: int):
    started = check()
    tags = [started._line(number, None)["tag"] for number in range(12)]
    with served(started) as address:
        page.open(address, width, height)
        progress(page, "0 of 12")
        assert page.run("document.getElementById('question').textContent") == tags[0]
        for place, (key, seen) in enumerate(
            (
                ("r", "1 of 12"),
                ("n", "2 of 12"),
                ("m", "3 of 12"),
                ("s", "4 of 12, 1 skipped"),
                ("r", "5 of 12, 1 skipped"),
            )
        ):
            page.press(key)
            progress(page, seen)
            assert page.run("document.getElementById('question').textContent") == tags[place + 1]
        page.press("u")
        progress(page, "4 of 12, 1 skipped")
        page.press("x")  # means nothing
        page.press("n")
        progress(page, "5 of 12, 1 skipped")
        answers = [
            (0, "right"),
            (1, "wrong name"),
            (2, "wrong mask"),
            (3, "skip"),
            (4, "right"),
            (4, None),
            (4, "wrong name"),
        ]
        assert saved(started) == answers
        page.open(address, width, height)  # a reload
        progress(page, "5 of 12, 1 skipped")
        shares = dict(
            page.run(
                "[...document.querySelectorAll('#shares tr')].map((row) => [...row.children].map((c) => c.textContent))"
            )
        )
        for name, hits in {"right": 1, "wrong name": 2, "wrong mask": 1}.items():
            low, high = wilson_interval(hits, 4)
            assert shares[name] == f"{100 * hits / 4:.1f}% ({100 * low:.1f}% … {100 * high:.1f}%)"
    with served(check()) as address:  # the command once more
        page.open(address, width, height)
        progress(page, "5 of 12, 1 skipped")
        page.press("u")
        progress(page, "4 of 12, 1 skipped")
        assert page.run("document.getElementById('question').textContent") == tags[4]
        assert saved(started) == [*answers, (4, None)]


@browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_everything_is_in_view_and_buttons_work(check: Make, page: Page, width: int, height: int):
    started = check(count=2)
    with served(started) as address:
        page.open(address, width, height)
        progress(page, "0 of 2")
        page.until("document.querySelector('#picture image') && document.querySelector('.outline').getAttribute('d')")
        assert page.run("document.documentElement.scrollWidth") == width
        edges = f"[...document.querySelectorAll({SHOWN!r})].map((one) => one.getBoundingClientRect().toJSON())"
        boxes = page.run(edges)
        assert len(boxes) == 9
        for box in boxes:
            assert box["left"] >= 0 and box["right"] <= width and box["top"] >= 0 and box["bottom"] <= height
            assert box["height"] >= 24
        page.click("#tools button:nth-child(2)")
        page.until("getComputedStyle(document.querySelector('.outline')).display === 'none'")
        page.press("h")
        page.until("getComputedStyle(document.querySelector('.outline')).display !== 'none'")
        page.press("z")  # the region's own box, whatever its size in the picture
        page.until("document.querySelector('#picture svg').getAttribute('viewBox') !== '0 0 96 64'")
        x, y, wide, high = map(
            float, page.run("document.querySelector('#picture svg').getAttribute('viewBox')").split()
        )
        region = started.index.find_region(started.order[0])
        left, top, right, bottom = region[0].regions[region[1]].bbox_xyxy_px
        margin = 0.4 * max(right - left, bottom - top)
        assert (x, y, x + wide, y + high) == pytest.approx(
            (left - margin, top - margin, right + margin, bottom + margin)
        )
        page.click("#tools button:nth-child(3)")
        page.until("document.querySelector('#picture svg').getAttribute('viewBox') === '0 0 96 64'")
        page.click("#answers button:nth-child(2)")
        progress(page, "1 of 2")
        page.click("#answers button:nth-child(4)")
        progress(page, "2 of 2, 1 skipped")
        assert page.run("document.querySelector('#answers button').disabled && !document.querySelector('#picture svg')")
        page.press("r")  # nothing is left to judge
        page.click("#tools button")
        progress(page, "1 of 2")
        assert saved(started) == [(0, "wrong name"), (1, "skip"), (1, None)]


@browser
def test_an_answer_that_could_not_be_saved_does_not_count_and_is_said(
    check: Make, page: Page, monkeypatch: pytest.MonkeyPatch
):
    started = check()
    with served(started) as address:
        page.open(address, 800, 800)
        progress(page, "0 of 12")
        with monkeypatch.context() as broken:
            broken.setattr(
                "patch_aligned.dataset.spot_check.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space"))
            )
            page.press("r")
            page.until("document.getElementById('status').textContent.includes('No space')")
        progress(page, "0 of 12")
        page.press("n")
        progress(page, "1 of 12")
        assert started.state()["shares"]["wrong name"][0] == 1


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_box_that_is_zoomed_on_is_the_mask_s():
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 12, 2)) < share for share in rng.choice([0.02, 0.1, 0.5, 1.0], 200)]
    masks = [mask for mask in masks if mask.any()]
    files = [str(resources.files(package).joinpath(name)) for package, name in SCRIPTS]
    code = f"""const {{ runLengths }} = require({files[0]!r}), {{ boxOfMask }} = require({files[1]!r});
    const masks = JSON.parse(process.argv[1]);
    console.log(JSON.stringify(masks.map(([rle, height]) => boxOfMask(runLengths(rle), height))))"""
    given = json.dumps([[rle_of_mask(mask), len(mask)] for mask in masks])
    found = json.loads(subprocess.run(["node", "-e", code, given], capture_output=True, text=True, check=True).stdout)
    for mask, box in zip(masks, found, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_a_line_that_was_cut_off_is_dropped_and_the_next_is_whole(check: Make):
    started = check()
    started.answer(0, "right")
    whole = started.path.read_bytes()
    for cut in (1, 20, len(whole) - 1):
        started.path.write_bytes(whole + whole[:cut])
        again = check()
        assert again.state()["number"] == 1
        again.answer(1, "skip")
        assert saved(again) == [(0, "right"), (1, "skip")]


def test_each_region_is_drawn_once_by_the_seed_and_more_of_them_continue_a_check(check: Make, tmp_path: Path):
    started = check()
    drawn = [tuple(started._line(number, None)[key] for key in ("image_id", "region")) for number in range(12)]
    every = [(f"{image}.png", place) for image, count in enumerate((1, 2, 3, 6)) for place in range(count)]
    assert sorted(drawn) == every and drawn != every
    few = check(count=3)
    for number in range(3):
        few.answer(number, "right")
    assert few.state()["number"] is None
    more = check(count=5).state()
    assert (more["regions"], more["judged"], more["number"]) == (5, 3, 3)
    assert check(count=2).state()["judged"] == 2
    few.path.unlink()
    drawn_first = [SpotCheck(few.index, tmp_path, tmp_path / "answers", 1, seed).order[0] for seed in range(400)]
    counts = np.bincount(drawn_first, minlength=12)
    assert ((counts - 400 / 12) ** 2 / (400 / 12)).sum() < 31.3  # chi-squared, 11 degrees of freedom, one in a thousand


def test_answers_about_another_file_or_seed_are_refused(check: Make, pad: Path, tmp_path: Path):
    check().answer(0, "right")
    with pytest.raises(ValueError, match=r"answers\.jsonl.*seed"):
        check(seed=1)
    records = json.loads(pad.read_text())
    for changed in (records[:1], [one | {"image_id": f"x{one['image_id']}"} for one in records]):
        other = tmp_path / "other.json"
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"answers\.jsonl"):
            check(file=other)
    path = tmp_path / "answers" / "answers.jsonl"
    path.write_text('{"number": "0"}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl"):
        check()


def test_only_the_page_may_ask(check: Make):
    from starlette.testclient import TestClient

    started = check()
    address = "http://127.0.0.1:8301"
    client = TestClient(create_app(started), address, headers={"Origin": address})
    for headers in (
        {"Origin": "http://elsewhere.example"},
        {"Host": "elsewhere.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert client.post("/answer", json=[0, "right"], headers=headers).status_code in (400, 403)
        assert "rle_mask" not in client.post("/state", json={}, headers=headers).text
    for wrong in ([0, "maybe"], [12, "right"], [-1, "right"], ["0", "right"], {"number": 0}, [0]):
        assert client.post("/answer", json=wrong).status_code == 400, wrong
    assert not saved(started)
    page = client.get("/")
    assert "connect-src 'self'" in page.text and page.headers["cross-origin-resource-policy"] == "same-origin"


def test_an_image_that_is_not_there_may_be_skipped(check: Make, tmp_path: Path):
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    state = check().state()
    assert state["picture"] is None and "no file" in state["problem"]
    assert check().answer(0, "skip")["number"] == 1


def test_the_command_serves_the_page_and_says_where(pad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(tmp_path / "cache"))
    found: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: found.append((server.config.app, sockets[0])))
    words = ["quality", str(pad), "--spot-check", str(tmp_path / "answers"), "--count", "5", "--port", "0"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    ((_, listener),) = found
    assert f"http://127.0.0.1:{listener.getsockname()[1]}/" in result.output and "5 regions" in result.output
    assert listener.getsockname()[0] == "127.0.0.1"
