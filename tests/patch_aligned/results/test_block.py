"""Tables as text: Markdown that reads aligned, LaTeX that compiles, a page that loads nothing."""

from __future__ import annotations

import re

import pytest

from patch_aligned.results.render import Block, Cell, Row, as_html, as_latex, as_markdown, latex_text

BLOCK = Block(
    "Table 5: R&D, 100%",
    "Model",
    (("RefCOCO", "val"), ("RefCOCO", "test-A"), ("", "GQA")),
    (
        Row("paper_1", (Cell("56.22"), Cell("64.43"), Cell()), "Old | new"),
        Row("ours", (Cell("1.00", "0.50", "†"), Cell(), Cell("2")), "Old | new"),
    ),
    ("prompt “<image> a_b”.",),
)


CELL = r'<t[hd](?: scope="\w+"| class="\w+")?(?: colspan="(\d)")?>(.*?)</t[hd]>'


def test_markdown_is_aligned_and_escaped() -> None:
    assert as_markdown([BLOCK]) == (
        "## Table 5: R&D, 100%\n\n"
        "| Model        |  RefCOCO val | RefCOCO test-A | GQA |\n"
        "| :----------- | -----------: | -------------: | --: |\n"
        "| *Old \\| new* |              |                |     |\n"
        "| paper_1      |        56.22 |          64.43 |   – |\n"
        "| ours         | 1.00 ±0.50 † |              – |   2 |\n\n"
        "- prompt “\\<image> a_b”.\n"
    )


def test_latex_has_groups_rules_and_notes() -> None:
    lines = as_latex([BLOCK]).splitlines()
    assert r"\begin{tabular}{lrrr}" in lines
    assert r" & \multicolumn{2}{c}{RefCOCO} & \multicolumn{1}{c}{} \\" in lines
    assert r"\cmidrule(lr){2-3}" in lines
    assert r"\multicolumn{4}{l}{\textit{Old \textbar{} new}} \\" in lines
    assert r"paper\_1 & 56.22 & 64.43 & -- \\" in lines
    assert r"ours & 1.00 {\scriptsize$\pm$0.50} $\dagger$ & -- & 2 \\" in lines
    assert r"\caption{Table 5: R\&D, 100\%}" in lines
    assert r"prompt ``\textless{}image\textgreater{} a\_b''.\par" in lines


def test_latex_is_balanced_and_holds_no_bare_special_character() -> None:
    text = as_latex([BLOCK])
    commands = re.sub(r"\\[\\{}$&%#_]|\\[A-Za-z]+|^%.*$|\$\\?[a-z-]*\$", "", text, flags=re.MULTILINE)
    assert not re.search(r"[\\%#_^~$]", commands)
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5% #1 $x^2~", r"a\_b \& 5\% \#1 \$x\textasciicircum{}2\textasciitilde{}"),
        ("{\\x}", r"\{\textbackslash{}x\}"),
        ("Ä → – ± † “q” \"q\" …", r"Ä $\to$ -- $\pm$ $\dagger$ ``q'' ''q'' \ldots{}"),
        ("<图 1>\n x\0", r"\textless{}{[}U+56FE] 1\textgreater{} x{[}U+0000]"),
        ("-0.50 to -2, test-5", "$-$0.50 to $-$2, test-5"),
        ("[0, 1] *x* cut by --limit ---", r"{[}0, 1] {*}x{*} cut by -{}-limit -{}-{}-"),
    ],
)  # fmt: skip
def test_text_for_latex(text: str, expected: str) -> None:
    assert latex_text(text) == expected


def test_a_row_needs_a_cell_a_column() -> None:
    with pytest.raises(ValueError, match="row 'x': 1 cells, expected 2"):
        Block("t", "c", (("", "a"), ("", "b")), (Row("x", (Cell(),)),))


def test_the_page_loads_nothing_and_no_text_escapes_into_it() -> None:
    attack = "</script><img src=x>"
    page = as_html([Block(attack, attack, (("", attack),), (Row(attack, (Cell(attack),)),), (attack,))])
    assert attack not in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?\w+:|@import|url\(", page)
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "@media print" in page


def test_the_page_shows_the_table() -> None:
    page = as_html([BLOCK])
    rows = [
        [(re.sub("<.*?>", "", text), int(span or 1)) for span, text in re.findall(CELL, row, re.DOTALL)]
        for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)
    ]
    assert rows == [
        [("", 1), ("RefCOCO", 2), ("", 1)],
        [("Model", 1), ("val", 1), ("test-A", 1), ("GQA", 1)],
        [("Old | new", 4)],
        [("paper_1", 1), ("56.22", 1), ("64.43", 1), ("–", 1)],
        [("ours", 1), ("1.00 ±0.50 †", 1), ("–", 1), ("2", 1)],
    ]
    assert "<li>prompt “&lt;image&gt; a_b”.</li>" in page
