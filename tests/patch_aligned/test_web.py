"""Pages of one file: what they may load and run, and that text stays text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

import patch_aligned
from patch_aligned.web import render

PAGES = [
    ("patch_aligned.dataset", "view.html.j2"),
    ("patch_aligned.analysis", "token_map.html.j2"),
]


@pytest.mark.parametrize(("package", "template"), PAGES)
def test_each_page_holds_its_data_once_and_text_stays_text(package: str, template: str):
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
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
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


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_cells_are_found_by_a_point_of_the_image():
    script = str(resources.files("patch_aligned.web").joinpath("grid.js"))
    grid = {"x_edges": [-5, 10, 30], "y_edges": [0, 4, 8, 12]}  # 3 rows, 2 columns; cells reach beyond the left edge
    code = f"""const page = require({json.dumps(script)}), grid = {json.dumps(grid)};
    console.log(JSON.stringify({{
      boxes: [0, 1, 2, 3, 4, 5].map((cell) => page.cellBox(grid, cell)),
      found: [[-5, 0], [9.9, 3.9], [10, 4], [29, 11], [30, 4], [0, 12], [-6, 1]].map((at) => page.cellAt(grid, at)),
      around: page.boxAround([25, 20], grid),
    }}))"""
    found = json.loads(subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout)
    assert found["found"] == [0, 0, 3, 5, None, None, None]
    assert found["boxes"][3] == {"x": 10, "y": 4, "width": 20, "height": 4}
    assert found["around"] == {"x": -5, "y": 0, "width": 35, "height": 20}
