"""`models.base` for LLaVA: full checkpoints, stage-1 folders, LoRA folders and projector files."""

from __future__ import annotations

import json
import math
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

from llava.checkpoint_files import ADAPTER_CONFIG_FILE, WEIGHT_FILES
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, conversation_mode
from llava.eval.vqa_files import Question, prompt_of
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    image_view_of,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointTensors, tower_place
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.weights import MARK, load_projector, projector_state, read_projector_file
from llava.plugin import ImageView
from patch_aligned.cells import Layout, square_grid
from patch_aligned.models.base import Encoded, VisionLanguageModel, WordEmbeddings, seeded
from patch_aligned.models.language import LanguageModel

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin")
DEFAULT_CONFIG = {"mm_projector_type": "mlp2x_gelu"}
"""Config of random projectors if no trained projector is measured with them: LLaVA-1.5's."""
CAPTION_REQUEST = "Describe the image in one sentence."
WORD_TABLE_ENDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "wte.embedding", "wte.new_embedding")
"""The last two are halves of one table, Molmo 2's."""


@lru_cache(maxsize=256)  # images of a dataset share few sizes
def layout_of(view: ImageView) -> Layout:
    """Return the layout of an image that `process_images` made square: one grid over the area that patches cover."""
    grid = square_grid(
        view.original_wh, view.treatment, view.grid, view.shortest_edge, view.processed_side, view.seen_side
    )
    return Layout((grid,), grid.rows * grid.cols)


def load_words(base: str, placeholder: int | None = None) -> WordEmbeddings:
    """Load only the tokenizer and word-embedding table of an LLM or a LLaVA checkpoint.

    Args:
        base: folder or hub name.
        placeholder: see `WordEmbeddings`.

    Raises:
        FileNotFoundError: there is no such folder and no such model on the hub.
        ValueError: the weights contain no table of word embeddings.
    """
    from transformers import AutoTokenizer

    weights = CheckpointTensors(base)
    tables = sorted(name for name in weights if name.endswith(WORD_TABLE_ENDINGS))
    if len(tables) != 1 and [name.rpartition(".")[2] for name in tables] != ["embedding", "new_embedding"]:
        raise ValueError(
            f"{base}: expected one tensor named *{' or *'.join(WORD_TABLE_ENDINGS)}, "
            f"found {tables or 'none'}. "
            "Pass --base the folder of the language model that the projector was trained for."
        )
    table = torch.cat([weights[name] for name in tables])
    return WordEmbeddings(AutoTokenizer.from_pretrained(base), table, base, placeholder)


class LazyTensor:
    """A tensor of a checkpoint, read when it is indexed; what `from_pretrained` takes as a weight."""

    def __init__(self, weights: CheckpointTensors, name: str):
        self._weights, self._name = weights, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._weights[self._name][index]


def lazy_tensors(checkpoint: str) -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint (folder or hub name). A shard is opened when one of its tensors is read."""
    weights = CheckpointTensors(checkpoint)
    return {name: LazyTensor(weights, name) for name in weights}


def read_config(file: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json. Raises `ValueError` if it is not a JSON object."""
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: found no JSON ({error}); expected a checkpoint's config. Copy it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}; expected a checkpoint's config. Copy it again.")
    return config


class LlavaEncoder:
    """LLaVA's vision tower, in float32, with its image preprocessing. All measured projectors share it.

    `name` is the folder or hub name of the encoder; the others are settings of LLaVA's configs.
    """

    takes_batches = True

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
                f"mm_vision_select_feature is {select_feature!r}; alignment can be measured only with 'patch', where "
                "each visual token corresponds to a cell of the image."
            )
        if image_aspect_ratio not in ("square", "pad"):
            raise ValueError(
                f"image_aspect_ratio is {image_aspect_ratio!r}; projectors are measured on 'square' or 'pad' images. "
                "Choose one with --image-aspect-ratio."
            )
        config = SimpleNamespace(
            mm_vision_tower=name, mm_vision_select_layer=select_layer, mm_vision_select_feature=select_feature
        )
        self.name, self.image_aspect_ratio, self.device = name, image_aspect_ratio, device
        self.tower = build_vision_tower(config, delay_load=False).to(device=device, dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Run the tower on RGB images."""
        config = SimpleNamespace(image_aspect_ratio=self.image_aspect_ratio)
        pixels = process_images(images, self.tower.image_processor, config)  # [B, 3, side, side]
        assert isinstance(pixels, Tensor)  # a list only with tiles, which measured images do not have
        features = self.tower(pixels.to(self.device, torch.float32))  # [B, S, d]
        return Encoded(features, lambda projector: projector(features))

    def layout(self, image_wh: tuple[int, int], tokens: int) -> Layout:
        """Return the layout of the visual tokens of an image of this size."""
        side = math.isqrt(tokens)  # a resampling projector, such as the C-Abstractor, sets the number of tokens
        if side * side != tokens:
            raise ValueError(f"The projector gives {tokens} visual tokens, which do not fill a square grid.")
        tower, ratio = self.tower, self.image_aspect_ratio
        return layout_of(image_view_of(image_wh, tower.image_processor, ratio, (side, side), tower.seen_side))


@dataclass(frozen=True)
class ProjectorSource:
    """Origin of a projector, resolved before any weights are read."""

    name: str
    path: Path | None  # file with the projector's weights, or folder of a full checkpoint; None for random weights
    seed: int  # of random weights
    config: Mapping[str, Any]  # config.json beside the weights; empty if there is none

    @classmethod
    def parse(cls, name: str, place: str) -> ProjectorSource:
        """Parse a path, or `random[:SEED]`.

        The path is the output folder of stage 1 (`mm_projector.bin` and `config.json`), the projector file itself, a
        LoRA folder (`non_lora_trainables.bin`) or the folder of a full checkpoint.

        Raises:
            ValueError: the checkpoint has no projector or a trained vision tower.
            FileNotFoundError: the path does not exist, or the folder has no weights.
        """
        where = f"--projector {name}={place}"
        if match := re.fullmatch(r"random(?::(\d+))?", place):
            return cls(name, None, int(match.group(1) or 0), {})
        path = Path(place)
        if not path.exists():
            raise FileNotFoundError(
                f"{where}: there is no {path}. Pass an --output_dir of stage 1, with mm_projector.bin and config.json, "
                "or the folder of a full model. To get one from the hub: hf download NAME --local-dir FOLDER."
            )
        config_file = (path if path.is_dir() else path.parent) / "config.json"
        config = read_config(config_file) if config_file.is_file() else {}
        if tower := config.get("mm_vision_tower"):
            config["mm_vision_tower"] = tower_place(tower, str(config_file.parent))
        if path.is_file():
            return cls(name, path, 0, config)
        # Full weights take precedence: published models keep the projector of stage 1 beside the weights of stage 2.
        if not any((path / file).is_file() for file in WEIGHT_FILES):
            for candidate in PROJECTOR_FILES:
                if (path / candidate).is_file():
                    return cls(name, path / candidate, 0, config)
            raise FileNotFoundError(
                f"{where}: {path} holds neither {', '.join(PROJECTOR_FILES)} nor the weights of a full checkpoint. "
                "Pass the --output_dir of a finished training run."
            )
        # Checked before looking for a tower, which the config of a language model does not name.
        if not any(MARK in tensor for tensor in CheckpointTensors(place)):
            raise ValueError(
                f"{where}: {path} holds no projector: none of its tensors is named *{MARK}*. Pass a language model as "
                "--base, an encoder as --vision-tower, and as --projector an --output_dir of stage 1 or a full LLaVA "
                "checkpoint."
            )
        if config.get("unfreeze_mm_vision_tower"):
            raise ValueError(
                f"{where}: this checkpoint has a trained vision tower, which other projectors cannot share. Only "
                "projectors of a frozen tower can be measured together."
            )
        return cls(name, path, 0, config)

    @property
    def is_full_checkpoint(self) -> bool:
        """Whether the path is a full model, with its own word embeddings."""
        return self.path is not None and self.path.is_dir()

    def build(
        self, encoder: LlavaEncoder, base_words: WordEmbeddings, default_config: Mapping[str, Any]
    ) -> VisionLanguageModel:
        """Build the projector between the encoder and the LLM's words, a checkpoint's own or `base_words`.

        `default_config` has the architecture of random weights.

        Raises:
            ValueError: the weights have another width or architecture; the message names both shapes.
        """
        words = load_words(str(self.path)) if self.is_full_checkpoint else base_words
        state: dict[str, Tensor] = {}
        if self.is_full_checkpoint:
            weights = CheckpointTensors(str(self.path))
            state = {name: weights[name] for name in weights if MARK in name}
        elif self.path is not None:
            state = read_projector_file(self.path)
        config = dict(self.config) or (architecture_of(state) if state else dict(default_config))
        config |= {"mm_hidden_size": encoder.tower.hidden_size, "hidden_size": words.width}
        build = partial(build_vision_projector, SimpleNamespace(**config))
        projector = seeded(build, self.seed)
        if self.path is not None:
            load_projector(projector, state, self.path)
        source = str(self.path or f"random weights, seed {self.seed}, {config.get('mm_projector_type', 'linear')}")
        projector = projector.to(encoder.device, torch.float32).eval()
        language = LlavaLanguage(words.source, None, encoder.device)
        if self.path is not None and self.path.is_file() and self.path.with_name(ADAPTER_CONFIG_FILE).is_file():
            language = LlavaLanguage(str(self.path.parent), words.source, encoder.device)
        return VisionLanguageModel(self.name, source, encoder, projector, words, build, language)


@dataclass(frozen=True)
class LlavaLanguage:
    """The LLM of a LLaVA checkpoint, or a base LLM, which reads images as in stage 1.

    `path` and `base` are as `load_pretrained_model` takes them. Weights are float16 on CUDA and float32 elsewhere.
    """

    path: str
    base: str | None
    device: str

    def load(self) -> LanguageModel:
        """Load the LLM. The prompt is that of the checkpoint's template: in stage 1 the image alone."""
        name = get_model_name_from_path(self.path)
        tokenizer, model, processor, _ = load_pretrained_model(
            self.path, self.base, name, device=self.device, device_map={"": self.device}
        )
        conversation = conv_templates["plain" if processor is None else conversation_mode(name, model.config)]
        is_plain = conversation.sep_style is SeparatorStyle.PLAIN
        question = Question("", "" if is_plain else CAPTION_REQUEST, ("",))
        prompt = prompt_of(question, conversation, bool(getattr(model.config, "mm_use_im_start_end", False)))
        space = "" if is_plain or prompt[-1].isspace() else " "

        def prompt_ids(stem: str) -> tuple[list[int], list[int]]:
            ids = tokenizer_image_token(prompt + space + stem if stem else prompt, tokenizer)
            assert isinstance(ids, list)  # a tensor only where asked for
            image = ids.index(IMAGE_TOKEN_INDEX)
            return ids[:image], ids[image + 1 :]

        no_prompt = torch.empty(1, 0, dtype=torch.long)  # `generate` hands over new tokens alone
        stopping = KeywordsStoppingCriteria([conversation.stop_string], tokenizer, no_prompt)
        return LanguageModel(model, tokenizer, prompt_ids, conversation.stop_string, stopping)


def architecture_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the config of a projector from its tensor names: `linear` or `mlpNx_gelu`."""
    names = set(projector_state(state))
    if names == {"weight", "bias"}:
        return {"mm_projector_type": "linear"}
    if not all(re.fullmatch(r"\d+\.(weight|bias)", name) for name in names):
        raise ValueError(
            f"The projector holds {sorted(names)[:4]}: neither a linear layer nor an MLP. Put the config.json of its "
            "training run beside it, which names its architecture."
        )
    return {"mm_projector_type": f"mlp{len(names) // 2}x_gelu"}


def load_encoder(
    sources: Sequence[ProjectorSource], vision_tower: str | None, image_aspect_ratio: str | None, device: str
) -> LlavaEncoder:
    """Load the tower that all projectors were trained on. What is None comes from their configs.

    Raises:
        ValueError: no tower is given, or the projectors were trained on different features and no argument decides.
    """
    configs = {source.name: source.config for source in sources if source.config}
    name = vision_tower or _agreed(configs, "mm_vision_tower", None, "If they are the same, pass --vision-tower.")
    if name is None:
        raise ValueError("No projector's config.json names a vision tower: pass --vision-tower PATH.")
    ratio = image_aspect_ratio or _agreed(
        configs, "image_aspect_ratio", None, "Pass --image-aspect-ratio to measure all on the same images."
    )
    return LlavaEncoder(
        name,
        ratio or "square",
        _agreed(configs, "mm_vision_select_layer", -2, "Measure them separately."),
        _agreed(configs, "mm_vision_select_feature", "patch", "Measure them separately."),
        device,
    )


def _agreed(configs: Mapping[str, Mapping[str, Any]], key: str, default: Any, remedy: str) -> Any:
    """Return the value of a key that all configs share. A config without it counts as `default`, unless that is None.

    If they disagree, `remedy` says what to do.
    """
    values = {projector: config.get(key, default) for projector, config in configs.items()}
    said = {projector: value for projector, value in values.items() if value is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"The projectors were trained on different features: {key} is {said}. {remedy}")
    return next(iter(said.values()), default)
