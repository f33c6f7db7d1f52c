"""RAM and RAM++: a Swin encoder, and a decoder in which each tag attends to the image.

Both score a fixed list of tags. RAM's query of a tag is the embedding of its name; RAM++ has several descriptions of
each tag and mixes their embeddings by their similarity to the image. Two layers of cross-attention follow, then one
logit a tag. Queries do not attend to each other, so a tag's score does not depend on the other tags of the list.
Architecture: Zhang et al., "Recognize Anything" (arXiv 2306.03514), Huang et al., "Open-Set Image Tagging with
Multi-Grained Text Supervision" (arXiv 2310.15200).

Letters: B images, P image tokens (the mean token first), T tags, K descriptions of a tag, C width of the label
embeddings, H width of the decoder.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

from patch_aligned.files import sha256_of, written_whole
from patch_aligned.record_files import named

DECODER_HEADS = 4
PATCH_PX = 4
DESCRIPTIONS_PER_TAG = {"ram": 1, "ram_plus": 51}
_DECODER_NORM_EPS = 1e-12
_ENCODER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class RamConfig:
    """Sizes of a model, including those that its weights do not determine."""

    kind: Literal["ram", "ram_plus"]  # RAM++ has several descriptions a tag
    image_size: int  # side of the square input in pixels
    window_size: int  # side of an attention window of the encoder in patches
    embed_dim: int  # width of the encoder's first stage; it doubles from stage to stage
    depths: tuple[int, ...]  # blocks of each stage
    num_heads: tuple[int, ...]  # attention heads of each stage
    num_tags: int  # T
    label_width: int  # C
    hidden_size: int  # H
    intermediate_size: int  # width of the decoder's feed-forward layers
    decoder_layers: int

    @property
    def descriptions_per_tag(self) -> int:
        """K, 1 for RAM."""
        return DESCRIPTIONS_PER_TAG[self.kind]

    @property
    def image_width(self) -> int:
        """Width of the encoder's output."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


class TagQueries(NamedTuple):
    """The decoder's input: one query a tag, and its projection by the first layer. `B'` is 1 or B."""

    hidden: Tensor  # [B', T, H]
    projected: Tensor  # [B', T, H]


class TagDecoderLayer(nn.Module):
    """Cross-attention from tags to image tokens and a feed-forward layer, each normalised after its residual."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(config.label_width, hidden)
        self.value = nn.Linear(config.label_width, hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=_DECODER_NORM_EPS)
        self.expand = nn.Linear(hidden, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=_DECODER_NORM_EPS)

    def forward(self, hidden: Tensor, image_tokens: Tensor, projected: Tensor | None = None) -> Tensor:
        """Apply the layer to `hidden` `[B', T, H]` (`B'` is 1 or B) and image tokens `[B, P, C]`: `[B, T, H]`.

        `projected` is `self.query(hidden)` where it is known.
        """
        key = _split_heads(self.key(image_tokens))  # [B, P, C] -> [B, heads, P, H / heads]
        value = _split_heads(self.value(image_tokens))
        projected = self.query(hidden) if projected is None else projected
        query = _split_heads(projected.to(key.dtype)).expand(len(key), -1, -1, -1)  # -> [B, heads, T, H / heads]
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = self.attention_output(attended.transpose(1, 2).flatten(2))  # -> [B, T, H]
        hidden = self.attention_norm(hidden + attended)
        return self.output_norm(hidden + self.contract(F.gelu(self.expand(hidden))))


class RamModel(nn.Module):
    """RAM or RAM++ for inference.

    `tag_queries` of RAM does not depend on the image: while the weights stay the same, compute it once and pass it to
    every `forward`.
    """

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = SwinModel(
            SwinConfig(
                image_size=config.image_size,
                patch_size=PATCH_PX,
                window_size=config.window_size,
                embed_dim=config.embed_dim,
                depths=list(config.depths),
                num_heads=list(config.num_heads),
                layer_norm_eps=_ENCODER_NORM_EPS,
            )
        )
        self.image_proj = nn.Linear(config.image_width, config.label_width)
        # Row t * K + k embeds description k of tag t.
        self.label_embed = nn.Parameter(torch.zeros(config.num_tags * config.descriptions_per_tag, config.label_width))
        if config.kind == "ram_plus":
            self.reweight_scale = nn.Parameter(torch.zeros(()))
        self.wordvec_proj = nn.Linear(config.label_width, config.hidden_size)
        self.decoder = nn.ModuleList(TagDecoderLayer(config) for _ in range(config.decoder_layers))
        self.fc = nn.Linear(config.hidden_size, 1)

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised images `[B, 3, image_size, image_size]`: `[B, P, C]`, the mean token first."""
        output = self.visual_encoder(pixel_values)
        tokens = torch.cat([output.pooler_output[:, None], output.last_hidden_state], dim=1)  # [B, P, image_width]
        return self.image_proj(tokens)  # -> [B, P, C]

    def tag_queries(self, mean_token: Tensor | None = None) -> TagQueries:
        """Compute the decoder's queries; those of RAM++ depend on `mean_token` `[B, C]`, the first image token."""
        if self.config.kind == "ram":
            labels = self.label_embed[None]  # [1, T, C]
        else:
            assert mean_token is not None, "RAM++ mixes its queries by the images' mean tokens"
            labels = self._mixed_descriptions(mean_token)  # [B, T, C]
        hidden = F.relu(self.wordvec_proj(labels.to(self.wordvec_proj.weight.dtype)))  # -> [B', T, H]
        first = self.decoder[0]
        assert isinstance(first, TagDecoderLayer)
        return TagQueries(hidden, first.query(hidden))

    def tag_logits(self, image_tokens: Tensor, queries: TagQueries | None = None) -> Tensor:
        """Return logits `[B, T]` of image tokens `[B, P, C]`; `queries` are computed where not given."""
        if queries is None:
            queries = self.tag_queries(image_tokens[:, 0])
        hidden, projected = queries
        for position, layer in enumerate(self.decoder):
            hidden = layer(hidden, image_tokens, projected if position == 0 else None)  # [B, T, H]
        return self.fc(hidden)[..., 0]  # -> [B, T]

    def forward(self, pixel_values: Tensor, queries: TagQueries | None = None) -> Tensor:
        """Return logits `[B, T]` of normalised images `[B, 3, image_size, image_size]`."""
        return self.tag_logits(self.image_tokens(pixel_values), queries)

    def _mixed_descriptions(self, mean_token: Tensor) -> Tensor:
        """Mix each tag's descriptions by a softmax over their similarity to the image: `[B, T, C]`."""
        # The scale sharpens small differences, so only the two products run in the (perhaps half) type of the table.
        with torch.autocast(mean_token.device.type, enabled=False):
            table = self.label_embed
            exact = torch.promote_types(table.dtype, torch.float32)
            direction = mean_token.to(exact) / mean_token.to(exact).norm(dim=-1, keepdim=True)
            similarity = self.reweight_scale.exp() * (direction.to(table.dtype) @ table.T).to(exact)  # [B, T * K]
            sizes = (self.config.num_tags, self.config.descriptions_per_tag)
            weights = similarity.unflatten(1, sizes).softmax(dim=-1).to(table.dtype)  # -> [B, T, K]
            return torch.einsum("btk,tkc->btc", weights, table.unflatten(0, sizes))


def _split_heads(states: Tensor) -> Tensor:
    return states.unflatten(-1, (DECODER_HEADS, -1)).transpose(1, 2)  # [B, N, H] -> [B, heads, N, H / heads]


# The published checkpoints' tensors: renamed to `RamModel`'s, and the model's sizes from their shapes.

# Parts of the training objective (captioning), and tables that the encoder derives from its sizes.
_UNUSED = re.compile(r"(tag_encoder|text_decoder)\.|.*\.(relative_position_index|attn_mask)$")

_BLOCK = r"visual_encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_OUR_BLOCK = r"visual_encoder.encoder.layers.\1.blocks.\2."
_LAYER = r"tagging_head\.encoder\.layer\.(\d+)\."
_RENAMED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embeddings.projection."),
        (r"visual_encoder\.patch_embed\.norm\.", "visual_encoder.embeddings.norm."),
        (r"visual_encoder\.norm\.", "visual_encoder.layernorm."),
        (r"visual_encoder\.layers\.(\d+)\.downsample\.", r"visual_encoder.encoder.layers.\1.downsample."),
        (_BLOCK + r"norm1\.", _OUR_BLOCK + "layernorm_before."),
        (_BLOCK + r"norm2\.", _OUR_BLOCK + "layernorm_after."),
        (_BLOCK + r"attn\.proj\.", _OUR_BLOCK + "attention.o_proj."),
        (_BLOCK + r"attn\.(relative_position_bias_table)", _OUR_BLOCK + r"attention.relative_position_bias.\3"),
        (_BLOCK + r"mlp\.", _OUR_BLOCK + "mlp."),
        (_LAYER + r"crossattention\.self\.", r"decoder.\1."),
        (_LAYER + r"crossattention\.output\.dense\.", r"decoder.\1.attention_output."),
        (_LAYER + r"crossattention\.output\.LayerNorm\.", r"decoder.\1.attention_norm."),
        (_LAYER + r"intermediate\.dense\.", r"decoder.\1.expand."),
        (_LAYER + r"output\.dense\.", r"decoder.\1.contract."),
        (_LAYER + r"output\.LayerNorm\.", r"decoder.\1.output_norm."),
    )
]  # fmt: skip
_QKV = re.compile(_BLOCK + r"attn\.qkv\.(weight|bias)")


def renamed_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published state dict to `RamModel`'s names, without unused parts and with q, k and v split.

    Unknown names are kept, so that a strict comparison reports them.
    """
    state = {}
    for name, tensor in _used(published).items():
        if qkv := _QKV.fullmatch(name):
            stage, block, kind = qkv.groups()
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"visual_encoder.encoder.layers.{stage}.blocks.{block}.attention.{letter}_proj.{kind}"] = part
        else:
            new_names = (pattern.sub(new, name, count=1) for pattern, new in _RENAMED if pattern.search(name))
            state[next(new_names, name)] = tensor
    return state


def _used(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("vision_multi", "tagging_head"): tensor  # an older name of the decoder
        for name, tensor in published.items()
        if not _UNUSED.match(name)
    }


def config_of(published: Mapping[str, Tensor]) -> RamConfig:
    """Read the model's sizes off a published state dict; `ValueError` says what a RAM model would have."""
    state = _used(published)
    blocks = sorted({(int(match[1]), int(match[2])) for name in state if (match := re.match(_BLOCK, name))})
    layers = {match[1] for name in state if (match := re.match(_LAYER, name))}
    if not blocks or not layers:
        raise ValueError(
            "found no blocks of a Swin encoder (visual_encoder.layers.*) or no layers of a tag decoder "
            "(tagging_head.encoder.layer.*); expected a RAM or RAM++ model. Tag2Text is another one"
        )
    depths = tuple(Counter(stage for stage, _ in blocks).values())
    kind: Literal["ram", "ram_plus"] = "ram_plus" if "reweight_scale" in state else "ram"
    try:
        labels, label_width = state["label_embed"].shape
        tables = [
            state[f"visual_encoder.layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape
            for stage in range(len(depths))
        ]
        embed_dim = state["visual_encoder.patch_embed.proj.weight"].shape[0]
        hidden_size = state["wordvec_proj.weight"].shape[0]
        intermediate_size = state["tagging_head.encoder.layer.0.intermediate.dense.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: missing; expected it, as RAM and RAM++ have it") from error
    if labels % DESCRIPTIONS_PER_TAG[kind]:
        raise ValueError(
            f"label_embed: found {labels} rows, expected a multiple of {DESCRIPTIONS_PER_TAG[kind]} descriptions a tag"
        )
    window_size = (math.isqrt(tables[0][0]) + 1) // 2  # a table has (2 * window - 1) ** 2 rows
    # The first shifted block masks all windows of the image; without it there is one window in the last stage.
    mask = published.get("visual_encoder.layers.0.blocks.1.attn_mask")
    windows_a_side = math.isqrt(mask.shape[0]) if mask is not None else 2 ** (len(depths) - 1)
    return RamConfig(
        kind=kind,
        image_size=windows_a_side * window_size * PATCH_PX,
        window_size=window_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=tuple(heads for _, heads in tables),
        num_tags=labels // DESCRIPTIONS_PER_TAG[kind],
        label_width=label_width,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        decoder_layers=len(layers),
    )


# Reading RAM's weights: the published .pth is converted once to safetensors, which is read from then on.
#
# The published files hold the optimizer's state and unused parts besides the weights (5.6 GB for RAM, of which 0.85 GB
# are used). They are pickles, and only tensors are read from them, never Python objects.

_logger = logging.getLogger(__name__)

_FORMAT = "patch_aligned ram 1"
_CONVERTED = ".converted.safetensors"
_WHERE = (
    "Published are ram_swin_large_14m.pth at https://huggingface.co/xinyu1205/recognize_anything_model and "
    "ram_plus_swin_large_14m.pth at https://huggingface.co/xinyu1205/recognize-anything-plus-model"
)

_FOUND_OBJECTS = (
    "found Python objects besides tensors ({}), which are not read, as loading them can run any code. Where you trust "
    "the file, save its weights only: torch.save({{'model': torch.load(path, weights_only=False)['model']}}, new_path) "
    "and give that one"
)


class PublishedFile(BaseModel):
    """The file that weights come from. The hash says which weights made an annotation."""

    name: str
    bytes: int
    sha256: str


class Conversion(BaseModel):
    """The JSON beside a converted file."""

    format: Literal["patch_aligned ram 1"] = "patch_aligned ram 1"
    config: RamConfig
    source: PublishedFile


def load_ram(path: Path) -> tuple[RamModel, PublishedFile]:
    """Load a published .pth, which is converted at the first time, or a converted file with its JSON beside it.

    Returns the model on the CPU in float32, in eval mode and without gradients, and the published file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: found no such file; expected the weights of RAM or RAM++. {_WHERE}")
    weights = path
    if path.suffix != ".safetensors":
        weights = path.with_name(path.stem + _CONVERTED)
        if not _is_current(weights, path):
            convert_checkpoint(path, weights)
    conversion = _read_conversion(weights)
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: {error}. Remove it, so that it is converted again") from error
    model = RamModel(conversion.config)
    _check_fit(state, model, weights)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval(), conversion.source


def convert_checkpoint(source: Path, weights: Path) -> None:
    """Write the part of a published .pth that inference needs to `*.converted.safetensors`, and its JSON."""
    _logger.info("Converting %s to %s. This happens once.", source, weights)
    published = _read_published(source)
    try:
        config = config_of(published)
    except ValueError as error:
        raise ValueError(f"{source}: {error}. {_WHERE}") from error
    # A copy of each: parts of one tensor, or of a mapped file, cannot be saved.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in renamed_state(published).items()}
    with torch.device("meta"):
        _check_fit(state, RamModel(config), source)
    file = PublishedFile(name=source.name, bytes=source.stat().st_size, sha256=sha256_of(source))
    save_converted(state, weights, Conversion(config=config, source=file))


def save_converted(state: Mapping[str, Tensor], weights: Path, conversion: Conversion) -> None:
    """Write weights under `RamModel`'s names, and after them the JSON that describes them."""
    try:
        with written_whole(weights) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        with written_whole(_sidecar(weights)) as temporary:
            text = json.dumps(conversion.model_dump(mode="json"), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{weights}: cannot be written ({error}). Free some room there or make the folder writable, or copy the "
            ".pth to another one"
        ) from error


def _read_published(path: Path) -> dict[str, Tensor]:
    """Return the state dict under the key `model`. It is mapped, so that the optimizer's state is never read."""
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not is_zip and file.read(2) == b"PK":
            raise ValueError(f"{path}: truncated after {path.stat().st_size} bytes. Download it again. {_WHERE}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments, plain values
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # bytes that are no pickle may raise anything
            is_pickle = is_zip and isinstance(error, pickle.UnpicklingError)
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_pickle else []
            problem = (
                _FOUND_OBJECTS.format(named(objects)) if objects else f"not readable by torch ({error!r}). {_WHERE}"
            )
            raise ValueError(f"{path}: {problem}") from error
    state = saved.get("model") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        found = sorted(map(str, saved)) if isinstance(saved, Mapping) else [type(saved).__name__]
        raise ValueError(f"{path}: found {named(found)}, expected a dict with tensors under 'model'. {_WHERE}")
    return dict(state)


def _check_fit(state: Mapping[str, Tensor], model: RamModel, path: Path) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    problems = {
        "missing ": [name for name in expected if name not in found],
        "unexpected ": [name for name in found if name not in expected],
        "": [
            f"{name} of shape {shape} instead of {expected[name]}"
            for name, shape in found.items()
            if shape != expected.get(name, shape)
        ],
    }
    if listed := [what + named(names) for what, names in problems.items() if names]:
        raise ValueError(f"{path}: does not fit {model.config.kind}: {'; '.join(listed)}. {_WHERE}")


def _sidecar(weights: Path) -> Path:
    return weights.with_suffix(".json")


def _is_current(weights: Path, source: Path) -> bool:
    """Whether a conversion of this very source was finished."""
    if not weights.is_file() or not _sidecar(weights).is_file():
        return False
    file = _read_conversion(weights).source
    return file.bytes == source.stat().st_size and file.sha256 == sha256_of(source)


def _read_conversion(weights: Path) -> Conversion:
    sidecar = _sidecar(weights)
    again = "Remove it and give the published .pth, which is then converted"
    if not sidecar.is_file():
        raise ValueError(f"{weights}: found no {sidecar.name} beside it, which holds the model's sizes. {again}")
    try:
        return Conversion.model_validate_json(sidecar.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{sidecar}: found no description of a converted RAM model ({error}). {again}") from error
