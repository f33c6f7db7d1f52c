"""What prompts have in common is computed once, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX as I
from llava.eval import prefix_sharing as shared_beginnings
from llava.eval.prefix_sharing import beginnings, generate_sharing
from llava.model.builder import LoadedModel

PROMPTS = [
    [1, 20, I, 30, 31],
    [1, 20, I, 40],
    [1, 20, I, 50, 51, 52, 53],
    [1, 20, 60],
    [1, 20, 61, 62],
    [1, I, 8, I, 9],
]
SHOWN = [[0], [0], [1], [], [], [1, 0]]


def run(model: Any, prompts: list[list[int]], shown: list[list[int]], **options: Any) -> Any:
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, **options}
    return generate_sharing(model, prompts, list(pixels), [(56, 56), (80, 40)], shown, **options)


def test_new_tokens_and_their_scores_are_those_without_sharing(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"output_scores": True, "return_dict_in_generate": True}
    shared = run(tiny.model, PROMPTS, SHOWN, **scores)
    monkeypatch.setattr(shared_beginnings, "can_share", lambda model, options: False)
    apart = run(tiny.model, PROMPTS, SHOWN, **scores)
    assert shared.sequences.tolist() == apart.sequences.tolist()
    for ours, theirs in zip(shared.scores, apart.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_answer_as_they_do_alone(tiny: LoadedModel) -> None:
    together = run(tiny.model, PROMPTS, SHOWN)
    alone = [run(tiny.model, [prompt], [shown])[0].tolist() for prompt, shown in zip(PROMPTS, SHOWN, strict=True)]
    assert together.tolist() == alone


def test_each_image_passes_the_tower_once_and_each_beginning_the_llm_once(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[int] = []
    embedded: list[torch.Size] = []
    encode, forward = tiny.model.encode_images, tiny.model.model.forward

    def watched_encode(pixels: Tensor) -> Tensor:
        images.append(len(pixels))
        return encode(pixels)

    def watched_forward(**options: Any) -> Any:
        if options.get("inputs_embeds") is not None:
            embedded.append(options["inputs_embeds"].shape)
        return forward(**options)

    monkeypatch.setattr(tiny.model, "encode_images", watched_encode)
    monkeypatch.setattr(tiny.model.model, "forward", watched_forward)
    run(tiny.model, PROMPTS[:2] * 3, SHOWN[:2] * 3)
    visual = tiny.model.visual_tokens_of((56, 56))
    assert images == [2]  # both that came with the batch
    assert [tuple(shape[:2]) for shape in embedded] == [(1, 2 + visual), (6, 2)]


def test_a_beam_search_gives_the_same_beams(tiny: LoadedModel) -> None:
    together = run(tiny.model, PROMPTS, SHOWN, num_beams=3, max_new_tokens=6, min_new_tokens=6)
    alone = [
        run(tiny.model, [prompt], [shown], num_beams=3, max_new_tokens=6, min_new_tokens=6)[0].tolist()
        for prompt, shown in zip(PROMPTS, SHOWN, strict=True)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("prompts", "shown", "lengths"),
    [
        ([[1, I, 5]], [[0]], [2]),
        ([[1, I, 5, I, 6, 7]], [[0, 0]], [4]),  # up to the last image
        ([[1, I]], [[0]], [0]),  # nothing would be left to choose the first word by
        ([[1, 2, 3], [1, 2, 4, 5]], [[], []], [2, 2]),  # text: what all have in common
        ([[1, 2], [1, 2]], [[], []], [1, 1]),
        ([[1, 2], [3, 4]], [[], []], [0, 0]),
    ],
)
def test_how_much_of_a_prompt_can_be_shared(
    prompts: list[list[int]], shown: list[list[int]], lengths: list[int]
) -> None:
    assert beginnings(prompts, shown) == lengths
