"""Load the models given on the command line as `NAME=PATH`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.llava import DEFAULT_CONFIG, ProjectorSource, load_encoder, load_words
from patch_aligned.models.transformers import is_of_transformers, load_transformers


def load_models(
    specifications: Sequence[str],
    base: str | None = None,
    vision_tower: str | None = None,
    image_aspect_ratio: str | None = None,
    device: str = "cpu",
) -> list[VisionLanguageModel]:
    """Load the models given by `--projector`, in order.

    Args:
        specifications: `NAME=PATH` or `NAME=random[:SEED]`; PATH is LLaVA's, or a folder or hub name of transformers.
        base: the LLM whose word embeddings LLaVA's projectors are compared with; full models have their own.
        vision_tower: overrides the configs of LLaVA's projectors.
        image_aspect_ratio: likewise.
        device: device of towers and projectors.

    Raises:
        ValueError: an input or the device is invalid; the message says which, and what to do.
        FileNotFoundError: a path does not exist.
    """
    _require_device(device)
    if not specifications:
        raise ValueError("No projector to measure: pass --projector NAME=PATH at least once.")
    places = [_name_and_place(specification) for specification in specifications]
    names = [name for name, _ in places]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--projector: the name {twice[0]!r} is given twice; each projector needs its own name.")
    of_transformers = {name: place for name, place in places if is_of_transformers(place)}
    sources = [ProjectorSource.parse(name, place) for name, place in places if name not in of_transformers]
    if base is None and not all(source.is_full_checkpoint for source in sources):
        raise ValueError("--base is missing: projectors are compared with the word embeddings of their LLM.")
    models = {name: load_transformers(name, place, device) for name, place in of_transformers.items()}
    if sources:
        words = load_words(base or str(sources[0].path))  # first: a wrong --base is found before the tower is read
        encoder = load_encoder(sources, vision_tower, image_aspect_ratio, device)
        default_config = next((source.config for source in sources if source.config), DEFAULT_CONFIG)
        models |= {source.name: source.build(encoder, words, default_config) for source in sources}
    return [models[name] for name in names]


def sources_of(models: Sequence[VisionLanguageModel]) -> dict[str, str]:
    """Describe the origin of each model's projector and words, by name, for captions."""
    return {model.name: f"{model.source}, words of {model.words.source}" for model in models}


def _name_and_place(specification: str) -> tuple[str, str]:
    name, _, place = specification.partition("=")
    if not name or not place:
        raise ValueError(
            f"--projector {specification}: expected NAME=PATH or NAME=random[:SEED], "
            "for example --projector llava=checkpoints/llava-v1.5-7b-pretrain"
        )
    return name, place


def _require_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device}: unknown device. Pass cpu, cuda or cuda:1.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here. Pass --device cpu.")
