"""The one generation loop: questions about images go in, answers come out in their order, whatever the batch.

Everything in this package that lets a checkpoint answer a list of questions goes through `answer_questions`.

Letters: B questions of a batch, T length of the longest prompt.
"""

from __future__ import annotations

import logging
import sys
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
from llava.eval.prefix_sharing import generate_sharing
from llava.eval.vqa_files import Answer, ImageSource, Question, open_image, prompt_of, require_images
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token

__all__ = ["Answer", "GenerationSettings", "ImageSource", "Question", "answer_questions", "prompt_of"]

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
WINDOW_BATCHES = 16


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draws come from the likeliest tokens with this share of the probability; None leaves that bound out.
            Those of transformers hold besides: the 50 likeliest, unless the checkpoint's generation config has others.
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
        require_positive(num_beams=self.num_beams, max_new_tokens=self.max_new_tokens)

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            **sampling,
        }


def require_positive(**counts: int) -> None:
    """Raises `ValueError` naming the first of `counts` that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: found {count}, expected 1 or more")


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
        batch_size: questions answered at once; halved, with a warning, where the device's memory does not suffice.
        workers: threads that read and process the images of the next batches meanwhile.

    Raises:
        FileNotFoundError: an image is not there. Asked of all images before the first answer, as the next is.
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
    """A question on its way: its place among all, its prompt and the prompt's ids."""

    place: int
    question: Question
    prompt: str
    ids: list[int]


_Loading = dict[Any, Future[tuple[Tensor, tuple[int, int]]]]
"""Images of a batch by `key_of`, each once: pixels for the tower, and width and height of the image as it came."""


class _Answerer:
    """What stays the same over all batches."""

    def __init__(
        self, tokenizer: Any, model: Any, image_processor: Any, conversation: Conversation, settings: GenerationSettings
    ):
        self.tokenizer = tokenizer
        self.model = model
        self.image_processor = image_processor
        self.settings = settings
        self.at_once = sys.maxsize  # questions; fewer than a batch has, once memory did not suffice
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
        """Answers in order; those that come early wait for their turn."""
        early: dict[int, Answer] = {}
        next_place = 0
        for rows, loading in self._with_images(self._batches(questions, prompts, batch_size), workers):
            for row, text in zip(rows, self._texts(rows, loading), strict=True):
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

    def _with_images(self, batches: Iterator[list[_Row]], workers: int) -> Iterator[tuple[list[_Row], _Loading]]:
        """Batches with their images, which threads prepare while earlier batches are answered."""
        waiting: deque[tuple[list[_Row], _Loading]] = deque()
        pool = ThreadPoolExecutor(workers)
        try:
            for rows in batches:
                shown = {key_of(image): (image, row.question) for row in rows for image in row.question.images}
                waiting.append((rows, {key: pool.submit(self._load, *image) for key, image in shown.items()}))
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
            no_prompt = torch.empty(len(rows), 0, dtype=torch.long)  # `generate` hands over new tokens alone
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
            if length > self.longest:  # so that a file of long prompts is not a file of warnings
                logger.warning(
                    "question %r: its prompt has %d tokens, images included, and the model knows %d positions; "
                    "answers to such prompts are of little worth",
                    row.question.question_id,
                    length,
                    self.model.config.max_position_embeddings,
                )
                self.longest = length

    def _text(self, ids: list[int]) -> str:
        """An answer's ids as text, up to what ended it; after that there is only padding."""
        ended = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.tokenizer.decode(ids[:ended], skip_special_tokens=True)
        return (text.split(self.stop_string)[0] if self.stop_string is not None else text).strip()


def key_of(image: ImageSource) -> Any:
    """Equal for images that need to be read once."""
    return id(image) if isinstance(image, Image.Image) else image
