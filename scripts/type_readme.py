"""Prints the bash blocks of documents as one script that types them in order, as a reader would. `nightly.sh` runs it.

    python scripts/type_readme.py README.md docs/guide.md

An HTML comment right above a block may name, by regular expressions, which of its commands are only printed
(`DRY_RUN=1`) or not typed at all, with the reason: `<!-- typed: dry "^bash" | not "fetch": needs a network -->`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- typed: (?P<marker>[^\n]*) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
TYPED, DRY, NOT = "typed", "dry", "not"


def commands(readme: str) -> Iterator[tuple[str, str]]:
    """How each command is typed, and the command; of several rules that match, the last counts."""
    for block in BLOCK.finditer(readme):
        rules = re.findall(r'(dry|not) "([^"]*)"', block["marker"] or "")
        for command in block["text"].replace("\\\n", " ").splitlines():
            ways = [way for way, pattern in rules if re.search(pattern, command)]
            yield (ways or [TYPED])[-1], re.sub(r"  +", " ", command)


def script(readme: str) -> str:
    """The whole as bash, which ends at the first command that fails."""
    lines = ["set -e"]
    for way, command in commands(readme):
        lines.append(f"printf '%s: %s\\n' {shlex.quote(way)} {shlex.quote(command)}")
        if way == DRY:
            lines.append(f"( export DRY_RUN=1; {command}\n)")
        elif way == TYPED:
            lines.append(f"{command}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    print(script("\n".join(Path(path).read_text(encoding="utf-8") for path in sys.argv[1:])))
