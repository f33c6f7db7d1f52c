"""Stage 1 with the patch loss, whole runs on tiny models: projectors and tiles whose grid is not the tower's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from tests.training import logged

CABSTRACTOR = (
    "--mm_projector_type cabstractor --mm_projector_num_queries 4 --mm_projector_depth 1 --mm_projector_hidden_size 24"
)


def test_regions_pull_on_the_grid_of_a_c_abstractor_which_is_saved_and_read_back(run_stage_1: Any) -> None:
    trainer, plugin = run_stage_1(["im0.png", "im5.png"], f"{CABSTRACTOR} --max_steps 12")
    assert trainer.model.visual_grid == plugin.context.grid == (2, 2)  # the tower's is 4 x 4
    assert plugin.context.visual_tokens.shape[:2] == (2, 4)
    expected = torch.eye(4, dtype=torch.bool).repeat(2, 1)
    assert torch.equal(plugin.batch["region_tokens"], expected)  # a quarter of the image is one token
    patch, cosine = logged(trainer, "loss/patch"), logged(trainer, "patch/cosine")
    assert patch[-1] < patch[0] - 0.3 and cosine[-1] > cosine[0] + 0.3
    assert logged(trainer, "patch/dropped_regions") == [0] * 12

    trained = trainer.model.get_model().mm_projector.state_dict()
    stored = torch.load("run/mm_projector.bin", weights_only=True)
    assert stored.keys() == {f"model.mm_projector.{name}" for name in trained}
    config = json.loads(Path("run/config.json").read_text())
    keys = ("type", "num_queries", "depth", "hidden_size")
    assert [config[f"mm_projector_{key}"] for key in keys] == ["cabstractor", 4, 1, 24]
    assert config["mm_num_patches"] == 16

    _, model, processor, _ = load_pretrained_model("run", "tiny-vicuna", "run", device="cpu")
    assert model.visual_grid == (2, 2)
    pixels = process_images([Image.open("images/im1.png")], processor, model.config)
    with torch.no_grad():
        expected = trainer.model.eval().encode_images(pixels)
        torch.testing.assert_close(model.encode_images(pixels), expected, rtol=1e-6, atol=1e-6)
    assert expected.shape == (1, 4, 64)


ANYRES = ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "[[56, 112], [112, 56], [112, 112]]"]


@pytest.mark.parametrize("merge_type", ["flat", "spatial_unpad"])
def test_regions_of_a_tiled_image_pull_on_its_base_tile(run_stage_1: Any, merge_type: str) -> None:
    """im1.png is 80 x 40, im5.png 224 x 224: two tiles and four, so that shapes differ in the batch."""
    images, flags = ["im1.png", "im5.png"], f"--mm_patch_merge_type {merge_type} --mm_projector_type linear"
    trainer, plugin = run_stage_1(images, f"{flags} --max_steps 8 --learning_rate 2e-2", ANYRES)
    model = trainer.model
    assert plugin.context.visual_tokens.shape[:2] == (2, 16) and plugin.context.grid == (4, 4)
    quadrants = torch.zeros(4, 2, 2, 2, 2, dtype=torch.bool)
    for place in range(4):
        quadrants[place, place // 2, :, place % 2] = True
    assert torch.equal(plugin.batch["region_tokens"], quadrants.flatten(1).repeat(2, 1))  # squeezed, not padded
    patch = logged(trainer, "loss/patch")
    assert patch[-1] < patch[0] - 0.3
    assert Path("run/first_batch.png").is_file()

    config = json.loads(Path("run/config.json").read_text())
    assert config["image_grid_pinpoints"] == [[56, 112], [112, 56], [112, 112]]
    stored = torch.load("run/mm_projector.bin", weights_only=True)
    assert ("model.image_newline" in stored) == (merge_type == "spatial_unpad")
    _, loaded, processor, _ = load_pretrained_model("run", "tiny-vicuna", "run", device="cpu")
    picture = Image.open("images/im1.png")
    pixels = process_images([picture], processor, loaded.config)
    with torch.no_grad():
        ours, theirs = (m.eval().encode_image_batch(pixels, [picture.size]).tokens[0] for m in (model, loaded))
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert len(ours) == model.visual_tokens_of(picture.size) == (48 if merge_type == "flat" else 16 + 4 * 9)


def test_only_the_base_tile_is_pulled(run_stage_1: Any) -> None:
    flags = "--mm_projector_type linear --max_steps 1 --learning_rate 0"
    trainer, plugin = run_stage_1(["im1.png", "im5.png"], flags, ANYRES)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    batch.pop("labels")
    trainer.model.train().attach_plugin(plugin)
    images = [image.clone().requires_grad_() for image in batch.pop("images")]
    trainer.model.get_vision_tower().requires_grad_(True)
    trainer.model(**batch, images=images).auxiliary_losses["patch"].backward()
    for image in images:
        assert image.grad.flatten(1).any(dim=1).tolist() == [True] + [False] * (len(image) - 1)


def test_the_newline_of_tiles_is_trained_and_carried_into_stage_2(run_stage_1: Any) -> None:
    flags = "--mm_patch_merge_type spatial_unpad --mm_projector_type linear --max_steps 1"
    untrained, _ = run_stage_1(["im1.png"], f"{flags} --learning_rate 0", ANYRES)
    start = untrained.model.get_model().image_newline.detach().clone()
    first, _ = run_stage_1(["im1.png"], flags, ANYRES)
    trained = first.model.get_model().image_newline.detach().clone()
    assert (trained != start).any()
    second, _ = run_stage_1(
        ["im1.png"], f"{flags} --learning_rate 0 --pretrain_mm_mlp_adapter run/mm_projector.bin", ANYRES
    )
    assert torch.equal(second.model.get_model().image_newline, trained)


def test_tiles_that_leave_no_room_for_text_are_refused(run_stage_1: Any) -> None:
    with pytest.raises(ValueError, match="--model_max_length: found 90, expected at least 96"):  # 5 tiles of 16 tokens
        run_stage_1(["im1.png"], "--mm_projector_type linear --max_steps 1 --model_max_length 90", ANYRES)
