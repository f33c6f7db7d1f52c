"""The one generation loop: questions about images go in, answers come out in their order, whatever the batch.

Everything in this package that lets a checkpoint answer a list of questions goes through `answer_questions`.

Letters: B questions of a batch, T length of the longest prompt.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llava.conversation import Conversation
from llava.eval.questions import Answer, ImageSource, Question, open_image, prompt_of, require_images
from llava.eval.shared_beginnings import generate_sharing
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token

__all__ = ["Answer", "GenerationSettings", "ImageSource", "Question", "answer_questions", "prompt_of"]

BATCHES_AHEAD = 2
WINDOW_BATCHES = 16


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draws come from the likeliest tokens with this share of the probability; None is all of them.
        num_beams: width of the beam search; 1 is none.
        max_new_tokens: where an answer is cut off.
        seed: of the draws. A batch's draws depend on it and on the batch's first question.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: found {self.temperature}, expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}, expected more than 0 and at most 1")
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise ValueError(f"num_beams {self.num_beams} and max_new_tokens {self.max_new_tokens} start at 1")

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            **sampling,
        }


def answer_questions(
    questions: Sequence[Question],
    tokenizer: Any,
    model: Any,
    image_processor: Any,
    conversation: Conversation,
    settings: GenerationSettings = GenerationSettings(),
    *,
    batch_size: int = 1,
    workers: int = 4,
) -> Iterator[Answer]:
    """Answers in the order of the questions. Greedy answers do not depend on the batch size.

    Questions that share their images share the work on them where they fall into one batch: see `shared_beginnings`.

    Args:
        questions: with images or without, in any mixture.
        tokenizer, model, image_processor: as `load_pretrained_model` returns them.
        conversation: an entry of `conv_templates`, such as `conv_templates["plain"]` after stage 1.
        settings: how to generate; greedy by default.
        batch_size: questions answered at once; halved for a batch that does not fit the device's memory.
        workers: threads that read and process the images of the next batches meanwhile; 0 reads them in between.

    Raises:
        FileNotFoundError: an image is not there. Asked of all images before the first answer, as the next is.
        ValueError: the text of a question does not fit its images, or the model has no vision tower.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")
    with_marks = bool(getattr(model.config, "mm_use_im_start_end", False))
    prompts = [prompt_of(question, conversation, with_marks) for question in questions]
    require_images(questions)
    if image_processor is None:
        raise ValueError("The model has no vision tower; load a LLaVA checkpoint.")
    answerer = _Answerer(tokenizer, model, image_processor, conversation, settings)
    return answerer.answers(questions, prompts, batch_size, workers)


class _Row(NamedTuple):
    """A question on its way: its place among all, its prompt and the prompt's ids."""

    place: int
    question: Question
    prompt: str
    ids: list[int]


class _LoadedImages(NamedTuple):
    """The images of a batch, each once.

    Attributes:
        pixels: `process_images`' output for each, `[3, H, W]` or `[t, 3, H, W]`.
        sizes: width and height of each, before processing.
        of_row: for each row the indices of its images.
    """

    pixels: list[Tensor]
    sizes: list[tuple[int, int]]
    of_row: list[list[int]]


class _Answerer:
    """What stays the same over all batches."""

    def __init__(
        self, tokenizer: Any, model: Any, image_processor: Any, conversation: Conversation, settings: GenerationSettings
    ):
        self.tokenizer = tokenizer
        self.model = model
        self.image_processor = image_processor
        self.settings = settings
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        stop_ids = tokenizer(conversation.stop_string, add_special_tokens=False).input_ids
        ends_by_itself = len(stop_ids) == 1 and stop_ids[0] in self.ends
        self.stop_string = None if ends_by_itself else conversation.stop_string

    def answers(
        self, questions: Sequence[Question], prompts: Sequence[str], batch_size: int, workers: int
    ) -> Iterator[Answer]:
        """Answers in order; those that come early wait for their turn."""
        early: dict[int, Answer] = {}
        next_place = 0
        for rows, images in self._with_images(self._batches(questions, prompts, batch_size), workers):
            for row, text in zip(rows, self._texts(rows, images), strict=True):
                early[row.place] = Answer(row.question, row.prompt, text)
            while next_place in early:
                yield early.pop(next_place)
                next_place += 1

    def _batches(self, questions: Sequence[Question], prompts: Sequence[str], batch_size: int) -> Iterator[list[_Row]]:
        """Batches of questions with equally many images, where there are enough of them nearby: least padding."""
        window = batch_size * WINDOW_BATCHES
        for start in range(0, len(questions), window):
            rows = [
                _Row(place, questions[place], prompts[place], tokenizer_image_token(prompts[place], self.tokenizer))  # type: ignore[arg-type]
                for place in range(start, min(start + window, len(questions)))
            ]
            # Text alone is sorted by length; questions about one image, which stand together, are left together.
            rows.sort(key=lambda row: (len(row.question.images), 0 if row.question.images else len(row.ids)))
            for first in range(0, len(rows), batch_size):
                yield rows[first : first + batch_size]

    def _with_images(self, batches: Iterator[list[_Row]], workers: int) -> Iterator[tuple[list[_Row], _LoadedImages]]:
        """Batches with their images, which threads prepare while earlier batches are answered."""
        if not workers:
            for rows in batches:
                distinct, of_row = distinct_images(rows)
                yield rows, self._loaded([self._load(image) for image in distinct], of_row)
            return
        waiting: deque[tuple[list[_Row], list[Future[Any]], list[list[int]]]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for rows in batches:
                    distinct, of_row = distinct_images(rows)
                    waiting.append((rows, [pool.submit(self._load, image) for image in distinct], of_row))
                    if len(waiting) > BATCHES_AHEAD:
                        yield self._finished(*waiting.popleft())
                while waiting:
                    yield self._finished(*waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finished(
        self, rows: list[_Row], futures: list[Future[Any]], of_row: list[list[int]]
    ) -> tuple[list[_Row], _LoadedImages]:
        return rows, self._loaded([future.result() for future in futures], of_row)

    def _loaded(self, loaded: list[tuple[Tensor, tuple[int, int]]], of_row: list[list[int]]) -> _LoadedImages:
        return _LoadedImages([pixels for pixels, _ in loaded], [size for _, size in loaded], of_row)

    def _load(self, source: ImageSource) -> tuple[Tensor, tuple[int, int]]:
        """Pixels for the tower, and width and height of the image as it came."""
        image = open_image(source)
        return process_images([image], self.image_processor, self.model.config)[0], image.size

    def _texts(self, rows: list[_Row], images: _LoadedImages) -> list[str]:
        try:
            return self._generate(rows, images)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the batch's tensors alive
        half = len(rows) // 2
        return [
            text
            for part in (slice(None, half), slice(half, None))
            for text in self._texts(rows[part], images._replace(of_row=images.of_row[part]))
        ]

    @torch.inference_mode()
    def _generate(self, rows: list[_Row], images: _LoadedImages) -> list[str]:
        options = self.settings.options()
        if self.stop_string is not None:
            no_prompt = torch.empty(len(rows), 0, dtype=torch.long)  # `generate` hands over new tokens alone
            options["stopping_criteria"] = [KeywordsStoppingCriteria([self.stop_string], self.tokenizer, no_prompt)]
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(cuda, enabled=self.settings.temperature > 0):
            torch.manual_seed(self.settings.seed + zlib.crc32(str(rows[0].question.question_id).encode()))
            new_ids = generate_sharing(
                self.model,
                [row.ids for row in rows],
                images.pixels,
                images.sizes,
                images.of_row,
                pad_token_id=self.padding,
                **options,
            )
        return [self._text(ids) for ids in new_ids.tolist()]

    def _text(self, ids: list[int]) -> str:
        """An answer's ids as text, up to what ended it; after that there is only padding."""
        ended = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.tokenizer.decode(ids[:ended], skip_special_tokens=True)
        return (text.split(self.stop_string)[0] if self.stop_string is not None else text).strip()


def distinct_images(rows: Sequence[_Row]) -> tuple[list[ImageSource], list[list[int]]]:
    """The images of a batch, each once, and for each row the indices of its own."""
    index_of: dict[Any, int] = {}
    distinct: list[ImageSource] = []
    of_row: list[list[int]] = []
    for row in rows:
        indices = []
        for image in row.question.images:
            key = id(image) if isinstance(image, Image.Image) else image
            if key not in index_of:
                index_of[key] = len(distinct)
                distinct.append(image)
            indices.append(index_of[key])
        of_row.append(indices)
    return distinct, of_row
