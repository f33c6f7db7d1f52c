"""Instances of phrases by a tiny random SAM 3: equal to transformers' own path, however phrases are batched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import BertConfig
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from patch_aligned.annotate import sam3 as sam3_module
from patch_aligned.annotate.fetch import checkpoint_folder
from patch_aligned.annotate.options import CandidateThresholds
from patch_aligned.annotate.pipeline import Failure
from patch_aligned.annotate.regions import Candidate
from patch_aligned.annotate.sam3 import Sam3Segmenter

pytest.importorskip("torchvision", reason="torchvision is part of the extra `annotate`")
PHRASES = ["dog", "red cat", "sky", "a tennis racket 2"]
SIZE_WH = (90, 60)
THRESHOLD = 0.4


@pytest.fixture
def segmenter() -> Sam3Segmenter:
    return made()


def made(**options: Any) -> Sam3Segmenter:
    from playground.mini.annotation_models import tiny_sam3

    return Sam3Segmenter(*tiny_sam3(), **{"candidate_thresholds": CandidateThresholds(THRESHOLD, THRESHOLD)} | options)


def noise(size_wh: tuple[int, int] = SIZE_WH, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_wh[::-1], 3), dtype=np.uint8))


def pixels_of(candidate: Candidate, size_wh: tuple[int, int] = SIZE_WH) -> np.ndarray:
    assert candidate.mask is not None
    return coco_mask.decode({"size": size_wh[::-1], "counts": candidate.mask["rle_mask"]}).astype(bool)


def by_transformers(segmenter: Sam3Segmenter, image: Image.Image, phrase: str) -> tuple[dict[str, Any], float]:
    """What the processor and the joint call of the model give, and the presence."""
    inputs = segmenter.processor(images=image, text=phrase, return_tensors="pt")
    sizes = inputs.pop("original_sizes").tolist()
    with torch.no_grad():
        output = segmenter.model(**inputs)
    thresholds = segmenter.candidate_thresholds.box, segmenter.mask_threshold
    (found,) = segmenter.processor.post_process_instance_segmentation(output, *thresholds, sizes)
    return found, output.presence_logits.sigmoid().item()


def assert_alike(found: Sequence[Candidate], expected: Sequence[Candidate]) -> None:
    """Equal but for the rounding of other batches; records have six digits of a score and three of a pixel."""
    assert [one.best_tag for one in found] == [one.best_tag for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-5, abs=1e-6)
        assert one.bbox_xyxy_px == pytest.approx(other.bbox_xyxy_px, rel=1e-5, abs=2e-3)
        assert (pixels_of(one) == pixels_of(other)).mean() > 0.998  # a pixel at the threshold may go either way


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
def test_instances_equal_those_of_transformers(segmenter: Sam3Segmenter, mode: str) -> None:
    image, count = noise().convert(mode), 0
    for phrase in PHRASES:
        expected, presence = by_transformers(segmenter, image.convert("RGB"), phrase)
        order = [at for at in (-expected["scores"]).argsort(stable=True).tolist() if expected["masks"][at].any()]
        found = segmenter.instances(image, [phrase])
        count += len(found)
        for one, position in zip(found, order, strict=True):
            assert one.score == pytest.approx(expected["scores"][position].item(), rel=1e-5)
            assert one.bbox_xyxy_px == pytest.approx(expected["boxes"][position].tolist(), rel=1e-5, abs=2e-3)
            assert np.array_equal(pixels_of(one), expected["masks"][position].bool().numpy())
            assert one.mask["area_px"] == expected["masks"][position].sum().item()
            assert one.mask["presence"] == pytest.approx(presence, abs=1e-6)
            assert (one.best_tag, one.best_tag_score, one.tokens) == (phrase, one.score, ())
    assert 0 < count < 20 * len(PHRASES)  # or the comparison would show little


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_phrases_in_a_batch_give_what_each_gives_alone(segmenter: Sam3Segmenter, at_once: int) -> None:
    alone = [one for phrase in PHRASES for one in segmenter.instances(noise(), [phrase])]
    segmenter.phrases_per_step = at_once
    assert_alike(segmenter.instances(noise(), PHRASES), sorted(alone, key=lambda one: -one.score))


def test_a_picture_is_encoded_once_and_a_phrase_once_for_all_pictures(
    segmenter: Sam3Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, list[int]] = {"get_vision_features": [], "get_text_features": []}
    for name, noted in calls.items():
        method = getattr(segmenter.model, name)

        def counted(*args: Any, noted: Any = noted, method: Any = method, **inputs: Any) -> Any:
            noted.append(len([*args, *inputs.values()][0]))
            return method(*args, **inputs)

        monkeypatch.setattr(segmenter.model, name, counted)
    segmenter.phrases_per_step = 1
    for seed in range(3):
        segmenter.instances(noise(seed=seed), PHRASES)
    assert calls == {"get_vision_features": [1] * 3, "get_text_features": [1] * len(PHRASES)}


def test_kept_features_of_a_phrase_equal_fresh_ones(segmenter: Sam3Segmenter) -> None:
    for phrase in [*PHRASES, "sky" * 50]:  # the last is longer than what SAM 3 reads
        kept = [segmenter._text(phrase) for _ in range(2)]
        assert kept[0] is kept[1]
        tokens = segmenter.processor.tokenizer(phrase, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            fresh = segmenter.model.get_text_features(**tokens).pooler_output[0]
        torch.testing.assert_close(kept[0], fresh, rtol=1e-5, atol=1e-6)


def test_what_is_found_in_a_picture_does_not_depend_on_what_was_done_before(segmenter: Sam3Segmenter) -> None:
    segmenter.instances(noise(seed=1), ["sky", "zebra"])
    assert segmenter.instances(noise(), PHRASES) == made().instances(noise(), PHRASES)


@pytest.mark.parametrize("size_wh", [(1, 1), (60_000, 2), (2, 60_000)])
def test_pictures_of_any_shape_are_taken(size_wh: tuple[int, int]) -> None:
    segmenter = made(candidate_thresholds=CandidateThresholds(0.1, 0.1), mask_threshold=0.2)
    image, count = noise(size_wh), 0
    for phrase in PHRASES:
        expected, _ = by_transformers(segmenter, image, phrase)
        order = [at for at in (-expected["scores"]).argsort(stable=True).tolist() if expected["masks"][at].any()]
        count += len(order)
        for one, position in zip(segmenter.instances(image, [phrase]), order, strict=True):
            assert np.array_equal(pixels_of(one, size_wh), expected["masks"][position].bool().numpy())
    assert count > 0


def test_large_pictures_are_done_in_parts(segmenter: Sam3Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = segmenter.instances(noise(), PHRASES)
    monkeypatch.setattr(sam3_module, "LARGEST_STEP_PX", 8 * 3 * 90 * 60)
    assert segmenter.instances(noise(), PHRASES) == expected


def test_any_number_of_phrases_is_taken(segmenter: Sam3Segmenter) -> None:
    assert segmenter.instances(noise(), []) == []
    phrases = [f"thing {number}" for number in range(200)]
    segmenter.candidate_thresholds = CandidateThresholds(0.6, 0.6)
    found = segmenter.instances(noise(), phrases)
    assert len({one.best_tag for one in found}) > 100
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_thresholds_decide_what_is_kept_and_how_large_masks_are() -> None:
    usual = made().instances(noise(), PHRASES)
    assert made(candidate_thresholds=CandidateThresholds(0.999, 0.999)).instances(noise(), PHRASES) == []
    presences = sorted({one.mask["presence"] for one in usual})
    assert len(presences) == len(PHRASES)
    without_least = made(presence_threshold=sum(presences[:2]) / 2).instances(noise(), PHRASES)
    assert without_least == [one for one in usual if one.mask["presence"] > presences[0]]
    whole = {(one.best_tag, one.score): one for one in usual}
    stricter = made(mask_threshold=0.6).instances(noise(), PHRASES)
    assert 0 < len(stricter) <= len(usual)  # of some, no pixel is left
    for one in stricter:
        assert np.all(pixels_of(one) <= pixels_of(whole[one.best_tag, one.score]))
    assert sum(one.mask["area_px"] for one in stricter) < sum(one.mask["area_px"] for one in usual)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_fewer_phrases_are_decoded_at_a_time_where_memory_runs_out(
    segmenter: Sam3Segmenter, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    expected = segmenter.instances(noise(), PHRASES)
    forward, sizes = segmenter.model.forward, []

    def limited(**inputs: Any) -> Any:
        sizes.append(len(inputs["attention_mask"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    monkeypatch.setattr(segmenter.model, "forward", limited)
    assert_alike(segmenter.instances(noise(), PHRASES), expected)
    assert sizes == {1: [4, 2, 1, 1, 2, 1, 1], 2: [4, 2, 2], 3: [4, 2, 2]}[most]


def test_a_picture_of_which_no_phrase_fits_fails_alone(
    segmenter: Sam3Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, forward = segmenter.instances(noise(), ["sky"]), segmenter.model.forward

    def limited(**inputs: Any) -> Any:
        if inputs["attention_mask"].sum() > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    monkeypatch.setattr(segmenter.model, "forward", limited)
    items = [SimpleNamespace(image=noise(), tags=[SimpleNamespace(name=name)]) for name in ("sky", "long words")]
    found = segmenter.detect(items)
    assert found == [expected, Failure("out_of_memory", "does not fit in memory, even alone")]


@pytest.mark.parametrize("where", ["pred_masks", "pred_boxes", "pred_logits", "presence_logits"])
@pytest.mark.parametrize("only_rough", [True, False])
def test_what_overflows_in_bfloat16_is_tried_again_in_float32(
    monkeypatch: pytest.MonkeyPatch, where: str, only_rough: bool
) -> None:
    segmenter, exact = made(dtype=torch.bfloat16), made()
    forward = segmenter.model.forward

    def overflowing(**inputs: Any) -> Any:
        output = forward(**inputs)
        if torch.is_autocast_enabled("cpu") or not only_rough:
            output[where][inputs["attention_mask"].sum(dim=1) == 8] = float("nan")  # those of "red cat"
        return output

    monkeypatch.setattr(segmenter.model, "forward", overflowing)
    found = segmenter.instances(noise(), PHRASES)
    if only_rough:
        assert found == exact.instances(noise(), PHRASES)
    else:
        assert found == Failure("non_finite", "the model's scores are not finite, also in float32")


def test_bfloat16_gives_nearly_the_same(segmenter: Sam3Segmenter) -> None:
    rough = made(dtype=torch.bfloat16, candidate_thresholds=CandidateThresholds(0.0, 0.0))
    exact = made(candidate_thresholds=CandidateThresholds(0.0, 0.0))
    (best, other) = (one.instances(noise(), ["sky"])[0] for one in (exact, rough))
    assert other.score == pytest.approx(best.score, abs=0.05)
    assert rough.settings["dtype"] == "bfloat16"


def test_a_saved_checkpoint_gives_the_same(segmenter: Sam3Segmenter, tmp_path: Path) -> None:
    segmenter.model.save_pretrained(tmp_path)
    segmenter.processor.save_pretrained(tmp_path)
    thresholds = {"candidate_thresholds": segmenter.candidate_thresholds}
    loaded = Sam3Segmenter.from_pretrained(tmp_path, **thresholds)
    assert loaded.instances(noise(), PHRASES) == segmenter.instances(noise(), PHRASES)
    assert json.loads(json.dumps(loaded.settings)) == segmenter.settings


def test_the_video_model_as_which_sam_3_is_published_is_read(segmenter: Sam3Segmenter, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {f"detector_model.{name}": weight for name, weight in segmenter.model.state_dict().items()}
    weights["tracker_model.memory"] = torch.zeros(3)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = {"model_type": "sam3_video", "detector_config": segmenter.model.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    segmenter.processor.save_pretrained(tmp_path)
    loaded = Sam3Segmenter.from_pretrained(tmp_path, candidate_thresholds=segmenter.candidate_thresholds)
    assert loaded.instances(noise(), PHRASES) == segmenter.instances(noise(), PHRASES)


def test_other_models_and_missing_weights_are_refused(segmenter: Sam3Segmenter, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="found a model of type 'bert', expected sam3"):
        Sam3Segmenter.from_pretrained(tmp_path / "bert")
    state = segmenter.model.state_dict()
    del state["text_projection.weight"]
    segmenter.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 weights are missing, among them text_projection\.weight"):
        Sam3Segmenter.from_pretrained(tmp_path)


def test_weights_that_are_gated_are_named_with_their_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error")

    monkeypatch.setattr("patch_aligned.annotate.fetch.snapshot_download", refuse)
    with pytest.raises(
        ValueError, match=r"--sam3 facebook/sam3: .*401.*gated: ask for them under the SAM License at https://"
    ):
        checkpoint_folder("facebook/sam3", None, "--sam3")


def test_masks_of_the_pictures_own_resolution_come_out_as_they_are(
    segmenter: Sam3Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle in the model's place: what differs would be the fault of what is around the model."""
    random = np.random.default_rng(0)
    truth = random.random((2, 3, 60, 90)) < random.random((2, 3, 1, 1))  # two phrases with three instances each
    boxes = random.random((2, 3, 4))
    scores = torch.tensor(random.uniform(0.4, 0.9, (2, 3)), dtype=torch.float32)

    def oracle(**inputs: Any) -> Sam3ImageSegmentationOutput:
        return Sam3ImageSegmentationOutput(
            pred_masks=torch.tensor(truth).float() * 20 - 10,
            pred_boxes=torch.tensor(boxes, dtype=torch.float32),
            pred_logits=scores.logit(),
            presence_logits=torch.full((2, 1), 10.0),
        )

    monkeypatch.setattr(segmenter.model, "forward", oracle)
    found = segmenter.instances(noise(), ["dog", "cat"])
    for one, (phrase, query) in zip(
        found, sorted(np.ndindex(2, 3), key=lambda place: -scores[place].item()), strict=True
    ):
        assert one.best_tag == ["dog", "cat"][phrase]
        assert np.array_equal(pixels_of(one), truth[phrase, query])
        assert one.bbox_xyxy_px == pytest.approx(boxes[phrase, query] * [90, 60, 90, 60], abs=2e-3)
