"""One `forward` and one `generate` for all LLMs. The files beside this one only name a family.

Letters: B rows, T length of the ids as they come in, L length of the merged batch, D width, M vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.llava_arch import EncodedImages, Images, LlavaMetaForCausalLM
from llava.model.multimodal_merge import MergedBatch, TruncatedImageError, merge
from llava.plugin import AlignmentContext, AuxiliaryOutput


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """`loss` is the caption loss alone. A plugin's losses stand beside it, unweighted; the trainer sums them."""

    auxiliary_losses: dict[str, Tensor] | None = None
    auxiliary_metrics: dict[str, Tensor] | None = None


class LlavaCausalLM(LlavaMetaForCausalLM, PreTrainedModel, GenerationMixin):
    """Comes before a text-only `...ForCausalLM` among the bases, and puts `decoder_class` in its decoder's place."""

    decoder_class: type
    # transformers stops dividing by gradient accumulation for models that say they do it themselves.
    accepts_loss_kwargs = False
    # The tower is read from its own folder; checkpoints of stage 2 hold a copy that is not needed.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\."]  # noqa: RUF012

    def __init__(self, config: Any):
        # The text-only class would first build its own decoder, billions of weights to be thrown away.
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> Any:
        """The decoder that owns the tower and the projector."""
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
    ) -> LlavaOutput | tuple[Any, ...]:
        """Runs the LLM over text and images.

        Args:
            input_ids: `[B, T]` with IMAGE_TOKEN_INDEX (-200) where an image belongs.
            attention_mask: `[B, T]`, true at tokens.
            labels: `[B, T]`, IGNORE_INDEX (-100) where nothing is to be learned.
            images: one entry for each `<image>`; see `encode_image_batch`.
            image_sizes: width and height of each original image; needed for anyres.
            logits_to_keep: as in transformers: how many last positions (or which) get logits; 0 is all.
            plugin_batch: what the plugin's `collate` returned.
            sample_ids: what to call the rows in errors.
            cache_position: accepted for callers written against older versions of transformers; not needed.

        Returns:
            `LlavaOutput`. In training mode with labels, `logits` is None: only supervised positions pass the `lm_head`,
            which for LLaVA's data saves most of its cost and memory. Loss and gradients are the same.

        Raises:
            ValueError: the numbers of `<image>` tokens and of images differ.
            TruncatedImageError: in training, `tokenizer_model_max_length` would cut visual tokens off.
        """
        auxiliary = AuxiliaryOutput({})
        if inputs_embeds is None and self.needs_merge(input_ids, images):
            assert input_ids is not None
            encoded = self.encode_image_batch(images, image_sizes) if images is not None else self.encode_dummy()
            merged = merge(
                input_ids,
                encoded.tokens,
                self.get_input_embeddings(),
                attention_mask=attention_mask,
                labels=labels,
                padding_side=getattr(self.config, "tokenizer_padding_side", "right"),
                max_length=getattr(self.config, "tokenizer_model_max_length", None),
            )
            if self.training and merged.truncated_rows:
                raise TruncatedImageError(merged.truncated_rows, self.config.tokenizer_model_max_length, sample_ids)
            if self.plugin is not None and plugin_batch is not None:
                auxiliary = self.plugin.auxiliary_losses(self.alignment_context(encoded, merged), plugin_batch)
            input_ids, inputs_embeds = None, merged.inputs_embeds
            if self.training and not encoded.tokens:
                inputs_embeds = inputs_embeds + encoded.base_tiles.sum()  # adds 0, and a path to the projector
            attention_mask, position_ids = merged.attention_mask, merged.position_ids
            labels = None if labels is None else merged.labels

        decoded = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
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
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            auxiliary_losses=auxiliary.losses or None,
            auxiliary_metrics=auxiliary.metrics or None,
        )
        return output.to_tuple() if return_dict is False else output

    def needs_merge(self, input_ids: Tensor | None, images: Images | None) -> bool:
        """Whether embeddings have to be put together here: there are images, or a training batch that might have."""
        if self.get_vision_tower() is None or input_ids is None:
            return False
        if images is not None:
            return input_ids.shape[1] > 1  # upstream parity: a single id is a decoding step, its image is in the cache
        return self.training or bool((input_ids == IMAGE_TOKEN_INDEX).any())

    def encode_dummy(self) -> EncodedImages:
        """Stands in for images where a batch has none.

        In training, one dummy passes tower and projector: a rank that skipped them would hang the others.
        """
        if not self.training:
            return EncodedImages([], torch.empty(0, device=self.device))
        side = self.get_model().vision_tower.image_side
        dummy = torch.zeros(1, 3, side, side, device=self.device)
        tokens = self.arrange_tiles(self.encode_images(dummy), (side, side))  # [S or S + 1, D]
        return EncodedImages([], tokens[None][:0])  # [0, S, D], still connected to the projector

    def alignment_context(self, encoded: EncodedImages, merged: MergedBatch) -> AlignmentContext:
        """What the plugin sees: the images that belong to a row, in the order of the rows."""
        rows, cols = self.visual_grid
        used = [(image, row) for row, images in enumerate(merged.image_of_row) for image in images]
        device = encoded.base_tiles.device
        images = torch.tensor([image for image, _ in used], dtype=torch.long, device=device)
        return AlignmentContext(
            visual_tokens=encoded.base_tiles[images, -rows * cols :],  # [N, S, D]; `cls_patch` has CLS in front
            sample_of_image=torch.tensor([row for _, row in used], dtype=torch.long, device=device),
            grid=(rows, cols),
            embed_words=self.get_input_embeddings(),
        )

    def supervised_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over supervised positions; logits are computed at these alone.

        Args:
            hidden: `[B, L, D]`.
            labels: `[B, L]`.
        """
        targets = labels[:, 1:]  # position i predicts the token at i + 1
        supervised = targets != IGNORE_INDEX
        return token_loss(self.lm_head(hidden[:, :-1][supervised]), targets[supervised])

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers prompts about images; a batch gives the same answers as its rows one by one.

        Args:
            inputs: `[B, T]` prompt ids (also accepted as `input_ids`) with -200 where an image belongs.
            images: one entry for each `<image>`, in any float dtype; None for text alone.
            image_sizes: width and height of each original image; needed for anyres.
            **kwargs: `attention_mask` `[B, T]` for padded prompts (padding may be on either side), and everything that
                transformers' `generate` takes.

        Returns:
            The new tokens alone, without the prompt.

        Raises:
            NotImplementedError: `inputs_embeds` is given.
            ValueError: the numbers of `<image>` tokens and of images differ.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise NotImplementedError("`inputs_embeds` is not supported: pass ids and images.")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate() needs prompt ids: pass `inputs`.")
        kwargs.pop("position_ids", None)  # they follow from the mask
        tower = self.get_vision_tower()
        has_images = images is not None and tower is not None
        merged = merge(
            input_ids,
            self.encode_image_batch(images, image_sizes).tokens if has_images and images is not None else [],
            self.get_input_embeddings(),
            attention_mask=kwargs.pop("attention_mask", None),
            padding_side="left",  # new tokens follow the prompt in every row, whatever side training pads
        )
        return super().generate(  # type: ignore[misc]
            inputs_embeds=merged.inputs_embeds,
            attention_mask=merged.attention_mask.long(),
            position_ids=merged.position_ids,
            **kwargs,
        )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """transformers' `save_pretrained`, with the tower under the names that upstream's checkpoints use.

        Settings of sampling are left out of a generation config that does not sample, as Vicuna's: they have no effect,
        and transformers 5 refuses to write them.
        """
        if not self.generation_config.do_sample:
            self.generation_config.temperature = self.generation_config.top_p = self.generation_config.top_k = None
        state_dict = self.state_dict() if state_dict is None else state_dict
        tower = self.get_vision_tower()
        renamed = {tower.checkpoint_name(name) if tower else name: tensor for name, tensor in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict=renamed, **kwargs)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in float32 over targets that are not IGNORE_INDEX; 0, with a graph, where there are none.

    Args:
        logits: `[n, M]`.
        targets: `[n]`.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


# What config.json says for readers of other versions.


class ReadableByTransformers4:
    """Mixed in before an LLM's config class: what transformers 5 has renamed is written under its old name too.

    Upstream runs on transformers 4.37, which passes over names it does not know and takes its defaults: a checkpoint of
    another RoPE base or scaling would be read without an error, and answer nonsense.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        """The values for config.json."""
        written: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        rope = {key: value for key, value in (written.get("rope_parameters") or {}).items() if key != "type"}
        if "rope_theta" in rope:
            written["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type") in ("linear", "dynamic"):  # those that 4.37 knows, in the form that it insists on
            written["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        elif rope.get("rope_type", "default") != "default":
            written["rope_scaling"] = rope
        if written.get("dtype"):
            written["torch_dtype"] = written["dtype"]
        return written
