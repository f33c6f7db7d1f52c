"""The page: what it knows of each image is right, nothing of the data can act in it, and it draws what masks say."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.stats import TokenSettings
from patch_aligned.dataset.view import ViewSelection, write_view
from patch_aligned.pad import read_annotations
from tests.pads import rle_of
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]
TOKENS = TokenSettings(grid=4, side=64)


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_holds_images_regions_and_the_tokens_of_training(write_pad: Make, tmp_path: Path):
    pad = write_pad(record("a.png", label(16, 0, 48, 32, "sky", score=0.456, kind="x"), label(0, 0, 16, 64)))
    viewed = write_view(pad, tmp_path / "images", tmp_path / "out" / "view.html", tokens=TOKENS, thumbnail_side=48)
    assert (viewed.images, viewed.regions, viewed.without_picture, viewed.next_record) == (1, 2, 0, None)
    data = data_of(viewed.pages[0])
    entry = data["records"][0]
    assert (entry["image_id"], entry["size"], entry["caption"]) == ("a.png", [96, 64], "two words")
    grid = entry["grid"]
    assert [grid["x_edges"][0], grid["y_edges"][0], grid["x_edges"][-1], grid["y_edges"][-1]] == [
        16,
        0,
        80,
        64,
    ]  # the crop
    first = entry["regions"][0]
    assert (first["tag"], first["score"], first["extra"], first["area_percent"]) == ("sky", "0.46", "kind: x", 16.7)
    image = next(read_annotations(pad))
    for region, covered in zip(entry["regions"], TOKENS.covered(image), strict=True):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(region["tokens"]), dtype=np.uint8))
        np.testing.assert_array_equal(bits[:16].astype(bool), covered)
        assert region["tokens_covered"] == covered.sum()
    picture = Image.open(io.BytesIO(base64.b64decode(entry["picture"].removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (48, 32)


def test_a_score_that_is_no_number_is_not_shown(write_pad: Make, tmp_path: Path):
    pad = write_pad(record("a.png", label(0, 0, 9, 9, score=10**400), label(0, 0, 9, 9, score=float("nan"))))
    regions = data_of(write_view(pad, tmp_path / "images", tmp_path / "view.html").pages[0])["records"][0]["regions"]
    assert ["score" in region for region in regions] == [False, False]


def test_no_text_of_the_data_acts_in_the_page(write_pad: Make, tmp_path: Path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{script}}\u2028"
    pad = write_pad(record("a.png", label(0, 0, 9, 9, attack, phrase=attack), caption=attack))
    pad = pad.rename(tmp_path / "<img src=x>.json")
    page = write_view(pad, tmp_path / "images", tmp_path / "view.html").pages[0]
    text = page.read_text()
    assert "alert(1)</script>" not in text and "<img" not in text
    entry = data_of(page)["records"][0]
    assert entry["regions"][0]["tag"] == attack and entry["caption"] == attack
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text
    assert "default-src 'none'; img-src data:" in text
    assert not re.findall(r"(?:https?:)?//\w+\.\w+", text.replace("http://www.w3.org/2000/svg", "the name of SVG"))


def test_more_records_than_a_page_holds_make_pages_that_lead_to_each_other(write_pad: Make, tmp_path: Path):
    pad = write_pad(*(record(f"{number}.png") for number in range(8)))
    selection = ViewSelection(start=1, limit=5)
    viewed = write_view(pad, tmp_path / "images", tmp_path / "v.html", selection=selection, page_size=2)
    assert [page.name for page in viewed.pages] == ["v.html", "v-2.html", "v-3.html"]
    pages = [data_of(page) for page in viewed.pages]
    assert [[entry["record"] for entry in page["records"]] for page in pages] == [[1, 2], [3, 4], [5]]
    assert pages[1]["pages"] == ["v.html", "v-2.html", "v-3.html"] and pages[1]["page"] == 1
    assert viewed.next_record == 6


def test_records_are_chosen_by_id_and_by_tag(write_pad: Make, tmp_path: Path):
    pad = write_pad(
        record("a.png", label(0, 0, 9, 9, "Dog")), record("b.png"), record("c.png", label(0, 0, 9, 9, "hotdog"))
    )

    def shown(selection: ViewSelection) -> list[str]:
        viewed = write_view(pad, tmp_path / "images", tmp_path / "v.html", selection=selection)
        return [entry["image_id"] for entry in data_of(viewed.pages[0])["records"]]

    assert shown(ViewSelection(image_ids=frozenset({"b.png", "c.png"}))) == ["b.png", "c.png"]
    assert shown(ViewSelection(tag="dog")) == ["a.png", "c.png"]
    with pytest.raises(ValueError, match=r"no record of .*'cat'.* from record 0"):
        shown(ViewSelection(tag="cat"))
    with pytest.raises(ValueError, match="at most 5000"):
        shown(ViewSelection(limit=5001))


def test_an_image_that_cannot_be_shown_is_counted_and_says_why(write_pad: Make, tmp_path: Path):
    pad = write_pad(*(record(name) for name in ("gone.png", "broken.png", "other.png", "cut.png")))
    images = tmp_path / "images"
    (images / "gone.png").unlink()
    (images / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (10, 10)).save(images / "other.png")
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:500])
    viewed = write_view(pad, images, tmp_path / "v.html")
    assert viewed.without_picture == 4
    for entry, reason in zip(
        data_of(viewed.pages[0])["records"], ("no file", "cannot be read", "(10, 10)", "cannot be read"), strict=True
    ):
        assert entry["picture"] is None and reason in entry["problem"]


def test_the_command_says_how_to_go_on(write_pad: Make, tmp_path: Path):
    pad = write_pad(*(record(f"{number}.png") for number in range(3)))
    words = ["view", str(pad), "--image-folder", str(tmp_path / "images"), "--output", str(tmp_path / "v.html")]
    result = CliRunner().invoke(app, [*words, "--limit", "2"])
    assert result.exit_code == 0, result.output
    assert "--start 2" in result.output
    assert CliRunner().invoke(app, [*words[:-1], "v.txt"]).exit_code == 2
    elsewhere = CliRunner().invoke(app, [*words[:3], str(tmp_path), *words[4:]])
    assert elsewhere.exit_code == 2 and "right folder" in elsewhere.output
    result = CliRunner().invoke(app, [*words, "--ids", "1.png", "--ids", "nowhere.png"])
    assert result.exit_code == 0 and "Not among the chosen records: nowhere.png\n" in result.output


node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")


def in_node(expression: str, *values: Any, package: str = "patch_aligned.dataset", name: str = "view.js") -> Any:
    script = resources.files(package).joinpath(name)
    code = f"const page = require({json.dumps(str(script))}); const v = JSON.parse(process.argv[1]);"
    code += f"console.log(JSON.stringify({expression}))"
    command = [str(shutil.which("node")), "-e", code, json.dumps(values)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@node
def test_the_page_draws_masks_as_pycocotools_decodes_them():
    rng = np.random.default_rng(0)
    drawn, expected = [], []
    for share in (0.02, 0.5, 0.98, 1.0) * 20:
        height, width = map(int, rng.integers(1, 41, 2))
        mask = np.asfortranarray(rng.random((height, width)) < share, dtype=np.uint8)
        for to_height, to_width in ((height, width), (2 * height + 1, max(1, width // 2))):
            rows = ((2 * np.arange(to_height) + 1) * height) // (2 * to_height)
            cols = ((2 * np.arange(to_width) + 1) * width) // (2 * to_width)
            drawn.append((rle_of(mask), width, height, to_width, to_height))
            expected.append(mask[np.ix_(rows, cols)].ravel().tolist())
    draw = "v.map(([rle, w, h, W, H]) => [...page.rasterise(page.runLengths(rle), w, h, W, H)])"
    assert in_node(draw, *drawn, package="patch_aligned.web", name="masks.js") == expected


@node
def test_the_page_reads_tokens_as_they_were_packed():
    covered = np.random.default_rng(0).random(577) < 0.3
    packed = base64.b64encode(np.packbits(covered).tobytes()).decode()
    assert in_node("page.tokensOf(v[0])", packed) == np.flatnonzero(covered).tolist()
