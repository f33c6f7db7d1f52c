"""LLaVA's plugin and `PatchAlignment` compute the same loss for a checkpoint and its converted folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from llava.convert.to_hf import to_hf
from llava.mm_utils import image_view_of, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from patch_aligned import PatchAlignment, train_projector_only
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.plugin import PatchAlignedPlugin
from tests.folders import set_config
from tests.pads import record_of_quarters
from tests.patch_aligned.train.world import arguments_of

IMAGES = ("im0.png", "im1.png", "im2.png")  # square, wide, tall


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_loss_and_gradients_are_those_of_the_plugin(aspect_ratio: str, golden_world: Path) -> None:
    set_config("tiny-llava", conversation_version="v1", image_aspect_ratio=aspect_ratio)
    to_hf("tiny-llava", "hf", base=None)
    records = [record_of_quarters(name, Image.open(Path("images", name)).size) for name in IMAGES]
    Path("pad.json").write_text(json.dumps(records))
    images = [Image.open(Path("images", name)).convert("RGB") for name in IMAGES]

    tokenizer, ours, image_processor, _ = load_pretrained_model("tiny-llava", None, "tiny-llava", device="cpu")
    plugin = PatchAlignedPlugin()
    plugin.setup(PatchArguments(patch_cache_dir="cache"), tokenizer, data_path="pad.json")
    ours.attach_plugin(plugin)
    ours.requires_grad_(False).get_model().mm_projector.requires_grad_(True)
    tower = ours.get_vision_tower()
    views = [
        image_view_of(image.size, image_processor, aspect_ratio, ours.visual_grid, tower.seen_side) for image in images
    ]
    extras = [plugin.transform_sample({"image": name}, view) for name, view in zip(IMAGES, views, strict=True)]
    ids = tokenizer_image_token("<image>\nwater", tokenizer, return_tensors="pt").repeat(len(images), 1)
    pixels = process_images(images, image_processor, ours.config)
    outputs = ours(input_ids=ids, images=pixels, labels=ids, plugin_batch=plugin.collate(extras))
    expected = outputs.auxiliary_losses["patch"]
    expected.backward()

    theirs = AutoModelForImageTextToText.from_pretrained("hf")
    processor = AutoProcessor.from_pretrained("hf", backend="pil")  # resizes as ours does
    train_projector_only(theirs.train())

    def collate(samples: list[dict[str, Any]]) -> Any:
        texts, pictures = [f"{processor.image_token} water"] * len(samples), [[one["image"]] for one in samples]
        batch = processor(text=texts, images=pictures, return_tensors="pt")
        return batch | {"labels": batch["input_ids"]}

    samples = [{"image": image, "image_id": name} for image, name in zip(images, IMAGES, strict=True)]
    args = arguments_of(Path("run"))
    trainer = Trainer(theirs, args, train_dataset=samples, data_collator=collate, processing_class=processor)
    PatchAlignment("pad.json", beta=(1, 1), cache_dir="cache").attach(trainer)
    trainer.patch_alignment._is_warm_up = True  # the patch loss alone
    loss = trainer.compute_loss(theirs, trainer.data_collator(samples))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    layers = zip(("linear_1", "linear_2"), ours.get_model().mm_projector[::2], strict=True)
    for name, layer in layers:
        found = theirs.get_submodule(f"model.multi_modal_projector.{name}")
        for weight, of_layer in ((found.weight, layer.weight), (found.bias, layer.bias)):
            assert weight.grad is not None and of_layer.grad is not None
            assert (weight.grad - of_layer.grad).norm() <= 1e-6 * of_layer.grad.norm()
