"""Tables of commands, flags and variables, read from the code when the site is built: for docs/flags.md."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"<!-- reference: (\w+) (\S+) -->")
COMMANDS = {"patch_aligned.cli": "patch-aligned", "llava.convert.cli": "llava-convert"}
VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]+):?[-=]((?:[^{}]|\{[^{}]*\})*)\}")


def filled(markdown: str) -> str:
    """Put a table in each place of a page, such as `<!-- reference: typer patch_aligned.cli -->`."""
    tables = {"typer": typer_tables, "argparse": argparse_table, "fields": fields_table, "script": script_table}
    return PLACE.sub(lambda place: tables[place[1]](place[2]), markdown)


def typer_tables(module: str) -> str:
    """Each command of a typer app, in the order of `--help`, with what it does and its options."""
    program = COMMANDS.get(module) or f"python -m {module.removesuffix('.run')}"
    sections = []
    for name, command in commands_of(program, get_command(importlib.import_module(module).app)):
        context = command.make_context(name, [], resilient_parsing=True)
        records = [option.get_help_record(context) for option in command.params if option.name != "help"]
        first_paragraph = (command.help or "").split("\n\n")[0]
        sections.append(f"### `{name}`\n\n{first_paragraph}\n\n{table(filter(None, records))}")
    return "\n".join(sections)


def commands_of(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield the commands of a group and of its groups."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, below in command.commands.items():
        yield from commands_of(f"{name} {word}", below)


def argparse_table(module: str) -> str:
    """Render the flags of a program whose module has an `argument_parser()`."""
    parser: argparse.ArgumentParser = importlib.import_module(module).argument_parser()
    return table(
        (", ".join(action.option_strings) or action.dest, (action.help or "") % {**vars(action), "prog": parser.prog}
         if action.help else said_default(action.default))
        for action in parser._actions if action.dest != "help"
    )  # fmt: skip


def fields_table(name: str) -> str:
    """Render the flags that a dataclass declares itself, without those of the class that it extends."""
    module, _, kind = name.rpartition(".")
    declared = getattr(importlib.import_module(module), kind)
    return table(
        (f"--{field.name}", f"{field.metadata.get('help', '')} {said_default(field.default)}")
        for field in dataclasses.fields(declared)
        if field.name in declared.__annotations__ and field.init
    )


def script_table(path: str) -> str:
    """Render the variables of a script: the comment that it begins with, then each default in the order of the file."""
    text = (ROOT / path).read_text(encoding="utf-8").removeprefix("#!/usr/bin/env bash\n")
    comment = "".join(re.findall(r"# ?(.*\n)", re.match(r"(#.*\n)*", text)[0]))  # type: ignore[index]
    defaults: dict[str, list[str]] = {}
    for name, default in VARIABLE.findall(text):
        if default and default not in defaults.setdefault(name, []):
            defaults[name].append(default)
    rows = table((name, f"`{'` or `'.join(values)}`") for name, values in defaults.items() if values)
    return f"```text\n{comment}```\n\n{rows}"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Render two columns, the first as code."""
    lines = [f"| `{escaped(name)}` | {escaped(text).replace('<', '&lt;')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines, ""]) if lines else ""


def escaped(text: str) -> str:
    """Keep a text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def said_default(value: Any) -> str:
    """Name a default where there is one."""
    return "" if value in (None, "", dataclasses.MISSING) else f"Default: `{value}`."
