"""Shared `forward` and `generate` of all multimodal LLMs. The other files in this folder only declare a family.

Letters: B rows, T length of the input ids, L length of the merged batch, D width, M vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.llava_arch import EncodedImages, Images, LlavaMetaForCausalLM
from llava.model.multimodal_merge import (
    MergedBatch,
    attention_of_turns,
    mask_of_padding,
    merge,
    pack,
)
from llava.plugin import AlignmentContext, AuxiliaryOutput
from llava.utils import follow_umask

logger = logging.getLogger(__name__)

# transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


NOT_QUANTISED = ["model.mm_projector", "model.vision_tower", "lm_head"]
"""Modules that 4-bit and 8-bit loading do not quantise; transformers matches prefixes of full names."""


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Model output. `loss` is the caption loss only; a plugin's losses are separate and unweighted."""

    auxiliary_losses: dict[str, Tensor] | None = None
    auxiliary_metrics: dict[str, Tensor] | None = None
    supervised_tokens: Tensor | None = None
    """`[B]`, how many tokens of each row are learned, after truncation."""


class LlavaCausalLM(LlavaMetaForCausalLM, PreTrainedModel, GenerationMixin):
    """Mixin before a text-only `...ForCausalLM`, whose decoder it replaces by `decoder_class`."""

    config_class: Any
    decoder_class: type
    # Otherwise transformers would not divide the loss by the gradient accumulation steps.
    accepts_loss_kwargs = False
    # The tower is loaded from its own folder; its copy in checkpoints of stage 2 is not needed.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\."]  # noqa: RUF012

    def __init__(self, config: Any):
        # The text-only class would first build its own decoder, with billions of unused weights.
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Load as transformers does; bitsandbytes leaves the projector as it is, unless the caller says otherwise."""
        if getattr(quantization_config, "llm_int8_skip_modules", NOT_QUANTISED) is None:
            quantization_config.llm_int8_skip_modules = NOT_QUANTISED
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(*args, **kwargs)

    def get_model(self) -> Any:
        """Return the decoder, which owns the tower and the projector."""
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        plugin_batch: dict[str, Tensor] | None = None,
        sample_ids: list[str] | None = None,
        cache: Any = None,
        auxiliary_only: bool = False,
        turns: Tensor | None = None,
    ) -> LlavaOutput | tuple[Any, ...]:
        """Run the LLM on text and images.

        Args:
            input_ids: `[B, T]` with IMAGE_TOKEN_INDEX (-200) for each image.
            attention_mask: `[B, T]`, true at tokens.
            labels: `[B, T]`, IGNORE_INDEX (-100) at unsupervised positions.
            images: one entry for each `<image>`; see `encode_image_batch`.
            image_sizes: width and height of each original image; required for anyres.
            logits_to_keep: as in transformers: the number of last positions (or the positions) with logits; 0 is all.
            plugin_batch: output of the plugin's `collate`.
            sample_ids: names of the rows in error messages.
            cache: the name of `past_key_values` since transformers 5.24.
            auxiliary_only: compute the plugin's losses alone, without the LLM. The batch says so, and not its labels,
                since under ZeRO-3 all ranks must run the same modules.
            turns: `[B, T]`, the number of the question that each id belongs to, 0 before all questions: questions then
                do not see each other. For prompts padded on the right; flash attention cannot.
            cache_position: unused; callers written for other versions of transformers pass it.

        Returns:
            `LlavaOutput`. In training mode with labels, `logits` is None: `lm_head`, the norm before it and all of the
            last layer behind its attention run on supervised positions only, which for LLaVA's data saves most of their
            cost and memory. Loss and gradients are the same.

        Raises:
            ValueError: the numbers of `<image>` tokens and of images differ; or, in training,
                `tokenizer_model_max_length` would truncate visual tokens.
        """
        auxiliary = AuxiliaryOutput({})
        supervised_tokens = None if labels is None else predicts_label(labels).sum(dim=1)  # [B]
        if auxiliary_only or (inputs_embeds is None and self.needs_merge(input_ids, images)):
            assert input_ids is not None
            encoded = self.encode_image_batch(images, image_sizes) if images is not None else self.encode_dummy()
            padding_side = getattr(self.config, "tokenizer_padding_side", "right")
            merged = merge(
                input_ids,
                encoded.tokens,
                self.get_input_embeddings(),
                attention_mask=attention_mask,
                turns=turns,
                labels=labels,
                padding_side=padding_side,
                max_length=getattr(self.config, "tokenizer_model_max_length", None),
            )
            if self.training and merged.truncated_rows:
                names = [sample_ids[row] if sample_ids else f"row {row} of the batch" for row in merged.truncated_rows]
                raise ValueError(
                    f"model_max_length {self.config.tokenizer_model_max_length} cuts visual tokens off in "
                    f"{', '.join(names)}. Raise --model_max_length, or shorten the text before the image."
                )
            supervised_tokens = predicts_label(merged.labels).sum(dim=1)  # [B]; a packed row has several samples
            if self.plugin is not None and plugin_batch is not None:
                auxiliary = self.plugin.auxiliary_losses(self.alignment_context(encoded, merged), plugin_batch)
            is_packed = self.get_model().packs_samples and self.training
            if is_packed:
                lengths = merged.attention_mask.sum(dim=1)  # [B]
                # Flash attention skips what samples do not see. Others compute it: rows stay as long as the longest.
                is_one_row = self.config._attn_implementation == "flash_attention_2"
                merged, use_cache = pack(merged, int(lengths.sum() if is_one_row else lengths.max())), False
            input_ids, inputs_embeds = None, merged.inputs_embeds
            if self.training and not encoded.tokens:
                inputs_embeds = inputs_embeds + encoded.base_tiles.sum()  # adds 0, but connects the projector
            if turns is not None:
                attention_mask, position_ids = attention_of_turns(merged)
            elif is_packed:  # without a mask, transformers separates samples where positions restart
                attention_mask, position_ids = None, merged.position_ids
            elif self.training and self.config._attn_implementation == "sdpa" and padding_side == "right":
                attention_mask = position_ids = None  # causal attention alone hides padding, and skips what it hides
            else:
                attention_mask, position_ids = merged.attention_mask, merged.position_ids
            labels = None if labels is None else merged.labels
            if auxiliary_only:
                # Adds 0, but connects all that is trained: DDP expects a gradient for each weight.
                nothing = (inputs_embeds * 0).sum()
                return LlavaOutput(nothing, auxiliary_losses=auxiliary.losses, auxiliary_metrics=auxiliary.metrics)

        reads_all = not self.training or output_hidden_states
        with nullcontext() if reads_all or labels is None else self.computing_at(labels):
            decoded = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                **{CACHE: past_key_values if cache is None else cache},
            )
        hidden = decoded.last_hidden_state  # [B, L, D]

        loss = logits = None
        if self.training and labels is not None:
            loss = self.supervised_loss(hidden, labels)
        else:
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, positions])  # [B, L or fewer, M]
            if labels is not None:
                loss = token_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        output = LlavaOutput(
            loss=loss,
            logits=logits,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            auxiliary_losses=auxiliary.losses or None,
            auxiliary_metrics=auxiliary.metrics or None,
            supervised_tokens=supervised_tokens,
            **{CACHE: decoded.get(CACHE)},
        )
        return output.to_tuple() if return_dict is False else output

    def needs_merge(self, input_ids: Tensor | None, images: Images | None) -> bool:
        """Whether text and images must be merged: there are images, or it is a training batch."""
        if self.get_vision_tower() is None or input_ids is None:
            return False
        if images is not None:
            return input_ids.shape[1] > 1  # upstream parity: a single id is a decoding step with the image in the cache
        return self.training or bool((input_ids == IMAGE_TOKEN_INDEX).any())

    def encode_dummy(self) -> EncodedImages:
        """Return the encoding of a batch without images.

        In training, a dummy image runs through tower and projector: a rank that skips them would block the others.
        """
        if not self.training:
            return EncodedImages([], torch.empty(0, device=self.device))
        side = self.get_model().vision_tower.image_side
        dummy = torch.zeros(1, 3, side, side, device=self.device)
        if self.reads_features:  # no rank runs the tower
            tower = self.get_model().vision_tower
            dummy = tower.dummy_feature.expand(tower.num_patches + (tower.select_feature == "cls_patch"), -1)[None]
        tokens = self.arrange_tiles(self.encode_images(dummy), (side, side))  # [S or S + 1, D]
        return EncodedImages([], tokens[None][:0])  # [0, S, D], still connected to the projector

    def alignment_context(self, encoded: EncodedImages, merged: MergedBatch) -> AlignmentContext:
        """Build the plugin's context: the images that belong to a row, in the order of the rows."""
        rows, cols = self.visual_grid
        used = [(image, row) for row, images in enumerate(merged.image_of_row) for image in images]
        device = encoded.base_tiles.device
        images = torch.tensor([image for image, _ in used], dtype=torch.long, device=device)
        return AlignmentContext(
            visual_tokens=encoded.base_tiles[images, -rows * cols :],  # [N, S, D]; drops the CLS of `cls_patch`
            sample_of_image=torch.tensor([row for _, row in used], dtype=torch.long, device=device),
            grid=(rows, cols),
            embed_words=self.get_input_embeddings(),
        )

    @contextmanager
    def computing_at(self, labels: Tensor) -> Iterator[None]:
        """Let what follows the last layer's attention run on positions that predict a label, `[B, L]`; others give 0.

        The final norm alone does with gradient checkpointing, where backward runs the layer again when this has ended,
        and with dropout, as in LoRA, which would draw other random numbers.
        """
        predicts = predicts_label(labels)  # [B, L]
        chosen = predicts.flatten().nonzero().flatten()  # [n]

        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            return inputs[0].flatten(0, 1).index_select(0, chosen)  # [B, L, D] -> [n, D]

        def scatter(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            everywhere = output.new_zeros(predicts.numel(), output.shape[1])  # [B * L, D]
            return everywhere.index_copy(0, chosen, output).view(*predicts.shape, -1)  # [B, L, D]

        layer, modules = self.model.layers[-1], [self.model.norm]
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
        if not (drops or getattr(layer, "gradient_checkpointing", False)):
            modules += [layer.self_attn.o_proj, layer.mlp]
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(gather))
                hooks.enter_context(module.register_forward_hook(scatter))
            yield

    def supervised_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross entropy from states `[B, L, D]`, with logits only where they predict a label."""
        predicts = predicts_label(labels)  # [B, L]
        return token_loss(self.lm_head(hidden[predicts]), labels.roll(-1, dims=1)[predicts])

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate answers to prompts about images. Answers do not depend on the batch.

        Args:
            inputs: `[B, T]` prompt ids (also accepted as `input_ids`) with -200 for each image.
            images: one entry for each `<image>`, in any float dtype; None for text only.
            image_sizes: width and height of each original image; required for anyres.
            **kwargs: `attention_mask` `[B, T]` for padded prompts (on either side), and all arguments of transformers'
                `generate`. Without a mask, padding ids at the ends of a batch's rows count as padding.

        Returns:
            The new tokens, without the prompt.

        Raises:
            NotImplementedError: `inputs_embeds` is given.
            ValueError: the ids are not a batch, or the numbers of `<image>` tokens and of images differ.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise NotImplementedError("`inputs_embeds` is not supported: pass ids and images.")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate() needs prompt ids: pass `inputs`.")
        kwargs.pop("position_ids", None)  # they follow from the mask
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None and input_ids.dim() == 2 and len(input_ids) > 1:
            attention_mask = self._mask_of_unmasked_batch(input_ids, kwargs.get("pad_token_id"))
        has_images = images is not None and self.get_vision_tower() is not None
        merged = merge(
            input_ids,
            self.encode_image_batch(images, image_sizes).tokens if has_images else [],  # type: ignore[arg-type]
            self.get_input_embeddings(),
            attention_mask=attention_mask,
            padding_side="left",  # new tokens must follow the prompt in every row
        )
        return super().generate(  # type: ignore[misc]
            inputs_embeds=merged.inputs_embeds,
            attention_mask=merged.attention_mask.long(),
            position_ids=merged.position_ids,
            **kwargs,
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what `forward` takes of it: `generate` also passes on what it was called with, such as a tokenizer."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return {name: value for name, value in inputs.items() if name in signature(self.forward).parameters}

    def _mask_of_unmasked_batch(self, input_ids: Tensor, padding: int | None) -> Tensor | None:
        """The mask that padding at the ends of rows implies; None, with a warning, where no id stands for it alone."""
        of_config = [getattr(config, "pad_token_id", None) for config in (self.generation_config, self.config)]
        padding = next((token for token in (padding, *of_config) if token is not None), None)
        marks = [self.config.bos_token_id, *torch.tensor([self.config.eos_token_id or []]).flatten().tolist()]
        if padding is None or padding in marks:
            logger.warning("generate(): a batch without `attention_mask`; rows that are padded need one.")
            return None
        return mask_of_padding(input_ids, padding)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, with the tower's weights under the names of upstream's checkpoints.

        Sampling settings are removed from a generation config that does not sample, such as Vicuna's: they have no
        effect, and transformers 5 refuses to write them.
        """
        if not self.generation_config.do_sample:
            self.generation_config.temperature = self.generation_config.top_p = self.generation_config.top_k = None
        state_dict = self.state_dict() if state_dict is None else state_dict
        tower = self.get_vision_tower()
        renamed = {tower.checkpoint_name(name) if tower else name: tensor for name, tensor in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict=renamed, **kwargs)
        if is_main_process:
            follow_umask(Path(save_directory))


def predicts_label(labels: Tensor) -> Tensor:
    """Return which positions `[B, L]` predict a label: position i predicts the token at i + 1."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross entropy of `[n, M]` in float32 over targets but IGNORE_INDEX; 0, with a graph, if none."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


class ReadableByTransformers4:
    """Mixin before an LLM's config class that also writes settings under the names of transformers 4.

    Upstream runs on transformers 4.37, which ignores unknown names and uses defaults: a checkpoint with another RoPE
    base or scaling would load without an error, and give nonsense.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values for config.json."""
        written: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        rope = {key: value for key, value in (written.get("rope_parameters") or {}).items() if key != "type"}
        if "rope_theta" in rope:
            written["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type") in ("linear", "dynamic"):  # the types that 4.37 supports, in its format
            written["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        elif rope.get("rope_type", "default") != "default":
            written["rope_scaling"] = rope
        if written.get("dtype"):
            written["torch_dtype"] = written["dtype"]
        return written
