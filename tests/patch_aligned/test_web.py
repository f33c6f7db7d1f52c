"""Pages of one file: what they may load and run, and that text stays text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patch_aligned
from patch_aligned.web import render
from tests.pads import rle_of

PAGES = [
    ("patch_aligned.dataset", "view.html.j2", ""),
    ("patch_aligned.analysis", "token_map.html.j2", ""),
    ("patch_aligned.explore", "explore.html.j2", "; connect-src 'self'"),
]


@pytest.mark.parametrize(("package", "template", "more_sources"), PAGES)
def test_each_page_holds_its_data_once_and_text_stays_text(package: str, template: str, more_sources: str):
    document = {"text": "</script>{{ script }}{% raw %}<!--", "b": 1, "a": None}
    page = render(package, template, title="a <b> & {{ data }}", data=document)
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert json.loads(data) == document
    assert list(json.loads(data)) == list(document)
    assert not set("<>&'") & set(data)
    assert "<title>a &lt;b&gt; &amp; {{ data }}</title>" in page
    assert page.startswith("<!doctype html>") and page.endswith("</body>\n</html>\n")
    assert page.count("<body>") == page.count("<noscript>") == 1
    policy = re.findall(r'content="(default-src [^"]*)"', page)
    sources = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert policy == [sources + more_sources]
    assert "--ink: #1f2328" in page  # the palette that all pages share


def test_a_page_without_a_script_may_run_none(tmp_path: Path):
    page = render("patch_aligned.web", "page.html.j2", title="a page")
    policy = re.findall(r'content="(default-src [^"]*)"', page)
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'none'"]
    assert "<script" not in page


def test_data_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        render("patch_aligned.dataset", "view.html.j2", title="", data=[float("nan")])


@pytest.mark.parametrize(
    "style", sorted(Path(patch_aligned.__file__).parent.rglob("*.css")), ids=lambda path: path.name
)
def test_every_block_of_a_style_is_closed(style: Path) -> None:
    text = style.read_text()
    depths = list(itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in text))
    assert depths[-1] == 0 and min(depths) == 0
    # An open block would swallow the rules for paper: they stand at the top.
    assert all(depths[match.start() - 1] == 0 for match in re.finditer("@media print", text) if match.start())


node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")


def in_node(script: str, expression: str) -> Any:
    """The value of an expression of JavaScript in which `page` is a script of `patch_aligned.web`."""
    path = str(resources.files("patch_aligned.web").joinpath(script))
    code = f"const page = require({json.dumps(path)}); console.log(JSON.stringify({expression}))"
    return json.loads(subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout)


GRID = {"x_edges": [-5, 10, 30], "y_edges": [0, 4, 8, 12]}
"""3 rows, 2 columns; cells reach beyond the left edge of the image."""


@node
def test_cells_are_found_by_a_point_of_the_image():
    found = in_node(
        "grid.js",
        f"""((grid) => ({{
      boxes: [0, 1, 2, 3, 4, 5].map((cell) => page.cellBox(grid, cell)),
      found: [[-5, 0], [9.9, 3.9], [10, 4], [29, 11], [30, 4], [0, 12], [-6, 1]].map((at) => page.cellAt(grid, at)),
      around: page.boxAround([25, 20], grid),
    }}))({json.dumps(GRID)})""",
    )
    assert found["found"] == [0, 0, 3, 5, None, None, None]
    assert found["boxes"][3] == {"x": 10, "y": 4, "width": 20, "height": 4}
    assert found["around"] == {"x": -5, "y": 0, "width": 35, "height": 20}


@node
def test_arrow_keys_lead_from_cell_to_cell_and_stay_in_the_grid():
    calls = [(None, "ArrowDown"), ([0, 1], "ArrowDown"), ([0, 1], "ArrowRight"), ([0, 1], "ArrowUp"), ([0, 1], "a")]
    moves = "".join(
        f"page.pointAfterKey({json.dumps(GRID)}, {json.dumps(at)}, {json.dumps(key)})," for at, key in calls
    )
    assert in_node("grid.js", f"[{moves}]") == [[2.5, 2], [2.5, 6], [17.5, 2], [0, 1], None]


@node
def test_the_outline_of_cells_has_the_sides_that_they_do_not_share():
    sides = {"M-5 0h15", "M10 0h20", "M-5 0v4", "M30 0v4", "M-5 4h15", "M10 8h20", "M10 4v4", "M30 4v4"}
    drawn = in_node("grid.js", f"page.outlineOf({json.dumps(GRID)}, [0, 1, 3])")
    assert set(re.findall(r"M[^M]+", drawn)) == sides


@node
def test_a_mask_is_drawn_as_its_pixels():
    mask = np.asfortranarray(np.random.default_rng(1).random((7, 5)) < 0.6, dtype=np.uint8)
    rle_mask = rle_of(mask)
    path = in_node("masks.js", f"page.pathOfMask(page.runLengths({json.dumps(rle_mask)}), 7)")
    drawn = np.zeros_like(mask)
    for x, y, length in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path):
        drawn[int(y) : int(y) + int(length), int(x)] += 1
    np.testing.assert_array_equal(drawn, mask)
