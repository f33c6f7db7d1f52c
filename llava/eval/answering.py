"""The generation loop: `answer_questions` answers questions about images in their order, at any batch size.

Letters: B questions of a batch, T length of the longest prompt.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llava.conversation import Conversation
from llava.eval.prefix_sharing import generate_sharing
from llava.eval.vqa_files import (
    Answer,
    GenerationSettings,
    ImageSource,
    Question,
    open_image,
    prompt_of,
    require_images,
    require_positive,
)
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token

__all__ = ["Answer", "GenerationSettings", "ImageSource", "Question", "answer_questions", "prompt_of"]

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
WINDOW_BATCHES = 16


def answer_questions(
    questions: Sequence[Question],
    tokenizer: Any,
    model: Any,
    image_processor: Any,
    conversation: Conversation,
    settings: GenerationSettings = GenerationSettings(),  # noqa: B008 - it is frozen
    *,
    batch_size: int = 1,
    workers: int = 4,
) -> Iterator[Answer]:
    """Return the answers, in the order of the questions. Greedy answers do not depend on the batch size.

    Questions of a batch that share their images share the computation on them: see `prefix_sharing`.

    Args:
        questions: with images or without, in any mixture.
        tokenizer, model, image_processor: as `load_pretrained_model` returns them.
        conversation: an entry of `conv_templates`, such as `conv_templates["plain"]` after stage 1.
        settings: settings of generation; greedy by default.
        batch_size: questions answered at once; halved, with a warning, if the device runs out of memory.
        workers: threads that read and process the images of the next batches.

    Raises:
        FileNotFoundError: an image is missing; checked before the first answer, as is the next.
        ValueError: a number is below 1, or the model has no vision tower.
    """
    require_positive(batch_size=batch_size, workers=workers)
    with_marks = bool(getattr(model.config, "mm_use_im_start_end", False))
    prompts = [prompt_of(question, conversation, with_marks) for question in questions]
    require_images(questions)
    if image_processor is None:
        raise ValueError("The model has no vision tower; load a LLaVA checkpoint.")
    answerer = _Answerer(tokenizer, model, image_processor, conversation, settings)
    return answerer.answers(questions, prompts, batch_size, workers)


class _Row(NamedTuple):
    """A question with its position, its prompt and the prompt's ids."""

    position: int
    question: Question
    prompt: str
    ids: list[int]


_Loading = dict[Any, Future[tuple[Tensor, tuple[int, int]]]]
"""Distinct images of a batch by `key_of`: pixels for the tower, and width and height of the original."""


class _Answerer:
    """State shared by all batches."""

    def __init__(
        self, tokenizer: Any, model: Any, image_processor: Any, conversation: Conversation, settings: GenerationSettings
    ):
        self.tokenizer = tokenizer
        self.model = model
        self.image_processor = image_processor
        self.settings = settings
        self.at_once = sys.maxsize  # questions; fewer than a batch after running out of memory
        self.longest = getattr(model.config, "max_position_embeddings", sys.maxsize)
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        stop_ids = tokenizer(conversation.stop_string, add_special_tokens=False).input_ids
        ends_by_itself = len(stop_ids) == 1 and stop_ids[0] in self.ends
        self.stop_string = None if ends_by_itself else conversation.stop_string

    def answers(
        self, questions: Sequence[Question], prompts: Sequence[str], batch_size: int, workers: int
    ) -> Iterator[Answer]:
        """Yield answers in order; batches may be in another."""
        early: dict[int, Answer] = {}
        next_position = 0
        for rows, loading in self._with_images(self._batches(questions, prompts, batch_size), workers):
            for row, text in zip(rows, self._texts(rows, loading), strict=True):
                early[row.position] = Answer(row.question, row.prompt, text)
            while next_position in early:
                yield early.pop(next_position)
                next_position += 1

    def _batches(self, questions: Sequence[Question], prompts: Sequence[str], batch_size: int) -> Iterator[list[_Row]]:
        """Yield batches of questions that are close together and have equally many images, for little padding."""
        window = batch_size * WINDOW_BATCHES
        for start in range(0, len(questions), window):
            rows = [
                _Row(index, questions[index], prompts[index], tokenizer_image_token(prompts[index], self.tokenizer))  # type: ignore[arg-type]
                for index in range(start, min(start + window, len(questions)))
            ]
            # Sort text by length. Questions about one image stay together.
            rows.sort(key=lambda row: (len(row.question.images), 0 if row.question.images else len(row.ids)))
            for first in range(0, len(rows), batch_size):
                yield rows[first : first + batch_size]

    def _with_images(self, batches: Iterator[list[_Row]], workers: int) -> Iterator[tuple[list[_Row], _Loading]]:
        """Yield batches with their images, which threads prepare while earlier batches are answered."""
        waiting: deque[tuple[list[_Row], _Loading]] = deque()
        last: _Loading = {}  # the next batch may ask about the same image
        pool = ThreadPoolExecutor(workers)
        try:
            for rows in batches:
                shown = {key_of(image): (image, row.question) for row in rows for image in row.question.images}
                last = {key: last.get(key) or pool.submit(self._load, *image) for key, image in shown.items()}
                waiting.append((rows, last))
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, source: ImageSource, question: Question) -> tuple[Tensor, tuple[int, int]]:
        image = open_image(source, f"question {question.question_id!r}")
        return process_images([image], self.image_processor, self.model.config)[0], image.size

    def _texts(self, rows: list[_Row], loading: _Loading) -> list[str]:
        texts: list[str] = []
        while len(texts) < len(rows):
            part = rows[len(texts) : len(texts) + self.at_once]
            try:
                texts += self._generate(part, loading)
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the batch's tensors alive
            self.at_once = len(part) // 2
            logger.warning("%d questions at once are too many for the device's memory: now %d", len(part), self.at_once)
        return texts

    @torch.inference_mode()
    def _generate(self, rows: list[_Row], loading: _Loading) -> list[str]:
        shown = [[key_of(image) for image in row.question.images] for row in rows]
        keys = list(dict.fromkeys(key for row in shown for key in row))
        images = [loading[key].result() for key in keys]
        images_of_row = [[keys.index(key) for key in row] for row in shown]
        self._warn_of_long_prompts(rows, [[images[i][1] for i in row] for row in images_of_row])
        options = self.settings.options()
        if self.stop_string is not None:
            no_prompt = torch.empty(len(rows), 0, dtype=torch.long)  # `generate` passes only new tokens
            options["stopping_criteria"] = [KeywordsStoppingCriteria([self.stop_string], self.tokenizer, no_prompt)]
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(self.settings.seed + zlib.crc32(str(rows[0].question.question_id).encode()))
            new_ids = generate_sharing(
                self.model,
                [row.ids for row in rows],
                [pixels for pixels, _ in images],
                [size for _, size in images],
                images_of_row,
                pad_token_id=self.padding,
                **options,
            )
        return [self._text(ids) for ids in new_ids.tolist()]

    def _warn_of_long_prompts(self, rows: list[_Row], image_sizes: list[list[tuple[int, int]]]) -> None:
        for row, sizes in zip(rows, image_sizes, strict=True):
            length = len(row.ids) + sum(self.model.visual_tokens_of(size) - 1 for size in sizes)
            if length > self.longest:  # warn once per record length, not for each long prompt
                logger.warning(
                    "question %r: its prompt has %d tokens, images included, and the model knows %d positions; "
                    "answers will be unreliable",
                    row.question.question_id,
                    length,
                    self.model.config.max_position_embeddings,
                )
                self.longest = length

    def _text(self, ids: list[int]) -> str:
        """Decode an answer's ids up to its end; after that there is only padding."""
        ended = next((index for index, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.tokenizer.decode(ids[:ended], skip_special_tokens=True)
        return (text.split(self.stop_string)[0] if self.stop_string is not None else text).strip()


def key_of(image: ImageSource) -> Any:
    """Equal for images that need to be read once."""
    return id(image) if isinstance(image, Image.Image) else image
