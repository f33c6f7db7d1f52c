"""Command lines (argparse for LLaVA's commands, typer for ours), their error messages, and the record of a run."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import importlib.util
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

logger = logging.getLogger(__name__)

_WRONG_INPUT = (ImportError, OSError, ValueError)


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m module` that prints the module's docstring unchanged as help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=own_version())
    return parser


def own_version() -> str:
    """Return name and version of this package."""
    with contextlib.suppress(PackageNotFoundError):
        return f"{PACKAGES[0]} {version(PACKAGES[0])}"
    return f"{PACKAGES[0]}, which is not installed"


def run_command(
    command: Callable[[Any], object], parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line and run. Wrong input ends with one sentence, Ctrl-C with none, bugs with a traceback."""
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_as_sentences():
        command(args)


def parse_known_flags(
    classes: Sequence[Any], arguments: Sequence[str] | None, prog: str | None = None, **sources: Sequence[str]
) -> argparse.Namespace:
    """Parse the flags of dataclasses in a command line that has those of a Trainer's arguments too.

    The class of the latter would import torch, so that the names of its fields are read from its source.

    Args:
        classes: the dataclasses.
        arguments: the command line; None is that of the process.
        prog: name of the command in its help.
        **sources: by package, the files of the Trainer's arguments and their base classes.

    Raises:
        ImportError: a package is not installed.
        ValueError: neither has such a flag.
    """
    from transformers import HfArgumentParser  # without torch

    known = {name for package, files in sources.items() for file in files for name in _fields_in_source(package, file)}
    names = ", ".join(f"--{name}" for name in sorted(known))
    listed = f"{_ABOUT_CONFIG} Flags of the Trainer's arguments are taken too: {names}."
    flags, others = HfArgumentParser(classes, prog=prog, allow_abbrev=False, epilog=listed).parse_known_args(arguments)
    for word in others:
        name = word.partition("=")[0].replace("-", "_").removeprefix("__")
        if word.startswith("--") and not {name, name.removeprefix("no_")} & known:
            near = difflib.get_close_matches(name, [*vars(flags), *known], 1)
            hint = f"Did you mean --{near[0]}?" if near else "All flags: --help"
            raise ValueError(f"--{name}: found no such flag of training. {hint}")
    return flags


def require_files(flags: argparse.Namespace, names: Sequence[str], hint: str = "") -> None:
    """Raise `FileNotFoundError` for the first of the named flags whose file or folder does not exist."""
    for name in names:
        if (place := getattr(flags, name, None)) is not None and not Path(place).exists():
            raise FileNotFoundError(f"--{name} {place}: found no such file or folder{hint}")


def _fields_in_source(package: str, file: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed, which training needs: pip install 'patch-aligned-llava[train]'")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the process with one sentence where input is wrong. TRACEBACK=1 in the environment shows where it arose."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (*_WRONG_INPUT, RuntimeError) as error:
        is_memory = type(error).__name__ == "OutOfMemoryError"  # torch's: this module costs no torch
        if os.environ.get("TRACEBACK") or not (is_memory or isinstance(error, _WRONG_INPUT)):
            raise
        hint = " Halve the batch size (in training PER_DEVICE_TRAIN_BATCH_SIZE), or set GPU=24g." if is_memory else ""
        sys.exit(f"error: {error}{hint}")


_ABOUT_CONFIG = "--config FILE.yaml reads flags from a file; those of the command line take precedence."


def names_config(arguments: Sequence[str]) -> bool:
    """Whether a command line names a file of flags."""
    return any(word.partition("=")[0] == "--config" for word in arguments)


def flags_with_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Replace `--config FILE.yaml` in a command line by the flags in the file, and name it in the parser's help.

    Flags of the command line take precedence. Raises `ValueError` naming the file, and the key where it is no flag.
    """
    parser.epilog = _ABOUT_CONFIG
    if not names_config(arguments):
        return list(arguments)
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config", type=Path)
    found, given = option.parse_known_args(arguments)
    where, text = f"--config {found.config}", found.config.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
        words = yaml.load(text, yaml.BaseLoader)  # `no` and 1e-3 as they stand, for the parser to read
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: found no YAML ({error})") from error
    if not isinstance(words, dict):
        raise ValueError(f"{where}: found no mapping; expected lines such as `learning_rate: 1e-3`")
    known = {action.dest for action in parser._actions} - {"help"}
    flags = []
    for name, word in words.items():
        if name not in known:
            near = " or ".join(difflib.get_close_matches(name, known)) or "one that --help lists"
            raise ValueError(f"{where}: found the key {name}, which is no flag; did you mean {near}?")
        if isinstance(value := values[name], list) and not any(isinstance(item, (list, dict)) for item in value):
            flags += [f"--{name}", *word]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, (list, dict)) else word}")
    if again := words.keys() & {word[2:].partition("=")[0] for word in given if word.startswith("--")}:
        logger.warning("%s: the command line replaces %s", where, ", ".join(sorted(again)))
    return [*flags, *given]


def typer_app(help_text: str | None = None, **settings: Any) -> typer.Typer:
    """Return an app for commands under `clear_errors`. Flags may be spelled with underscores, as LLaVA's are."""
    context_settings = {"token_normalize_func": lambda token: token.replace("_", "-"), "obj": {"debug": False}}
    return typer.Typer(
        help=help_text,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=context_settings,
        **{"add_completion": False, **settings},
    )


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(own_version())
        raise typer.Exit


def typer_app_with_debug(help_text: str) -> typer.Typer:
    """Return a `typer_app` of several commands, with an option `--debug` before them."""
    app = typer_app(help_text, no_args_is_help=True, add_completion=True)

    @app.callback()
    def options(
        context: typer.Context,
        debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
        ] = False,
    ) -> None:
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
        context.obj = {"debug": debug}

    return app


def clear_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command end with one sentence and exit code 2 if its input is wrong; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(context: typer.Context, **arguments: Any) -> Any:
        try:
            return command(context, **arguments)
        except _WRONG_INPUT as error:
            if context.obj["debug"]:
                raise
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

    return wrapped


# The record of a run, `run.json` in its output folder.

RUN_FILE = "run.json"
PACKAGES = ("patch-aligned-llava", "torch", "transformers", "tokenizers", "accelerate", "numpy", "pillow", "deepspeed",
            "peft", "bitsandbytes", "flash-attn", "lmms-eval", "ray")  # fmt: skip


class RunRecord:
    """Records what a run depends on, and the commit, versions and times of each sitting of work on it.

    Args:
        folder: output folder of the run.
        flags: by name. A value that JSON cannot hold is recorded as text.
        sha256: of what flags name, by flag: of files, of a model's folder or its config; None where it is not known.
        resumes: whether the run continues the one that the folder has a record of.
        is_writer: whether this process is the one that writes.
        **facts: further values.
    """

    def __init__(
        self,
        folder: Path,
        flags: Mapping[str, Any],
        sha256: Mapping[str, str | None],
        *,
        resumes: bool = True,
        is_writer: bool = True,
        **facts: Any,
    ) -> None:
        self.folder, self.is_writer = folder, is_writer
        run = {"flags": flags, "sha256": {name: digest for name, digest in sha256.items() if digest}, **facts}
        self.run: dict[str, Any] = json.loads(json.dumps(run, default=str))  # as it is read back
        before = read_record(folder) if resumes else {}
        changed = changed_flags(before, self.run)
        self._sitting: dict[str, Any] = {"started": _now(), "ended": None, "changed": changed}
        if is_writer:
            self._sitting |= {"commit": _commit(), "versions": _versions()}
        self._sittings = [*before.get("sittings", []), self._sitting]

    def begin(self) -> None:
        """Write the record, with a sitting that has not ended."""
        if self.is_writer:
            write_json(self.folder / RUN_FILE, {**self.run, "sittings": self._sittings})

    def end(self) -> None:
        """Write that the sitting has ended; that of a process that was killed or failed never has."""
        self._sitting["ended"] = _now()
        self.begin()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_record(folder: Path) -> dict[str, Any]:
    """Return a folder's record; empty where there is none, as in folders of earlier versions."""
    path = folder / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return both values of each flag that differs between two records: of files the content counts, not the path."""
    changed = {}
    for name, value in now["flags"].items():
        was = before.get("flags", {}).get(name, value)
        old, new = (run.get("sha256", {}).get(name) for run in (before, now))
        if old and new:
            if old != new:
                changed[name] = [f"{was} (sha256 {old[:12]})", f"{value} (sha256 {new[:12]})"]
        elif was != value and not _is_one_place(was, value):
            changed[name] = [was, value]
    return changed


def _is_one_place(one: Any, other: Any) -> bool:
    are_places = all(isinstance(path, str) and Path(path).exists() for path in (one, other))
    return are_places and Path(one).samefile(other)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _commit() -> str | None:
    """Return the checkout's commit, with `-dirty` if files differ; None without a checkout or git."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        if (root / ".git").exists():  # not where it is installed: a repository around it would be another one
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
