"""Mixins that add a vision tower and a projector to an LLM.

Letters: N images, t tiles of an image (1 without anyres), S visual tokens of a tile, D width of the LLM.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_merge import arrange_tiles, merge, unpad_image
from llava.model.multimodal_projector.builder import build_vision_projector, record_projector
from llava.model.weights import gathered, load_projector, read_projector_file
from llava.plugin import TrainingPlugin

__all__ = ["EncodedImages", "LlavaMetaForCausalLM", "LlavaMetaModel", "start_at_mean", "unpad_image"]

Images = Tensor | list[Tensor]


@dataclass(frozen=True)
class EncodedImages:
    """Projector outputs of a batch's images."""

    tokens: list[Tensor]  # each [*, D], as the LLM reads them
    base_tiles: Tensor  # [N, S, D], the full images


class LlavaMetaModel:
    """Mixin that adds a vision tower and a projector to an LLM's decoder. It comes before the decoder's class.

    If the config names a tower, the constructor builds both, so that a checkpoint's projector can be loaded. The
    tower's weights are loaded later, by `get_vision_tower().load_model()`, from their own folder.
    """

    config: Any
    vision_tower: VisionTower
    mm_projector: nn.Module
    packs_samples = False
    """Whether training puts several samples of a batch into a row (`--pack_samples`)."""

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in getattr(config, "mm_patch_merge_type", ""):
                self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self) -> VisionTower | None:
        """Return the vision tower, or None for a model without vision."""
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        """Build tower and projector at the start of training as the flags say, and record them in the config.

        `fsdp` is unused; accepted for upstream's callers.
        """
        # Also rebuild the tower of a LLaVA: the flags may give another path.
        self.vision_tower = build_vision_tower(model_args)

        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.use_mm_proj = True
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        record_projector(config, model_args, self.vision_tower)

        if not hasattr(self, "mm_projector"):
            self.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type and not hasattr(self, "image_newline"):
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        # LoRA has frozen all weights before; the projector is always fully trained.
        self.mm_projector.requires_grad_(True)

        if source := getattr(model_args, "pretrain_mm_mlp_adapter", None):
            state = read_projector_file(source)
            load_projector(self.mm_projector, state, source)
            newline = state.get("model.image_newline")
            if newline is not None and hasattr(self, "image_newline"):
                with gathered([self.image_newline]), torch.no_grad():
                    self.image_newline.copy_(newline)


class LlavaMetaForCausalLM(ABC):
    """Mixin with the multimodal methods of an LLM. It comes before the text-only class."""

    config: Any
    plugin: TrainingPlugin | None = None
    reads_features: bool = False
    """Whether batches bring the tower's outputs in place of pixels (`--cache_features`)."""

    @abstractmethod
    def get_model(self) -> Any:
        """Return the decoder, which owns the tower and the projector."""

    def get_vision_tower(self) -> VisionTower | None:
        """Return the vision tower, or None for a model without vision."""
        return self.get_model().get_vision_tower()

    @property
    def visual_grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of an image's visual tokens."""
        projector_grid = getattr(self.get_model().mm_projector, "grid", None)
        side = self.get_model().vision_tower.num_patches_per_side
        return projector_grid or (side, side)

    def visual_tokens_of(self, image_size: tuple[int, int]) -> int:
        """Return the number of visual tokens of an image of `image_size` (width, height), including tiles."""
        rows, cols = self.visual_grid
        tiles = 1
        if getattr(self.config, "image_aspect_ratio", None) == "anyres":
            tiles += math.prod(self.tile_grid(image_size))
        shape = torch.empty(tiles, rows * cols, self.config.hidden_size, device="meta")  # [t, S, D], no memory
        return len(self.arrange_tiles(shape, image_size))

    def attach_plugin(self, plugin: TrainingPlugin | None) -> None:
        """Attach a plugin, which computes its losses inside `forward`."""
        self.plugin = plugin

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode and project images `[N, 3, H, W]`, or project features `[N, S, C]` of a cache: -> `[N, S, D]`."""
        features = images if images.dim() == 3 else self.get_model().vision_tower.encode(images)  # [N, S, C]
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), None)
        return projector(features if weight is None else features.to(weight.dtype))  # [N, S, D]

    def encode_image_batch(self, images: Images, image_sizes: list[tuple[int, int]] | None = None) -> EncodedImages:
        """Encode images in one pass of the tower: `[N, 3, H, W]`, with tiles `[N, t, 3, H, W]`, or a list of images.

        `image_sizes` (width, height) of the original images are required for spatially arranged tiles.
        """
        may_be_tiled = isinstance(images, list) or images.dim() == 5
        tiled = [image if image.dim() == 4 else image[None] for image in images]  # each [t, 3, H, W]
        counts = [len(tiles) for tiles in tiled]
        encoded = self.encode_images(torch.cat(tiled))  # [sum t, S, D]
        of_image = encoded.split(counts)  # each [t, S, D]
        return EncodedImages(
            tokens=[
                self.arrange_tiles(tiles, image_sizes[i] if image_sizes else None) if may_be_tiled else tiles[0]
                for i, tiles in enumerate(of_image)
            ],
            base_tiles=torch.stack([tiles[0] for tiles in of_image]),
        )

    def arrange_tiles(self, tiles: Tensor, original_size: tuple[int, int] | None) -> Tensor:
        """Arrange one image's tokens according to the config's `mm_patch_merge_type`, `[*, D]`."""
        newline = getattr(self.get_model(), "image_newline", None)
        if newline is not None:  # counting tokens (meta device) must not gather, or ranks without images would hang
            newline = tiles[0, 0] if tiles.is_meta else gathered_in_forward(newline, self).to(tiles.device)  # [D]
        return arrange_tiles(
            tiles,
            getattr(self.config, "mm_patch_merge_type", "flat"),
            tile_grid=lambda: self.tile_grid(original_size),
            original_size=original_size,
            newline=newline,
        )

    def tile_grid(self, original_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the number of tiles across and down of an image."""
        if self.config.image_aspect_ratio != "anyres":
            merge_type = self.config.mm_patch_merge_type
            raise NotImplementedError(
                f"mm_patch_merge_type `{merge_type}` arranges the tiles of image_aspect_ratio `anyres`; the config "
                f"says `{self.config.image_aspect_ratio}`. Set mm_patch_merge_type to `flat`."
            )
        if original_size is None:
            raise ValueError("image_aspect_ratio `anyres` needs image_sizes, one (width, height) per image.")
        side = self.get_model().vision_tower.image_side
        return get_anyres_image_grid_shape(original_size, self.config.image_grid_pinpoints, side)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
        """Merge text and images under upstream's name and conventions.

        Returns:
            `(input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels)`. Without a tower or
            images, or at a decoding step, the arguments are returned unchanged. Otherwise `input_ids` is None, and the
            merged batch is padded on `config.tokenizer_padding_side` and truncated to
            `config.tokenizer_model_max_length`. Positions, mask and labels are returned only if they were given.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        merged = merge(
            input_ids,
            self.encode_image_batch(images, image_sizes).tokens,
            self.get_input_embeddings(),  # type: ignore[attr-defined]
            attention_mask=attention_mask,
            labels=labels,
            padding_side=getattr(self.config, "tokenizer_padding_side", "right"),
            max_length=getattr(self.config, "tokenizer_model_max_length", None),
        )
        return (
            None,
            None if position_ids is None else merged.position_ids,
            None if attention_mask is None else merged.attention_mask.to(attention_mask.dtype),
            past_key_values,
            merged.inputs_embeds,
            None if labels is None else merged.labels,
        )

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the tokens of `mm_use_im_patch_token` and `mm_use_im_start_end`, and their rows.

        New rows are initialised to the mean of the old ones. With start and end tokens, stage 1 also trains the word
        embeddings, since the new rows would otherwise keep this value.
        """
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            self.resize_token_embeddings(len(tokenizer))  # type: ignore[attr-defined]
        if not model_args.mm_use_im_start_end:
            return
        added = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        self.resize_token_embeddings(len(tokenizer))  # type: ignore[attr-defined]
        tables = [self.get_input_embeddings().weight, self.get_output_embeddings().weight]  # type: ignore[attr-defined]
        start_at_mean(tables, added)
        if model_args.tune_mm_mlp_adapter:
            tables[0].requires_grad_(True)
            tables[1].requires_grad_(tables[1] is tables[0])
        if source := model_args.pretrain_mm_mlp_adapter:
            rows = read_projector_file(source).get("model.embed_tokens.weight")
            if rows is not None and added:
                with gathered(tables[:1]), torch.no_grad():
                    tables[0][-added:] = rows[-added:]


def gathered_in_forward(parameter: nn.Parameter, module: Any) -> nn.Parameter:
    """Gather a parameter that `module` reads but does not own, which ZeRO-3 would not do. A no-op without ZeRO-3.

    From the second forward pass on, ZeRO-3 gathers it together with the module's own parameters.
    """
    if hasattr(parameter, "ds_id") and not parameter.numel():
        import deepspeed

        deepspeed.zero.register_external_parameter(module, parameter)
        parameter.all_gather()  # type: ignore[attr-defined]
    return parameter


def start_at_mean(tables: list[nn.Parameter], added: int) -> None:
    """Set the last `added` rows of each table `[M, D]` to the mean of the other rows."""
    if not added:
        return
    with gathered(tables), torch.no_grad():
        for table in tables:
            table[-added:] = table[:-added].mean(dim=0, keepdim=True)
