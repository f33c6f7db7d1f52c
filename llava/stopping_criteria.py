"""The stopping criteria of LLaVA's answers. Its public place is `llava.mm_utils`, which must cost no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops a row once its answer ends with a keyword's ids, or its last few tokens decode to text with a keyword.

    Rows of a batch stop independently. `generate` may pass prompt and answer, or the answer alone, as it does when
    called with embeddings.

    Args:
        keywords: texts that end an answer.
        tokenizer: tokenizer of the LLM.
        input_ids: ids of the prompts, `[rows, prompt length]`.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: Tensor):
        self.keywords = list(keywords)
        self.keyword_ids: list[Tensor] = []
        for keyword in self.keywords:
            ids = tokenizer(keyword).input_ids
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(torch.tensor(ids, dtype=torch.long))
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)
        self.tokenizer = tokenizer
        self.prompt_ids = input_ids
        self.start_len = input_ids.shape[1]

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Return which answers are complete, bool `[rows]`."""
        answers = input_ids[:, self.start_len :] if self._has_prompt(input_ids) else input_ids
        finished = [self._is_finished(answer) for answer in answers]
        return torch.tensor(finished, dtype=torch.bool, device=input_ids.device)

    def _has_prompt(self, input_ids: Tensor) -> bool:
        prompts = self.prompt_ids.to(input_ids.device)
        if not self.start_len or input_ids.shape[1] < self.start_len or input_ids.shape[0] % prompts.shape[0]:
            return False
        rows_per_prompt = input_ids.shape[0] // prompts.shape[0]  # beams, or several answers to one prompt
        return torch.equal(input_ids[:, : self.start_len], prompts.repeat_interleave(rows_per_prompt, dim=0))

    def _is_finished(self, answer: Tensor) -> bool:
        last = answer[-self.max_keyword_len :].tolist() if self.max_keyword_len else []
        if any(last[-len(ids) :] == ids.tolist() for ids in self.keyword_ids if len(ids)):
            return True
        text = self.tokenizer.decode(last, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
