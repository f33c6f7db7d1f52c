"""A table as Markdown, HTML and text."""

from __future__ import annotations

from rich.console import Console

from patch_aligned.tables import Cell, Table, number

TABLE = Table("<b>", ("a", "b_c"), [[Cell("x|y"), Cell("1", "0 … 2")], [Cell("<script>", "<script>")]])


def test_numbers_are_plain_and_undefined_ones_a_dash():
    assert [number(value) for value in (float("nan"), -0.0001, -1.5, 0.1234)] == ["–", "0.000", "−1.500", "0.123"]


def test_markdown_has_asides_in_brackets_and_escapes_bars():
    assert TABLE.markdown().splitlines()[:3] == ["| a | b_c |", "|---|--:|", "| x\\|y | 1 (0 … 2) |"]


def test_html_is_a_box_that_scrolls_whose_text_stays_text():
    html = TABLE.html("wide")
    assert html.startswith('<div class="scroll wide" role="region" tabindex="0" aria-label="&lt;b&gt;"><table>')
    assert '<tr><th scope="row">x|y</th><td>1<small>0 … 2</small></td></tr>' in html
    assert "<script" not in html
    assert '<th scope="col">b_<wbr>c</th>' in html


def test_the_terminal_shows_asides_on_a_line_of_their_own():
    console = Console(width=80, record=True)
    console.print(Table("t", ("a", "b"), [[Cell("x"), Cell("1", "0 … 2")]]).text())
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [["t"], ["a", "b"], ["x", "1"], ["0…2"]]


def test_text_columns_are_on_the_left_and_brackets_are_no_markup():
    table = Table("t", ("a", "b", "c"), [[Cell("[/bold]"), Cell("[red]x"), Cell("1")]], text_columns=2)
    assert table.markdown().splitlines()[1] == "|---|---|--:|"
    console = Console(width=80, record=True)
    console.print(table.text())
    assert "[/bold]" in (text := console.export_text()) and "[red]x" in text
