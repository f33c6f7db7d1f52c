"""The tiny checkpoint, loaded as the commands load it, and questions in every mixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.eval.answering import Question
from llava.model.builder import LoadedModel, load_pretrained_model


@pytest.fixture
def tiny(golden_world: Path) -> LoadedModel:
    return load_pretrained_model("tiny-llava", None, "tiny-llava", device="cpu")


@pytest.fixture
def mixed_questions() -> list[Question]:
    """Several questions an image, some with two images or none, in lengths of all kinds."""
    first, second, third = (Path("images") / f"im{number}.png" for number in range(3))
    shown = [(first,), (first,), (), (second,), (first,), (first, second), (), (third,), (second,), (first, second), ()]
    words = ["What is this?", "Is it night?", "Name one colour, please.", "And here, what do you see?", "Why?"]
    return [Question(f"q{place}", words[place % 5], images) for place, images in enumerate(shown)]
