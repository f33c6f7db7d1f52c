"""Hooks of mkdocs.yml: README is the first page, links out of docs/ show paths, flags come from the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `eval` and this folder are not installed; undone when the hooks are loaded

from scripts.docs_reference import filled  # noqa: E402

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Let pages import `eval`, as the line above does for this file."""
    sys.path.insert(0, str(ROOT))


def on_files(files: Any, config: Any) -> Any:
    """Add README as `index.md`, with its paths as seen from docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    seen_from_docs = re.sub(r"\]\((?!\w+:|#)([^)]+)\)", lambda link: f"](../{link[1]})".replace("../docs/", ""), readme)
    files.append(File.generated(config, "index.md", content=seen_from_docs))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links to files that are no page of the site by their text and path."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target == ROOT / "README.md":
            return f"[{link[1]}]({Path(*['..'] * (len(Path(page.file.src_uri).parts) - 1), 'index.md')})"
        if target.is_relative_to(config.docs_dir):
            return link[0]
        path = target.relative_to(ROOT)
        return link[1] if str(path) in link[1] else f"{link[1]} (`{path}`)"

    return filled(LINK.sub(shown, markdown))
