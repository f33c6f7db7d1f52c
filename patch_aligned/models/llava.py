"""LLaVA behind the contract of `models.base`: checkpoints, folders of stage 1, LoRA folders and bare projectors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.mm_utils import image_view_of, process_images
from llava.model.checkpoint import CheckpointTensors, tower_place
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.weights import MARK, WEIGHT_FILES, load_projector, projector_state, read_projector_file
from llava.plugin import ImageView
from patch_aligned.cells import Layout, square_grid
from patch_aligned.models.base import VisionLanguageModel, WordEmbeddings, seeded

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")
DEFAULT_CONFIG = {"mm_projector_type": "mlp2x_gelu"}
"""LLaVA-1.5's projector: what random weights are arranged as when no trained projector is measured beside them."""
WORD_TABLE_ENDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


@lru_cache(maxsize=256)  # images of a data set share few sizes
def layout_of(view: ImageView) -> Layout:
    """The layout of an image that `process_images` made square: one grid over the part that patches cover."""
    grid = square_grid(
        view.original_wh, view.treatment, view.grid, view.shortest_edge, view.processed_side, view.seen_side
    )
    return Layout((grid,), grid.rows * grid.cols)


def load_words(base: str, placeholder: int | None = None) -> WordEmbeddings:
    """Reads tokenizer and table, and nothing else, of an LLM's folder or hub name (a LLaVA checkpoint will do).

    Args:
        base: the folder or name.
        placeholder: see `WordEmbeddings`.

    Raises:
        FileNotFoundError: there is no such folder and no such model on the hub.
        ValueError: the weights hold no table of word embeddings.
    """
    from transformers import AutoTokenizer

    weights = CheckpointTensors(base)
    tables = [name for name in weights if name.endswith(WORD_TABLE_ENDINGS)]
    if len(tables) != 1:
        raise ValueError(
            f"{base}: expected one tensor named *{' or *'.join(WORD_TABLE_ENDINGS)}, "
            f"found {sorted(tables) or 'none'}. "
            "Pass --base the folder of the language model that the projector was trained for."
        )
    return WordEmbeddings(AutoTokenizer.from_pretrained(base), weights[tables[0]], base, placeholder)


def read_config(file: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says.

    Raises:
        ValueError: it is broken.
    """
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: found no JSON ({error}); expected a checkpoint's config. Copy it anew.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}; expected a checkpoint's config. Copy it anew.")
    return config


class LlavaEncoder:
    """LLaVA's vision tower, which all measured projectors read, with the image preprocessing that belongs to it.

    Args:
        name: folder or hub name of the encoder.
        image_aspect_ratio: LLaVA's value, `square` or `pad`.
        select_layer: hidden layer whose features are used.
        select_feature: only `patch`, where every visual token stands for a cell of the image.
        device: where the tower runs, in float32.

    Raises:
        ValueError: the tower cannot be found or is of an unknown kind, or a setting is not one of those above.
    """

    def __init__(
        self,
        name: str,
        image_aspect_ratio: str = "square",
        select_layer: int = -2,
        select_feature: str = "patch",
        device: str = "cpu",
    ):
        if select_feature != "patch":
            raise ValueError(
                f"mm_vision_select_feature is {select_feature!r}; places can be measured only with 'patch', where "
                "every visual token stands for a cell of the image."
            )
        if image_aspect_ratio not in ("square", "pad"):
            raise ValueError(
                f"image_aspect_ratio is {image_aspect_ratio!r}; projectors are measured on 'square' or 'pad' images. "
                "Choose one with --image-aspect-ratio."
            )
        config = SimpleNamespace(
            mm_vision_tower=name, mm_vision_select_layer=select_layer, mm_vision_select_feature=select_feature
        )
        self.name, self.image_aspect_ratio, self.select_layer, self.device = (
            name,
            image_aspect_ratio,
            select_layer,
            device,
        )
        self.tower = build_vision_tower(config, delay_load=False).to(device=device, dtype=torch.float32).eval()

    @property
    def width(self) -> int:
        """d, the width of the features."""
        return self.tower.hidden_size

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images as the tower takes them: `[B, 3, side, side]`."""
        config = SimpleNamespace(image_aspect_ratio=self.image_aspect_ratio)
        pixels = process_images(images, self.tower.image_processor, config)
        assert isinstance(pixels, Tensor)  # a list only for tiles, which no measured image has
        return pixels

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""
        return self.tower(inputs.to(self.device, torch.float32))

    def layout(self, image_wh: tuple[int, int], shape: tuple[int, int]) -> Layout:
        """The layout of an image of this size under `shape` (rows, cols) of visual tokens."""
        processor, seen_side = self.tower.image_processor, self.tower.seen_side
        return layout_of(image_view_of(image_wh, processor, self.image_aspect_ratio, shape, seen_side))


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
        self, encoder: LlavaEncoder, base_words: WordEmbeddings, default_config: Mapping[str, Any]
    ) -> VisionLanguageModel:
        """Builds the projector between the encoder and the LLM and loads its weights.

        Args:
            encoder: gives the input width.
            base_words: give the output width, unless the checkpoint has its own.
            default_config: decides the architecture of random weights.

        Raises:
            ValueError: the weights are of another width or kind; both shapes are named.
        """
        words = load_words(str(self.path)) if self.is_full_checkpoint else base_words
        state: dict[str, Tensor] = {}
        if self.is_full_checkpoint:
            weights = CheckpointTensors(str(self.path))
            state = {name: weights[name] for name in weights if MARK in name}
        elif self.path is not None:
            state = read_projector_file(self.path)
        config = dict(self.config) or (architecture_of(state) if state else dict(default_config))
        config |= {"mm_hidden_size": encoder.width, "hidden_size": words.width}
        build = partial(build_vision_projector, SimpleNamespace(**config))
        projector = seeded(build, self.seed)
        if self.path is not None:
            load_projector(projector, state, self.path)
        source = str(self.path or f"random weights, seed {self.seed}, {config.get('mm_projector_type', 'linear')}")
        projector = projector.to(encoder.device, torch.float32).eval()
        return VisionLanguageModel(self.name, source, encoder, projector, words, build, ("model.mm_projector",))


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


def default_config_of(sources: Sequence[ProjectorSource]) -> Mapping[str, Any]:
    """The first trained projector's config: random weights beside it are arranged the same way."""
    return next((source.config for source in sources if source.config), DEFAULT_CONFIG)


def load_encoder(
    sources: Sequence[ProjectorSource], vision_tower: str | None, image_aspect_ratio: str | None, device: str
) -> LlavaEncoder:
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
    return LlavaEncoder(
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


def require_distinct(names: Sequence[str]) -> None:
    """Checks the names of projectors.

    Raises:
        ValueError: two are the same.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--projector: the name {twice[0]!r} is given twice; every projector needs a name of its own.")
