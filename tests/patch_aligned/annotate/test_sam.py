"""Masks of boxes, by tiny random models: equal to transformers' own path, for any number of boxes an image."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import (
    BertConfig,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2Processor,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
)

from patch_aligned.annotate import sam as sam_module
from patch_aligned.annotate.regions import NonFiniteScoresError
from patch_aligned.annotate.sam import SamSegmenter

# Two pictures of different shapes, each with two boxes.
SIZES_WH = [(90, 60), (50, 81)]
BOXES = [[[10.5, 5.0, 60.0, 50.0], [0.0, 0.0, 90.0, 60.0]], [[3.0, 20.0, 44.0, 70.25], [10.0, 10.0, 30.0, 30.0]]]


def seeded_sam() -> tuple[SamModel, SamImageProcessorPil]:
    from playground.mini.annotation_models import tiny_sam

    torch.manual_seed(0)
    return tiny_sam()


def tiny_sam2() -> tuple[Sam2Model, Sam2ImageProcessor]:
    pytest.importorskip("torchvision", reason="torchvision is part of the extra `annotate`")
    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=16, image_size=[128, 128], blocks_per_stage=[1, 2, 2, 2], embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[8, 4, 8, 4],
        window_positional_embedding_background_size=[8, 8], global_attention_blocks=[4],
    )  # fmt: skip
    config = Sam2Config(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16],
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]], fpn_hidden_size=32,
        ),
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=128, patch_size=16),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32
        ),
    )  # fmt: skip
    return Sam2Model(config).eval(), Sam2ImageProcessor(size={"height": 128, "width": 128})


TINY = {"sam": seeded_sam, "sam2": tiny_sam2}


@pytest.fixture(params=["sam", "sam2"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def segmenter(kind: str) -> SamSegmenter:
    return SamSegmenter(*TINY[kind]())


@pytest.fixture
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES_WH]


def decoded(rle: str, size_wh: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode({"size": [size_wh[1], size_wh[0]], "counts": rle}).astype(bool)


def by_transformers(kind: str, images: list[Image.Image], boxes: list[Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Masks and predicted IoUs as the processor and the model's joint call give them, for equal counts of boxes."""
    model, image_processor = TINY[kind]()
    processor = (SamProcessor if kind == "sam" else Sam2Processor)(image_processor)
    inputs = processor(images=images, input_boxes=boxes, return_tensors="pt")
    sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
    with torch.no_grad():
        output = model(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
    return image_processor.post_process_masks(output.pred_masks, *sizes), output.iou_scores


def test_masks_equal_those_of_transformers(kind: str, segmenter: SamSegmenter, images: list[Image.Image]) -> None:
    expected_masks, expected_ious = by_transformers(kind, images, BOXES)
    found = segmenter.segment(images, BOXES)
    for image, masks, expected, ious in zip(images, found, expected_masks, expected_ious, strict=True):
        for mask, pixels, iou in zip(masks, expected[:, 0].numpy(), ious[:, 0].tolist(), strict=True):
            assert 0 < pixels.mean() < 1  # or the comparison would show nothing
            assert np.array_equal(decoded(mask["rle_mask"], image.size), pixels)
            assert mask["area_px"] == pixels.sum()
            assert mask["predicted_iou"] == pytest.approx(iou, rel=1e-5)


@pytest.mark.parametrize("boxes_per_step", [1, 2, 64])
def test_images_may_have_any_number_of_boxes(
    kind: str, images: list[Image.Image], boxes_per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam_module, "LARGEST_STEP_PX", 2 * 90 * 60)
    segmenter = SamSegmenter(*TINY[kind](), boxes_per_step=boxes_per_step)
    boxes = [BOXES[0][:1], [*BOXES[1], BOXES[1][0]], []]
    found = segmenter.segment([*images, images[0]], boxes)
    assert [len(masks) for masks in found] == [1, 3, 0]
    for image, masks, own_boxes in zip(images, found, boxes, strict=False):
        for mask, box in zip(masks, own_boxes, strict=True):
            alone = segmenter.segment([image], [[box]])[0][0]
            assert mask["rle_mask"] == alone["rle_mask"]
            assert mask["predicted_iou"] == pytest.approx(alone["predicted_iou"], rel=1e-5)


def test_images_without_boxes_are_never_encoded(
    segmenter: SamSegmenter, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = segmenter.model.get_image_embeddings
    monkeypatch.setattr(
        segmenter.model, "get_image_embeddings", lambda pixels: (encoded.append(len(pixels)), encode(pixels))[1]
    )
    assert segmenter.segment(images, [[], []]) == [[], []]
    assert segmenter.segment([], []) == []
    segmenter.segment(images, [[], BOXES[1]])
    assert encoded == [1]


def test_boxes_are_cut_at_the_pictures_border(segmenter: SamSegmenter, images: list[Image.Image]) -> None:
    outside = segmenter.segment(images[:1], [[[-5.0, -0.25, 95.0, 61.0]]])
    assert outside == segmenter.segment(images[:1], [[[0.0, 0.0, 90.0, 60.0]]])


def test_a_mask_without_pixels_is_valid_and_has_no_area(
    segmenter: SamSegmenter, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = segmenter.model.forward

    def blind(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.pred_masks[0] = -1.0
        return output

    monkeypatch.setattr(segmenter.model, "forward", blind)
    empty, other = segmenter.segment(images[:1], BOXES[:1])[0]
    assert empty["area_px"] == 0 < other["area_px"]
    assert decoded(empty["rle_mask"], images[0].size).shape == (60, 90)
    assert not decoded(empty["rle_mask"], images[0].size).any()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_pictures_of_any_mode_are_taken(segmenter: SamSegmenter, images: list[Image.Image], mode: str) -> None:
    image = images[0].convert(mode)
    assert segmenter.segment([image], BOXES[:1]) == segmenter.segment([image.convert("RGB")], BOXES[:1])


def test_bfloat16_gives_the_masks_of_transformers_in_bfloat16(kind: str, images: list[Image.Image]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_masks, _ = by_transformers(kind, images, BOXES)
    found = SamSegmenter(*TINY[kind](), dtype=torch.bfloat16).segment(images, BOXES)
    for image, masks, expected in zip(images, found, expected_masks, strict=True):
        for mask, pixels in zip(masks, expected[:, 0].numpy(), strict=True):
            assert (decoded(mask["rle_mask"], image.size) == pixels).mean() > 0.98


def overflow(segmenter: SamSegmenter, monkeypatch: pytest.MonkeyPatch, where: str, *, only_rough: bool) -> None:
    """Lets the model's mask of the first box come out as NaN, or the IoU that it predicts of it."""
    forward = segmenter.model.forward

    def overflowing(**inputs: Any) -> Any:
        output = forward(**inputs)
        if torch.is_autocast_enabled("cpu") or not only_rough:
            getattr(output, where)[0] = float("nan")
        return output

    monkeypatch.setattr(segmenter.model, "forward", overflowing)


@pytest.mark.parametrize("where", ["pred_masks", "iou_scores"])
def test_what_overflows_in_bfloat16_is_tried_again_in_float32(
    kind: str, segmenter: SamSegmenter, images: list[Image.Image], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = segmenter.segment(images[:1], BOXES[:1])[0]
    rough = SamSegmenter(segmenter.model, segmenter.image_processor, dtype=torch.bfloat16)
    unharmed = rough.segment(images, BOXES)[1]
    overflow(segmenter, monkeypatch, where, only_rough=True)
    found = rough.segment([images[0], images[0], images[1]], [[], *BOXES])
    assert found[0] == []
    assert [mask["rle_mask"] for mask in found[1]] == [mask["rle_mask"] for mask in exact]
    assert [mask["predicted_iou"] for mask in found[1]] == pytest.approx(
        [mask["predicted_iou"] for mask in exact], rel=1e-5
    )
    assert found[2] == unharmed


@pytest.mark.parametrize("where", ["pred_masks", "iou_scores"])
def test_masks_that_are_not_finite_in_float32_either_are_reported_for_their_image(
    segmenter: SamSegmenter, images: list[Image.Image], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(segmenter, monkeypatch, where, only_rough=False)
    with pytest.raises(NonFiniteScoresError, match=r"SAM: .* images \[1\] of the batch") as caught:
        segmenter.segment([images[0], *images], [[], *BOXES])
    assert caught.value.positions == [1]


def test_boxes_that_are_no_prompts_are_refused(segmenter: SamSegmenter, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        segmenter.segment(images, BOXES[:1])
    with pytest.raises(ValueError, match=r"boxes of image 1: found .*nan.*, expected four finite numbers"):
        segmenter.segment(images, [[], [[0.0, 0.0, float("nan"), 5.0]]])
    with pytest.raises(ValueError, match=r"boxes of image 0: found \[\[1, 2, 3\]\]"):
        segmenter.segment(images, [[[1, 2, 3]], []])


def test_a_saved_checkpoint_gives_the_same_masks(
    kind: str, segmenter: SamSegmenter, images: list[Image.Image], tmp_path: Path
) -> None:
    segmenter.model.save_pretrained(tmp_path)
    segmenter.image_processor.save_pretrained(tmp_path)
    loaded = SamSegmenter.from_pretrained(str(tmp_path))
    assert loaded.segment(images, BOXES) == segmenter.segment(images, BOXES)
    assert json.loads(json.dumps(loaded.settings))["kind"] == kind


def test_a_checkpoint_in_half_precision_computes_in_float32(
    kind: str, segmenter: SamSegmenter, images: list[Image.Image], tmp_path: Path
) -> None:
    segmenter.model.half().save_pretrained(tmp_path)
    segmenter.image_processor.save_pretrained(tmp_path)
    found = SamSegmenter.from_pretrained(str(tmp_path)).segment(images, BOXES)
    assert found == SamSegmenter(segmenter.model.float(), segmenter.image_processor).segment(images, BOXES)


def test_other_models_and_missing_weights_are_refused(segmenter: SamSegmenter, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="found a model of type 'bert', expected sam, sam2"):
        SamSegmenter.from_pretrained(str(tmp_path / "bert"))
    state = segmenter.model.state_dict()
    lost = next(name for name in state if name.startswith("mask_decoder.iou_token"))
    segmenter.model.save_pretrained(tmp_path, state_dict={name: state[name] for name in state if name != lost})
    with pytest.raises(ValueError, match=f"1 weights are missing, among them {lost}"):
        SamSegmenter.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights that cannot be read \(.*\)\. Download the checkpoint again"):
        SamSegmenter.from_pretrained(str(tmp_path))


def test_sam_2_says_that_it_needs_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    Sam2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SAM 2 needs torchvision.*pip install 'patch-aligned-llava\[annotate\]'"):
        SamSegmenter.from_pretrained(str(tmp_path))
