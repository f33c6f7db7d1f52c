"""RAM and RAM++: a Swin encoder, and a decoder in which each tag looks at the image.

Both score a fixed list of tags. RAM's query of a tag is the embedding of its name; RAM++ has several descriptions of
each tag and mixes their embeddings by how well they suit the image. Two layers of cross-attention follow, then one
logit a tag. Queries never look at each other, so a tag's score doesn't depend on which others are in the list.
Architecture: Zhang et al., "Recognize Anything" (arXiv 2306.03514), Huang et al., "Open-Set Image Tagging with
Multi-Grained Text Supervision" (arXiv 2310.15200).

Letters: B images, P image tokens (the mean token first), T tags, K descriptions of a tag, C width of the label
embeddings, H width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

DECODER_HEADS = 4
PATCH_PX = 4
DESCRIPTIONS_PER_TAG = {"ram": 1, "ram_plus": 51}
_DECODER_NORM_EPS = 1e-12
_ENCODER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class RamConfig:
    """Sizes of a model, all that its weights don't say by themselves included.

    Attributes:
        kind: `ram`, or `ram_plus` with several descriptions a tag.
        image_size: side of the square input in pixels.
        window_size: side of an attention window of the encoder in patches.
        embed_dim: width of the encoder's first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        num_tags: T.
        label_width: C.
        hidden_size: H.
        intermediate_size: width of the decoder's feed-forward layers.
        decoder_layers: number of layers of the decoder.
    """

    kind: Literal["ram", "ram_plus"]
    image_size: int
    window_size: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_tags: int
    label_width: int
    hidden_size: int
    intermediate_size: int
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
    """The decoder's input: one query a tag, and what the first layer asks with it. `B'` is 1 or B."""

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
        """One layer.

        Args:
            hidden: `[B', T, H]`, `B'` is 1 or B.
            image_tokens: `[B, P, C]`.
            projected: `self.query(hidden)` where it is known.

        Returns:
            `[B, T, H]`.
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

    `tag_queries` of RAM doesn't depend on the image: a caller who holds the weights fixed computes it once and passes
    it to every `forward`.
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
        """Tokens of normalised images `[B, 3, image_size, image_size]`, the mean token first: `[B, P, C]`."""
        output = self.visual_encoder(pixel_values)
        tokens = torch.cat([output.pooler_output[:, None], output.last_hidden_state], dim=1)  # [B, P, image_width]
        return self.image_proj(tokens)  # -> [B, P, C]

    def tag_queries(self, mean_token: Tensor | None = None) -> TagQueries:
        """The decoder's queries.

        Args:
            mean_token: `[B, C]`, the first of `image_tokens`. RAM++ needs it, RAM has no use for it.
        """
        if self.config.kind == "ram":
            labels = self.label_embed[None]  # [1, T, C]
        else:
            if mean_token is None:
                raise ValueError(
                    "mean_token: found None, expected the images' mean tokens: RAM++ mixes its queries by them"
                )
            labels = self._mixed_descriptions(mean_token)  # [B, T, C]
        hidden = F.relu(self.wordvec_proj(labels.to(self.wordvec_proj.weight.dtype)))  # -> [B', T, H]
        first = self.decoder[0]
        assert isinstance(first, TagDecoderLayer)
        return TagQueries(hidden, first.query(hidden))

    def tag_logits(self, image_tokens: Tensor, queries: TagQueries | None = None) -> Tensor:
        """Logits `[B, T]` of image tokens `[B, P, C]`; `queries` as from `tag_queries`, computed where not given."""
        if queries is None:
            queries = self.tag_queries(image_tokens[:, 0])
        hidden, projected = queries
        for position, layer in enumerate(self.decoder):
            hidden = layer(hidden, image_tokens, projected if position == 0 else None)  # [B, T, H]
        return self.fc(hidden)[..., 0]  # -> [B, T]

    def forward(self, pixel_values: Tensor, queries: TagQueries | None = None) -> Tensor:
        """Logits `[B, T]` of normalised images `[B, 3, image_size, image_size]`."""
        return self.tag_logits(self.image_tokens(pixel_values), queries)

    def _mixed_descriptions(self, mean_token: Tensor) -> Tensor:
        """Embeddings of each tag's descriptions, mixed by a softmax over their likeness to the image, `[B, T, C]`."""
        # The scale sharpens small differences, so only the two products run in the (perhaps half) type of the table.
        with torch.autocast(mean_token.device.type, enabled=False):
            table = self.label_embed
            exact = torch.promote_types(table.dtype, torch.float32)
            direction = mean_token.to(exact) / mean_token.to(exact).norm(dim=-1, keepdim=True)
            likeness = self.reweight_scale.exp() * (direction.to(table.dtype) @ table.T).to(exact)  # [B, T * K]
            sizes = (self.config.num_tags, self.config.descriptions_per_tag)
            weights = likeness.unflatten(1, sizes).softmax(dim=-1).to(table.dtype)  # -> [B, T, K]
            return torch.einsum("btk,tkc->btc", weights, table.unflatten(0, sizes))


def _split_heads(states: Tensor) -> Tensor:
    return states.unflatten(-1, (DECODER_HEADS, -1)).transpose(1, 2)  # [B, N, H] -> [B, heads, N, H / heads]
