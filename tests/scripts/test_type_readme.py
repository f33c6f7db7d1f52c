"""README's commands as they are typed by `scripts/nightly.sh readme`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from scripts import type_readme

ROOT = Path(__file__).parents[2]
README = """
```bash
echo one \\
    two
```
<!-- typed: dry "^bash": data | not "far": network -->
```bash
bash -c 'echo "dry: $DRY_RUN"'   # printed
echo far away
echo near "$DRY_RUN."
```
```python
no bash
```
"""


def test_commands_are_typed_printed_or_left_out_as_marked() -> None:
    script = type_readme.script(README)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    ran = [line for line in done.stdout.splitlines() if not line.startswith(("typed: ", "dry: bash", "not: "))]
    assert ran == ["one two", "dry: 1", "near ."]
    assert "not: echo far away" in done.stdout
    failing = type_readme.script("```bash\nfalse\necho after\n```\n")
    assert (
        "after\n"
        not in subprocess.run(["bash", "-c", failing], capture_output=True, text=True).stdout.split("typed")[-1]
    )


def test_readme_is_valid_bash_and_types_what_needs_nothing() -> None:
    readme = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/guide.md"))
    subprocess.run(["bash", "-n", "-c", type_readme.script(readme)], check=True)
    ways = list(type_readme.commands(readme))
    assert len({way for way, _ in ways}) == 3
    assert all(way == type_readme.TYPED for way, command in ways if "mini" in command)
    named = {name for _, command in ways for name in re.findall(r"checkpoints/llava-mini[-\w]*", command)}
    family = "checkpoints/llava-mini-patchaligned"  # both are made by one of the commands
    assert named == {family, f"{family}-pretrain"}
