"""Rotated words: the same geometry as the words, other targets, and the loss towards them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava.plugin import AlignmentContext, ImageView
from llava.train.train import train
from patch_aligned.train.plugin import PatchAlignedPlugin
from playground.mini.train_rotated import RotatedWordsArguments, RotatedWordsPlugin, rotation_about
from tests.pads import TAGS, record_of_quarters

D = 12


def test_a_rotation_keeps_the_axis_and_all_angles() -> None:
    vectors = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1
    mean = vectors.mean(dim=0)
    rotation = rotation_about(mean, 0)
    rotated = vectors @ rotation.T
    torch.testing.assert_close(rotated @ rotated.T, vectors @ vectors.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotated.mean(dim=0), mean, rtol=1e-12, atol=1e-12)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    # Away from the mean nothing is left of a vector's own direction but chance.
    own = torch.cosine_similarity(rotated - mean, vectors - mean)
    assert own.mean().abs() < 0.3
    assert torch.equal(rotation, rotation_about(mean, 0))
    assert not torch.allclose(rotation, rotation_about(mean, 1))


def test_rotations_are_uniform_among_those_about_the_axis() -> None:
    """A vector at a right angle to the axis goes to every direction at a right angle equally often."""
    axis, vector = torch.eye(4, dtype=torch.float64)[:2]
    images = torch.stack([rotation_about(axis, seed) @ vector for seed in range(2000)])
    torch.testing.assert_close(images[:, 0], torch.zeros(2000, dtype=torch.float64), rtol=0, atol=1e-12)
    assert images.mean(dim=0).abs().max() < 0.05
    torch.testing.assert_close(images.T @ images / 2000, torch.diag(torch.tensor([0, 1, 1, 1]) / 3).double(),
                               rtol=0, atol=0.03)  # fmt: skip


def test_the_loss_is_that_of_the_patch_loss_towards_a_rotated_table(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "goldens" / "llava" / "tiny-vicuna")
    (tmp_path / "pad.json").write_text(json.dumps([record_of_quarters("a.jpg", (32, 32))]))
    arguments = RotatedWordsArguments(patch_cache_dir=str(tmp_path / "cache"), patch_rotation_seed=3)
    plugins = [RotatedWordsPlugin(), PatchAlignedPlugin()]
    for plugin in plugins:
        plugin.setup(arguments, tokenizer, data_path=str(tmp_path / "pad.json"))
    view = ImageView((32, 32), "crop", 32, 32, 32, (4, 4))
    batch = plugins[1].collate([plugins[1].transform_sample({"image": "a.jpg"}, view)])
    table = torch.nn.Embedding(2000, D, dtype=torch.float64)
    visual_tokens = torch.randn(1, 16, D, dtype=torch.float64)
    context = AlignmentContext(visual_tokens, torch.tensor([0]), (4, 4), table)

    labels = [table.weight[tokenizer(tag, add_special_tokens=False)["input_ids"]].detach().mean(dim=0) for tag in TAGS]
    mean = torch.stack(labels).mean(dim=0)
    rotated = torch.nn.Embedding.from_pretrained(table.weight.detach() @ rotation_about(mean, 3).T)
    for _ in range(2):  # the rotation stays
        found = plugins[0].auxiliary_losses(context, batch).losses["patch"]
        expected = plugins[1].auxiliary_losses(replace(context, embed_words=rotated), batch).losses["patch"]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert not torch.isclose(found, plugins[1].auxiliary_losses(context, batch).losses["patch"])


def test_a_run_trains_towards_rotated_words(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(golden_world / "cache"))
    monkeypatch.setattr("llava.data.records.HF_HOME", str(golden_world / "cache"))
    images = ("im0.png", "im5.png")
    records = [record_of_quarters(image, Image.open(Path("images") / image).size) for image in images]
    Path("pad.json").write_text(json.dumps(records))
    flags = (
        "--bf16 False --use_cpu True --report_to none --logging_steps 1 --vision_tower tiny-clip --max_steps 2 "
        "--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --disable_tqdm True "
        "--model_name_or_path tiny-vicuna --image_folder images --model_max_length 2048 --version plain "
        "--tune_mm_mlp_adapter True --per_device_train_batch_size 2 --save_strategy no --data_path pad.json "
        "--patch_rotation_seed 4 --output_dir run"
    )
    monkeypatch.setattr(sys, "argv", ["train_rotated", *flags.split()])
    plugin = RotatedWordsPlugin()
    trainer = train(plugin=plugin)
    table = trainer.model.get_input_embeddings().weight.detach()
    mean = torch.stack([table[list(ids)].double().mean(dim=0) for ids in plugin.rotated.label_ids]).mean(dim=0)
    assert plugin.rotated.rotation is not None
    torch.testing.assert_close(plugin.rotated.rotation, rotation_about(mean, 4), rtol=0, atol=1e-6)
    assert sum("loss/patch" in entry for entry in trainer.state.log_history) == 2
