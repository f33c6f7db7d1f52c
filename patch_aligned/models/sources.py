"""From `NAME=PATH` on a command line to a projector that can be measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava.model.checkpoint import CheckpointTensors, tower_place
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.weights import MARK, WEIGHT_FILES, load_projector, projector_state, read_projector_file
from patch_aligned.models.llava import MeasuredProjector, SharedTower, Tower, WordEmbeddings, seeded
from patch_aligned.models.transformers import family_of, load_family, read_config

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")
DEFAULT_CONFIG = {"mm_projector_type": "mlp2x_gelu"}
"""LLaVA-1.5's projector: what random weights are arranged as when no trained projector is measured beside them."""


@dataclass(frozen=True)
class ProjectorSource:
    """Where a projector comes from, resolved before anything large is read.

    Attributes:
        name: as it appears in tables.
        path: file with the projector's weights, or folder of a full checkpoint; None for random weights.
        seed: seed of random weights.
        config: the run's config.json beside the weights; empty where there is none.
    """

    name: str
    path: Path | None
    seed: int
    config: Mapping[str, Any]

    @classmethod
    def parse(cls, specification: str) -> ProjectorSource:
        """Understands `NAME=PATH` and `NAME=random[:SEED]`.

        PATH is a folder of stage 1 (`mm_projector.bin` and `config.json`), the file itself, a LoRA folder
        (`non_lora_trainables.bin`) or the folder of a full checkpoint.

        Raises:
            ValueError: the specification cannot be understood, the checkpoint holds no projector, or it trained its
                vision tower.
            FileNotFoundError: there is no such path, or the folder holds no weights.
        """
        where = f"--projector {specification}"
        name, value = name_and_place(specification)
        if match := re.fullmatch(r"random(?::(\d+))?", value):
            return cls(name, None, int(match.group(1) or 0), {})
        path = Path(value)
        if not path.exists():
            raise FileNotFoundError(
                f"{where}: there is no {path}. Pass an --output_dir of stage 1, with mm_projector.bin and config.json, "
                "or a whole model's folder; one on the hub comes by: hf download NAME --local-dir FOLDER."
            )
        config_file = (path if path.is_dir() else path.parent) / "config.json"
        config = read_config(config_file) if config_file.is_file() else {}
        if tower := config.get("mm_vision_tower"):
            config["mm_vision_tower"] = tower_place(tower, str(config_file.parent))
        if path.is_file():
            return cls(name, path, 0, config)
        # Weights of a whole model come first: published ones keep the projector of stage 1 beside those of stage 2.
        if not any((path / file).is_file() for file in WEIGHT_FILES):
            for candidate in PROJECTOR_FILES:
                if (path / candidate).is_file():
                    return cls(name, path / candidate, 0, config)
            raise FileNotFoundError(
                f"{where}: {path} holds neither {', '.join(PROJECTOR_FILES)} nor the weights of a full checkpoint. "
                "Pass the --output_dir of a finished training run."
            )
        # Before the tower is sought, which a language model's config does not name.
        if not any(MARK in tensor for tensor in CheckpointTensors(value)):
            raise ValueError(
                f"{where}: {path} holds no projector: none of its tensors is named *{MARK}*. A language model "
                "alone belongs to --base, an encoder to --vision-tower; as --projector pass an --output_dir of stage 1 "
                "or a whole LLaVA checkpoint."
            )
        if config.get("unfreeze_mm_vision_tower"):
            raise ValueError(
                f"{where}: this checkpoint trained its vision tower, so it cannot share one with other projectors. "
                "Only projectors of a frozen tower can be measured side by side."
            )
        return cls(name, path, 0, config)

    @property
    def is_full_checkpoint(self) -> bool:
        """Whether the path holds a whole model, with word embeddings of its own."""
        return self.path is not None and self.path.is_dir()

    def build(
        self, tower: SharedTower, base_words: WordEmbeddings, default_config: Mapping[str, Any]
    ) -> MeasuredProjector:
        """Builds the projector between the tower and the LLM and loads its weights.

        Args:
            tower: gives the input width.
            base_words: give the output width, unless the checkpoint has its own.
            default_config: decides the architecture of random weights.

        Raises:
            ValueError: the weights are of another width or kind; both shapes are named.
        """
        words = WordEmbeddings.load(str(self.path)) if self.is_full_checkpoint else base_words
        state: dict[str, Tensor] = {}
        if self.is_full_checkpoint:
            weights = CheckpointTensors(str(self.path))
            state = {name: weights[name] for name in weights if MARK in name}
        elif self.path is not None:
            state = read_projector_file(self.path)
        config = dict(self.config) or (architecture_of(state) if state else dict(default_config))
        config |= {"mm_hidden_size": tower.width, "hidden_size": words.width}
        build = partial(build_vision_projector, SimpleNamespace(**config))
        projector = seeded(build, self.seed)
        if self.path is not None:
            load_projector(projector, state, self.path)
        source = str(self.path or f"random weights, seed {self.seed}, {config.get('mm_projector_type', 'linear')}")
        return MeasuredProjector(self.name, source, projector.to(tower.device, torch.float32).eval(), words, build)


def name_and_place(specification: str) -> tuple[str, str]:
    """The two sides of `NAME=PATH`.

    Raises:
        ValueError: one is missing.
    """
    name, _, place = specification.partition("=")
    if not name or not place:
        raise ValueError(
            f"--projector {specification}: expected NAME=PATH or NAME=random[:SEED], "
            "for example --projector llava=checkpoints/llava-v1.5-7b-pretrain"
        )
    return name, place


def architecture_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config of a projector without config.json, from the names of its tensors: `linear` or `mlpNx_gelu`.

    Raises:
        ValueError: the names are those of neither.
    """
    names = set(projector_state(state))
    if names == {"weight", "bias"}:
        return {"mm_projector_type": "linear"}
    if not all(re.fullmatch(r"\d+\.(weight|bias)", name) for name in names):
        raise ValueError(
            f"The projector holds {sorted(names)[:4]}: neither a linear one nor an MLP. Put the config.json of its "
            "training run beside it, so that its architecture is known."
        )
    return {"mm_projector_type": f"mlp{len(names) // 2}x_gelu"}


def parse_projectors(specifications: Sequence[str]) -> list[ProjectorSource]:
    """Parses all `--projector` options.

    Raises:
        ValueError: there is none, or two share a name.
    """
    sources = [ProjectorSource.parse(specification) for specification in specifications]
    if not sources:
        raise ValueError("No projector to measure: pass --projector NAME=PATH at least once.")
    require_distinct([source.name for source in sources])
    return sources


def require_distinct(names: Sequence[str]) -> None:
    """Checks the names of projectors.

    Raises:
        ValueError: two are the same.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--projector: the name {twice[0]!r} is given twice; every projector needs a name of its own.")


def default_config_of(sources: Sequence[ProjectorSource]) -> Mapping[str, Any]:
    """The first trained projector's config: random weights beside it are arranged the same way."""
    return next((source.config for source in sources if source.config), DEFAULT_CONFIG)


def load_tower(
    sources: Sequence[ProjectorSource], vision_tower: str | None, image_aspect_ratio: str | None, device: str
) -> SharedTower:
    """The tower that all projectors were trained on, with the settings of their configs.

    Args:
        sources: the projectors.
        vision_tower: folder or hub name; None takes it from the configs.
        image_aspect_ratio: `square` or `pad`; None takes it from the configs, `square` where none says it.
        device: where the tower runs.

    Raises:
        ValueError: no tower is named, or the projectors were trained on different features and no argument decides.
    """
    configs = {source.name: source.config for source in sources if source.config}
    name = vision_tower or _agreed(configs, "mm_vision_tower", None, "If all read the same one, pass --vision-tower.")
    if name is None:
        raise ValueError("No vision tower is named by any projector's config.json: pass --vision-tower PATH.")
    ratio = image_aspect_ratio or _agreed(
        configs, "image_aspect_ratio", None, "Pass --image-aspect-ratio to measure all on the same images."
    )
    return SharedTower(
        name,
        ratio or "square",
        _agreed(configs, "mm_vision_select_layer", -2, "Measure them apart."),
        _agreed(configs, "mm_vision_select_feature", "patch", "Measure them apart."),
        device,
    )


def _agreed(configs: Mapping[str, Mapping[str, Any]], key: str, default: Any, remedy: str) -> Any:
    """What all configs say of a key; those that are silent mean `default`, or with None leave it to the others.

    Raises:
        ValueError: they disagree; `remedy` says what to do.
    """
    values = {projector: config.get(key, default) for projector, config in configs.items()}
    said = {projector: value for projector, value in values.items() if value is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"The projectors were trained on different features: {key} is {said}. {remedy}")
    return next(iter(said.values()), default)


# The models that an analysis compares, from `NAME=PATH` on: projectors behind the towers that they belong to.


@dataclass(frozen=True)
class AnalysedModel:
    """All that an analysis needs of a model: images -> features -> visual tokens, and words to compare them with.

    Attributes:
        tower: images -> features; models with the same one share its work.
        projector: features -> visual tokens and their grid; word embeddings and tokenizer in `projector.words`.
    """

    tower: Tower
    projector: MeasuredProjector

    @property
    def name(self) -> str:
        """As in tables."""
        return self.projector.name


def load_models(
    specifications: Sequence[str],
    base: str | None = None,
    vision_tower: str | None = None,
    image_aspect_ratio: str | None = None,
    device: str = "cpu",
) -> list[AnalysedModel]:
    """Loads what `--projector` names, in order.

    Args:
        specifications: `NAME=PATH` or `NAME=random[:SEED]`, where PATH is LLaVA's (see `ProjectorSource`) or a folder
            of one of the families of transformers in `model_families`.
        base: the LLM whose words LLaVA's projectors are compared with; whole models have their own.
        vision_tower, image_aspect_ratio: of LLaVA's projectors, where their configs are not to decide.
        device: where towers and projectors run.

    Raises:
        ValueError: an input does not fit, or there is no such device; the message says which and what to do.
        FileNotFoundError: there is no such path.
    """
    _require_device(device)
    places = [name_and_place(specification) for specification in specifications]
    names = [name for name, _ in places]
    require_distinct(names)
    of_families = {name: Path(place) for name, place in places if family_of(Path(place))}
    own = [f"{name}={place}" for name, place in places if name not in of_families]
    sources = parse_projectors(own) if own or not of_families else []
    if base is None and not all(source.is_full_checkpoint for source in sources):
        raise ValueError("--base is missing: projectors are compared with the word embeddings of their LLM.")
    models = {name: AnalysedModel(*load_family(name, path, device)) for name, path in of_families.items()}
    if sources:
        tower = load_tower(sources, vision_tower, image_aspect_ratio, device)
        words = WordEmbeddings.load(base or str(sources[0].path))
        for source in sources:
            projector = source.build(tower, words, default_config_of(sources))
            models[source.name] = AnalysedModel(tower, projector)
    return [models[name] for name in names]


def sources_of(models: Sequence[AnalysedModel]) -> dict[str, str]:
    """Where each model's projector and words come from, by name, for captions."""
    return {model.name: f"{model.projector.source}, words of {model.projector.words.source}" for model in models}


def _require_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device}: torch knows no such device. Pass cpu, cuda or cuda:1.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here. Pass --device cpu.")
