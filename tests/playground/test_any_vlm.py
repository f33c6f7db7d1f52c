"""The experiment with a stitched model: kept features, rotated targets, and its report beside LLaVA's figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLVisionConfig, InternVLVisionModel

from patch_aligned.labels import LabelTokenizer
from patch_aligned.models.stitch import stitch
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.objective import PatchObjective
from playground.mini.proof import report_any_vlm, train_any_vlm
from playground.mini.proof.train_any_vlm import keep_features, rotate_words
from playground.mini.train_rotated import rotation_about
from tests.patch_aligned.models.families import tokenizer
from tests.patch_aligned.models.test_stitch import ENCODERS, GOLDENS
from tests.patch_aligned.train.test_train_command import record_of


def test_a_frozen_tower_runs_once_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"image_size": [28, 28], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower = InternVLVisionModel(InternVLVisionConfig(**sizes, patch_size=[14, 14], num_attention_heads=2)).eval()
    images = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        expected = tower(images).last_hidden_state
        monkeypatch.setattr(InternVLVisionModel, "forward", InternVLVisionModel.forward)  # so that it is put back
        keep_features(tmp_path)
        torch.testing.assert_close(tower(pixel_values=images[:2], return_dict=True).last_hidden_state, expected[:2])
        for weight in tower.parameters():
            weight[:] = 0
        kept = tower(pixel_values=images.flip(0)[1:]).last_hidden_state
    torch.testing.assert_close(kept, expected.flip(0)[1:])
    assert len(list(tmp_path.iterdir())) == 2


def test_targets_are_words_turned_about_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchObjective, "loss", lambda objective, ids, embed_words: embed_words(ids))
    rotate_words(3)
    index: Any = SimpleNamespace(tag_counts=lambda: {"what is": 1, "cat": 3})
    objective: Any = PatchObjective(PatchArguments(), LabelTokenizer(tokenizer()), index)
    table = torch.randn(256, 12, dtype=torch.float64)
    cat, what, is_ = (table[tokenizer().convert_tokens_to_ids(word)] for word in ("cat", "what", "is"))
    rotation = rotation_about((cat + (what + is_) / 2) / 2, 3)
    ids = torch.tensor([7, 9])
    found = objective.loss(ids, lambda ids: table[ids])
    torch.testing.assert_close(found, table[ids] @ rotation.T, rtol=1e-10, atol=1e-10)


def test_an_arm_trains_a_stitched_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InternVLVisionModel, "forward", InternVLVisionModel.forward)  # so that it is put back
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(tmp_path / "cache"))
    ENCODERS["dinov2"](tmp_path / "tower")
    stitch(str(tmp_path / "tower"), str(GOLDENS / "tiny-vicuna"), "internvl", tmp_path / "model")
    (tmp_path / "pad.json").write_text(json.dumps([record_of(number, tmp_path) for number in range(8)]))
    output = tmp_path / "run"
    train_any_vlm.main(
        tmp_path / "model", "P", 0, tmp_path, output, tmp_path / "features", steps=1, warmup_steps=2, rate=1e-3
    )
    stitched, trained = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", output))
    changed = {name for name, weight in trained.items() if not torch.equal(weight, stitched[name])}
    assert changed == set(load_file(output / "projector.safetensors"))


def test_the_report_has_the_seeds_that_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measures = tmp_path / "measures"
    measures.mkdir()
    for arm, low in (("C", -0.1), ("P", 0.9), ("R", 0.3)):
        for suffix in ("json", "parquet"):
            shutil.copy(report_any_vlm.LLAVA / "measures" / f"{arm}_seed_1.{suffix}", measures)
        metrics = {"reads_per_caption": {"value": 1.2, "low": low, "high": 1.5}, "loss_per_token": {"value": 2.0}}
        (measures / f"{arm}_seed_1_reads.json").write_text(json.dumps({"metrics": metrics}))
    report_any_vlm.main("internvl", tmp_path)
    text = Path(capsys.readouterr().out.strip()).read_text()
    assert "| seeds | 1 | 0, 1, 2 |" in text
    assert "| P | 1 | 1.20 | 0.90 … 1.50 | 2.00 | above 1 | no |" in text
    assert "| C | 1 | 1.20 | -0.10 … 1.50 | 2.00 | not above 0 | yes |" in text
    [own] = [line for line in text.splitlines() if line.startswith("| internvl | P |")]
    assert own.split(" | ")[2:4] == ["1.38", "0.81"]
