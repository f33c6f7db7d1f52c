"""Logging, hashes and file permissions. LLaVA's names are kept."""

from __future__ import annotations

import hashlib
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava.constants import LOGDIR


def rank0_print(*args: Any) -> None:
    """Logs its arguments, separated by spaces, on the first process of each machine."""
    if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
        logging.getLogger("llava").info("%s", " ".join(str(argument) for argument in args))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_package(package: str, needed_by: str) -> None:
    """Raise `ImportError` if a package of the extra `train` is not installed."""
    if find_spec(package) is None:
        raise ImportError(f"{needed_by} needs the package {package}. Install it with: pip install -e '.[train]'")


def follow_umask(folder: Path) -> None:
    """Give safetensors files the permissions of other new files: the library lets their owner alone read them."""
    probe = folder / f".{os.getpid()}.umask"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def disable_torch_init() -> None:
    """Does nothing: loading skips initialisation by itself today.

    Upstream's version disabled the initialisation of linear and normalisation layers for the rest of the process, so
    that layers built later, such as a projector, kept whatever was in memory.
    """


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger that also writes to `logger_filename` in `LOGDIR`; standard output is left alone."""
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    path = Path(LOGDIR) / logger_filename
    known = [handler.baseFilename for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    if str(path.absolute()) not in known:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
        logger.addHandler(handler)
    return logger
