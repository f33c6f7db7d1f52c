"""Pages of one file: what they may load and run, and that text stays text."""

from __future__ import annotations

import json
import re

import pytest

from patch_aligned.html_page import html_page, static_page

STEMS = [("patch_aligned.dataset", "view"), ("patch_aligned.analysis", "token_map"), ("patch_aligned.results", "page")]


def test_a_page_without_a_script_may_run_none():
    page = static_page("patch_aligned.analysis", "report", "a <b>", "<p>{{title}}</p>")
    policy = re.findall(r'content="(default-src [^"]*)"', page)
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'none'"]
    assert "<script" not in page
    assert "<title>a &lt;b&gt;</title>" in page
    assert "<p>{{title}}</p>" in page  # the body's own text is no place to fill


@pytest.mark.parametrize(("package", "stem"), STEMS)
def test_each_page_holds_its_data_once_and_leaves_no_place_open(package: str, stem: str):
    document = {"text": "</script>{{script}}{{nothing}}"}
    page = html_page(package, stem, "title", document)
    data = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert [json.loads(text) for text in data] == [document]
    assert set(re.findall(r"\{\{\w+\}\}", page.replace(data[0], ""))) == set()
    assert page.startswith("<!doctype html>") and page.endswith("</body>\n</html>\n")
    assert page.count("<body>") == page.count("<noscript>") == 1
