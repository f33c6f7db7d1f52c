"""Boxes of tags, by tiny random models: equal to transformers' own path, whatever else is in the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BertConfig, GroundingDinoImageProcessorPil, GroundingDinoProcessor

from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.options import CandidateThresholds
from patch_aligned.annotate.regions import Candidate, NonFiniteScoresError

TAGS = [["person", "tennis racket"], ["dog"], ["cat", "t-shirt", "under"]]


@pytest.fixture(params=["tiny_detector_folder", "tiny_mm_detector_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def detector(folder: Path) -> GroundingDetector:
    return GroundingDetector.from_pretrained(str(folder))


def in_float64(detector: GroundingDetector) -> GroundingDetector:
    """Leaves a batch and its images alone no other difference than an error: float32 rounds otherwise in a batch."""
    detector.model.double().register_forward_pre_hook(
        lambda model, args, options: (args, options | {"pixel_values": options["pixel_values"].double()}),
        with_kwargs=True,
    )
    return detector


@pytest.fixture
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in TAGS]


def numbers(candidates: list[Candidate]) -> torch.Tensor:
    """Boxes and scores of all candidates, `[candidates, 6]`."""
    rows = [[*found.bbox_xyxy_px, found.score, found.best_tag_score] for found in candidates]
    return torch.tensor(rows, dtype=torch.float64)


def assert_same(found: list[Candidate], expected: list[Candidate]) -> None:
    assert len(found) == len(expected) > 0
    # Records hold six decimals of a score and three of a pixel.
    torch.testing.assert_close(numbers(found)[:, :4], numbers(expected)[:, :4], rtol=1e-5, atol=1.01e-3)
    torch.testing.assert_close(numbers(found)[:, 4:], numbers(expected)[:, 4:], rtol=1e-5, atol=1.01e-6)
    assert [one.best_tag for one in found] == [one.best_tag for one in expected]
    assert [[piece for piece, _ in one.tokens] for one in found] == [[p for p, _ in one.tokens] for one in expected]


def test_candidates_equal_those_of_transformers(
    folder: Path, detector: GroundingDetector, images: list[Image.Image]
) -> None:
    box, text = in_float64(detector).candidate_thresholds
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil.from_pretrained(folder), detector.tokenizer)
    for image, tags, found in zip(images, TAGS, detector.detect(images, TAGS), strict=True):
        inputs = processor(images=image, text=", ".join(tags) + ".", return_tensors="pt")
        with torch.no_grad():
            output = detector.model(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(
            output, threshold=box, text_threshold=text, target_sizes=[(image.height, image.width)]
        )
        best_first = expected["scores"].argsort(descending=True, stable=True)
        assert len(found) == len(expected["scores"]) > 1
        torch.testing.assert_close(numbers(found)[:, 4], expected["scores"][best_first].double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(numbers(found)[:, :4], expected["boxes"][best_first].double(), rtol=1e-5, atol=1e-3)
        # Transformers keeps the marks between tags, and [SEP], in the phrase.
        phrases = [expected["text_labels"][place] for place in best_first.tolist()]
        without = [
            " ".join(phrase.replace("[SEP]", "").replace(",", "").replace(".", "").split()) for phrase in phrases
        ]
        assert [candidate.phrase(text) for candidate in found] == without


def test_the_best_tag_has_the_highest_mean_over_its_tokens(
    detector: GroundingDetector, images: list[Image.Image]
) -> None:
    keep_all = GroundingDetector(
        detector.model, detector.tokenizer, detector.image_processor, candidate_thresholds=CandidateThresholds(0, 0)
    )
    tokens_of_tag = {"person": ["person"], "tennis racket": ["tennis", "racket"], "dog": ["dog"]}
    (found,) = keep_all.detect(images[:1], [list(tokens_of_tag)])
    assert len(found) == 30  # the model's queries
    for candidate in found:
        scores = dict(candidate.tokens)
        means = {tag: np.mean([scores[token] for token in tokens]) for tag, tokens in tokens_of_tag.items()}
        assert candidate.best_tag == max(means, key=means.__getitem__)
        assert candidate.best_tag_score == pytest.approx(means[candidate.best_tag], abs=2e-6)
    assert len({candidate.best_tag for candidate in found}) > 1


def test_tokens_below_the_text_threshold_are_not_kept(detector: GroundingDetector, images: list[Image.Image]) -> None:
    strict = GroundingDetector(
        detector.model, detector.tokenizer, detector.image_processor, candidate_thresholds=CandidateThresholds(0.3, 0.5)
    )
    for all_found, found in zip(detector.detect(images, TAGS), strict.detect(images, TAGS), strict=True):
        expected = [one for one in all_found if one.score > 0.3]
        assert 0 < len(found) == len(expected)
        for one, full in zip(found, expected, strict=True):
            assert one.tokens == tuple(token for token in full.tokens if token[1] > 0.5)
            assert one.phrase(0.6) == full.phrase(0.6)


@pytest.mark.parametrize("prompt_join", [", ", ". "])
def test_a_batch_equals_single_images(folder: Path, images: list[Image.Image], prompt_join: Any) -> None:
    detector = in_float64(GroundingDetector.from_pretrained(str(folder), prompt_join=prompt_join))
    for image, tags, found in zip(images, TAGS, detector.detect(images, TAGS), strict=True):
        assert_same(found, detector.detect([image], [tags])[0])


def test_candidates_of_several_prompts_are_joined(folder: Path, images: list[Image.Image]) -> None:
    detector = in_float64(GroundingDetector.from_pretrained(str(folder)))
    many = [first + second for first in "abcdefgh" for second in "0123456789"]  # two tokens and a mark each
    many += ["person cat", "dog", "tennis racket", "woman", "shirt", "swab", "undershirt"]
    first, second = detector.prompts.build(many)
    found = detector.detect(images, [many, ["dog"], []])
    parts = [detector.detect(images[:1], [list(prompt.tags)])[0] for prompt in (first, second)]
    assert_same(found[0], sorted(parts[0] + parts[1], key=lambda candidate: -candidate.score))
    assert_same(found[1], detector.detect(images[1:2], [["dog"]])[0])
    assert found[2] == []


@pytest.fixture
def steps(detector: GroundingDetector, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Sizes of the batches that the model is given."""
    shapes: list[tuple[int, ...]] = []
    forward = detector.model.forward

    def watched(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["pixel_values"].shape))
        return forward(**inputs)

    monkeypatch.setattr(detector.model, "forward", watched)
    yield shapes


def test_images_without_tags_never_reach_the_model(
    detector: GroundingDetector, images: list[Image.Image], steps: list[tuple[int, ...]]
) -> None:
    assert detector.detect(images, [[], [], []]) == [[], [], []]
    assert detector.detect([], []) == []
    assert steps == []
    detector.detect(images, [[], ["dog"], []])
    assert steps == [(1, 3, 96, 128)]


def test_no_step_has_more_pairs_than_there_are_images(
    detector: GroundingDetector, images: list[Image.Image], steps: list[tuple[int, ...]]
) -> None:
    many = [f"{first}{second} dog" for first in "abcdefgh" for second in "0123456789"]
    assert len(detector.prompts.build(many)) == 2
    detector.detect(images, [many, many, ["dog"]])
    assert [shape[0] for shape in steps] == [3, 2]


@pytest.mark.parametrize("size_wh", [(120, 90), (90, 121), (400, 90), (33, 500), (96, 96)])
def test_the_resized_size_is_that_of_the_processor(detector: GroundingDetector, size_wh: tuple[int, int]) -> None:
    pixels = detector.image_processor(images=[Image.new("RGB", size_wh)], return_tensors="pt")["pixel_values"]
    assert detector.resized_shape_hw(size_wh) == tuple(pixels.shape[2:])


def test_images_of_other_resized_sizes_are_no_batch(detector: GroundingDetector, images: list[Image.Image]) -> None:
    other = images[0].resize((90, 120))
    with pytest.raises(ValueError, match=r"found the resized sizes \[\(96, 128\), \(128, 96\)\]"):
        detector.detect([images[0], other], [["dog"], ["dog"]])
    assert len(detector.detect([images[0], other], [["dog"], []])[0]) > 0  # the other one has no tags
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        detector.detect(images[:2], [["dog"]])


def test_images_of_one_resized_size_may_differ_in_their_own(
    detector: GroundingDetector, images: list[Image.Image]
) -> None:
    larger = images[1].resize((240, 180))
    in_float64(detector)
    found = detector.detect([images[0], larger], TAGS[:2])
    assert_same(found[1], detector.detect([larger], TAGS[1:2])[0])
    assert max(candidate.bbox_xyxy_px[2] for candidate in found[1]) > 120


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_pictures_of_any_mode_are_taken(detector: GroundingDetector, images: list[Image.Image], mode: str) -> None:
    image = images[0].convert(mode)
    assert detector.detect([image], TAGS[:1]) == detector.detect([image.convert("RGB")], TAGS[:1])


def test_bfloat16_finds_nearly_the_same(detector: GroundingDetector, images: list[Image.Image]) -> None:
    rough = GroundingDetector(detector.model, detector.tokenizer, detector.image_processor, dtype=torch.bfloat16)
    exact, found = (numbers(one.detect(images[:1], TAGS[:1])[0])[:, 4] for one in (detector, rough))
    assert rough.settings["dtype"] == "bfloat16"
    torch.testing.assert_close(found[:5], exact[:5], rtol=0, atol=0.03)


def test_scores_that_are_not_finite_are_reported_for_their_image(
    detector: GroundingDetector, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = detector.model.forward

    def broken(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.pred_boxes[1, 3] = float("nan")
        return output

    monkeypatch.setattr(detector.model, "forward", broken)
    with pytest.raises(NonFiniteScoresError, match=r"Grounding DINO: .* images \[2\] of the batch") as caught:
        detector.detect(images, [["cat"], [], ["dog"]])
    assert caught.value.positions == [2]


def test_what_overflows_in_bfloat16_is_tried_again_in_float32(
    detector: GroundingDetector, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = detector.model.forward

    def overflowing(**inputs: Any) -> Any:
        output = forward(**inputs)
        if torch.is_autocast_enabled("cpu"):
            output.logits[0, 0, 1] = float("inf")
        return output

    exact = detector.detect(images[:1], TAGS[:1])[0]
    rough = GroundingDetector(detector.model, detector.tokenizer, detector.image_processor, dtype=torch.bfloat16)
    monkeypatch.setattr(detector.model, "forward", overflowing)
    found = rough.detect(images, TAGS)
    assert_same(found[0], exact)
    assert numbers(found[1]).isfinite().all()


def test_settings_are_plain_values(detector: GroundingDetector) -> None:
    settings = json.loads(json.dumps(detector.settings))
    assert settings["kind"] in ("grounding-dino", "mm-grounding-dino")
    assert settings["candidate_thresholds"] == {"box": 0.15, "text": 0.15}


def test_the_published_folders_are_laid_out_as_processors_are(folder: Path) -> None:
    assert isinstance(AutoProcessor.from_pretrained(folder), GroundingDinoProcessor)


def test_other_models_and_missing_weights_are_refused(detector: GroundingDetector, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="found a model of type 'bert', expected grounding-dino, mm-grounding-dino"):
        GroundingDetector.from_pretrained(str(tmp_path / "bert"))
    state = detector.model.state_dict()
    lost = "model.text_projection.weight"
    detector.model.save_pretrained(tmp_path, state_dict={name: state[name] for name in state if name != lost})
    with pytest.raises(ValueError, match=f"1 weights are missing, among them {lost}"):
        GroundingDetector.from_pretrained(str(tmp_path))


def test_a_folder_with_another_vocabulary_is_refused(tiny_detector_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_detector_folder, tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["."], vocabulary["dog"] = vocabulary["dog"], vocabulary["."]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer: found the ids .*'\.': \d+, .*expected"):
        GroundingDetector.from_pretrained(str(copy))


def test_a_processor_that_squashes_is_refused(detector: GroundingDetector) -> None:
    processor = GroundingDinoImageProcessorPil(size={"height": 96, "width": 96})
    with pytest.raises(ValueError, match="expected shortest_edge and longest_edge"):
        GroundingDetector(detector.model, detector.tokenizer, processor)
