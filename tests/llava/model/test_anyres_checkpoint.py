"""A checkpoint as LLaVA 1.6 writes them (tiles, `spatial_unpad`, `image_newline`), from the files to the answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import LoadedModel, load_pretrained_model
from tests.folders import set_config

ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_tower_lr": 2e-06,
    "unfreeze_mm_vision_tower": True,
}
PROMPTS = ("USER: <image>\nWhat is this? ASSISTANT:", "USER: <image>\nName three colours of it. ASSISTANT:")


@pytest.fixture
def newline(golden_world: Path, goldens: Path) -> torch.Tensor:
    """Makes the recorded stage-2 folder one of LLaVA 1.6; gives its `image_newline`."""
    shutil.copytree(goldens / "ckpt_stage2", "anyres")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    weights = load_file("anyres/model.safetensors") | {"model.image_newline": vector}
    save_file(weights, "anyres/model.safetensors", metadata={"format": "pt"})
    set_config("anyres", **ANYRES)
    return vector


def answers(loaded: LoadedModel, names: list[str], prompts: list[str]) -> list[list[int]]:
    tokenizer, model, processor, _ = loaded
    images = [Image.open(name).convert("RGB") for name in names]
    rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return model.generate(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        attention_mask=torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
        images=process_images(images, processor, model.config),
        image_sizes=[image.size for image in images],
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
    ).tolist()


def test_a_batch_of_tiled_images_is_answered_as_one_by_one(newline: torch.Tensor) -> None:
    loaded = load_pretrained_model("anyres", None, "x", device="cpu")
    assert torch.equal(loaded.model.model.image_newline, newline)
    names = ["images/im1.png", "images/im4.png"]  # a wide one and a tall one: grids of another shape
    together = answers(loaded, names, list(PROMPTS))
    alone = [answers(loaded, [name], [prompt])[0] for name, prompt in zip(names, PROMPTS, strict=True)]
    assert together == alone
    other = answers(loaded, names[::-1], list(PROMPTS))
    assert other != together  # the images are seen


def test_visual_tokens_are_counted_without_the_newlines_values(newline: torch.Tensor) -> None:
    model = load_pretrained_model("anyres", None, "x", device="cpu").model
    expected = model.visual_tokens_of((120, 77))
    model.model.image_newline.data = torch.empty(0)  # as ZeRO-3 leaves it between passes, where no rank may gather
    model.model.image_newline.ds_id = 0
    assert model.visual_tokens_of((120, 77)) == expected


def test_the_newline_changes_what_is_seen(newline: torch.Tensor) -> None:
    loaded = load_pretrained_model("anyres", None, "x", device="cpu")
    images = [Image.open("images/im1.png").convert("RGB")]
    pixels = process_images(images, loaded.image_processor, loaded.model.config)
    tokens = loaded.model.encode_image_batch(pixels, [image.size for image in images]).tokens[0]
    rows = [row for row, token in enumerate(tokens) if torch.equal(token, newline)]
    assert len(tokens) == 16 + 4 * (8 + 1)  # base tile; 80 x 40 on 112 x 56: 4 rows of two tiles of 4, each closed
    assert rows == [16 + 9 * row + 8 for row in range(4)]


def test_a_projector_file_brings_its_newline(newline: torch.Tensor, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    set_config("stage1", mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres")
    state = torch.load("stage1/mm_projector.bin", weights_only=True)
    torch.save(state | {"model.image_newline": newline}, "stage1/mm_projector.bin")
    model = load_pretrained_model("stage1", "tiny-vicuna", "x", device="cpu").model
    assert torch.equal(model.model.image_newline, newline)
    torch.save(state, "stage1/mm_projector.bin")
    with pytest.raises(ValueError, match=r"model\.image_newline: model \(64,\), file has no such tensor"):
        load_pretrained_model("stage1", "tiny-vicuna", "x", device="cpu")
