"""Tables as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from patch_aligned.html_page import html_page
from patch_aligned.results.block import Block


def as_html(blocks: Sequence[Block]) -> str:
    """Blocks as a page: read on a phone, sideways where a table is wide, or printed."""
    return html_page("patch_aligned.results", "page", blocks[0].title, [asdict(block) for block in blocks])
