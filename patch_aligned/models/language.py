"""An LLM that reads visual tokens: how likely it finds words after an image, and how it captions it.

Letters: B images, T visual tokens of an image, S tokens up to the image's end, D width, P tokens of a prompt, image
included, N continuations, C tokens of several continuations, M vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

_NAMES_AT_ONCE = 64
"""Continuations of several tokens that are read together: logits are `[B, C, M]`, the largest tensor here."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """What stands before all that is asked about images.

    Attributes:
        embeddings: up to the image's end, `[B, S, D]`, in the LLM's dtype and on its device.
        cache: keys and values of all but the last of them, which is read again: its logits begin an answer.
    """

    embeddings: Tensor
    cache: Any

    def forget_what_follows(self) -> None:
        """Leave the cache as it was before a question."""
        self.cache.crop(self.embeddings.shape[1] - 1 - self.cache.get_seq_length())


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal LLM, and how its prompts are written."""

    model: Any  # of transformers, with sdpa or eager attention
    tokenizer: Any
    prompt_ids: Callable[[str], tuple[list[int], list[int]]]  # an answer's beginning -> ids before and after the image
    stop: str  # text that closes an answer
    stopping: StoppingCriteria  # ends generation there

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer as it stands behind the prompt."""
        (_, after), (_, after_and_answer) = self.prompt_ids(""), self.prompt_ids(text)
        return after_and_answer[len(after) :]

    def see(self, model: Any, images: Sequence[Image.Image]) -> Beginning:
        """Read the visual tokens of images by a `VisionLanguageModel`."""
        return self.read(torch.stack(list(model.visual_tokens(model.encode(images)))))

    @torch.inference_mode()
    def read(self, visual_tokens: Tensor) -> Beginning:
        """Read visual tokens `[B, T, D]` once for all questions about them."""
        before = self._words(torch.tensor(self.prompt_ids("")[0], dtype=torch.long))
        embeddings = torch.cat([before.expand(len(visual_tokens), -1, -1), visual_tokens.to(before)], dim=1)
        read = self.model(inputs_embeds=embeddings[:, :-1], use_cache=True, logits_to_keep=1)
        return Beginning(embeddings, read.past_key_values)

    @torch.inference_mode()
    def log_probabilities(self, seen: Beginning, stem: str, continuations: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability of each continuation after image and stem: the sum over its tokens, teacher forced.

        Args:
            seen: the images.
            stem: beginning of the answer, which is read once, whatever the number of continuations.
            continuations: token ids of each, at least one.

        Returns:
            `[B, N]`, float64.
        """
        prompt = self._prompt(seen, stem)  # [B, P, D]
        batch, length = prompt.shape[:2]
        unread = prompt[:, seen.cache.get_seq_length() :]
        read = self.model(inputs_embeds=unread, past_key_values=seen.cache, use_cache=True, logits_to_keep=1)
        first = precise(read.logits[:, -1]).log_softmax(dim=-1)  # [B, M]
        found = first[:, [ids[0] for ids in continuations]]  # [B, N]
        longer = [number for number, ids in enumerate(continuations) if len(ids) > 1]
        for numbers in (longer[i : i + _NAMES_AT_ONCE] for i in range(0, len(longer), _NAMES_AT_ONCE)):
            known = [torch.tensor(continuations[number]) for number in numbers]
            of = torch.cat([torch.full((len(ids) - 1,), number) for ids, number in zip(known, numbers, strict=True)])
            step = torch.cat([torch.arange(len(ids) - 1) for ids in known])  # [C]
            given, target = (torch.cat([ids[part] for ids in known]) for part in (slice(-1), slice(1, None)))  # [C]
            # Continuations lie side by side behind one prompt: each token sees the prompt and its own continuation.
            sees = (of[:, None] == of) & (step[:, None] >= step)  # [C, C]
            sees = torch.cat([sees.new_ones(len(of), length), sees], dim=1)  # [C, P + C]
            mask = torch.zeros(sees.shape, dtype=prompt.dtype).masked_fill_(~sees, torch.finfo(prompt.dtype).min)
            of, step, given, target, mask = (tensor.to(prompt.device) for tensor in (of, step, given, target, mask))
            logits = self.model(
                inputs_embeds=self._words(given).expand(batch, -1, -1),  # [B, C, D]
                attention_mask=mask.expand(batch, 1, -1, -1),
                position_ids=(length + step).expand(batch, -1),
                past_key_values=seen.cache,
                use_cache=True,
            ).logits  # [B, C, M]
            seen.cache.crop(-len(of))
            logits = precise(logits)
            chosen = logits.gather(2, target.expand(batch, -1).unsqueeze(2)).squeeze(2) - logits.logsumexp(dim=2)
            found.index_add_(1, of, chosen)  # [B, C] -> [B, N]
        seen.forget_what_follows()
        return found.double()

    @torch.inference_mode()
    def captions(self, seen: Beginning, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to the prompt without a stem, one an image."""
        prompt = self._prompt(seen, "")  # [B, P, D]
        ids = GenerationMixin.generate(  # a LLaVA's own `generate` takes ids and pixels
            self.model,
            inputs_embeds=prompt,  # whole: `generate` leaves out as many as the cache holds
            past_key_values=seen.cache,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([self.stopping]),
        )
        seen.forget_what_follows()
        return [text.split(self.stop)[0].strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _prompt(self, seen: Beginning, stem: str) -> Tensor:
        """Append what follows the image: `[B, P, D]`."""
        after = self._words(torch.tensor(self.prompt_ids(stem)[1], dtype=torch.long))
        return torch.cat([seen.embeddings, after.expand(len(seen.embeddings), -1, -1)], dim=1)

    def _words(self, ids: Tensor) -> Tensor:
        table = self.model.get_input_embeddings()
        return table(ids.to(table.weight.device))


def name_bounds(log_p: np.ndarray) -> np.ndarray:
    """Log of a name's probability after a picture over its mean after all pictures: nats, 0 is blind, at most `log P`.

    Its mean over the names that pictures show is a lower bound on what name and picture tell of each other (InfoNCE).
    """
    return log_p - np.logaddexp.reduce(log_p, axis=0) + np.log(len(log_p))


def precise(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
