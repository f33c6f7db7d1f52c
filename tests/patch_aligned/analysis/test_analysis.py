"""The whole analysis on the tiny world: intervals, breakdowns, comparisons, several towers; what cannot be analysed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.convert.to_hf import to_hf
from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.analysis.regions import METRICS, SCORES, mean_and_sd
from patch_aligned.analysis.run import Analysis, AnalysisSettings, MeasureSettings, analyse
from patch_aligned.intervals import Resampling
from patch_aligned.models.load import load_models
from patch_aligned.pad import AnnotatedImage, read_annotations
from tests.patch_aligned.analysis.conftest import rectangle

START = "start=train_init/mm_projector.bin"


def run(pad: Path, *specifications: str, seeds: tuple[int, ...] = (), **settings: object) -> Analysis:
    models = load_models(specifications or ["random=random:1", START], "tiny-vicuna", "tiny-clip")
    measure = MeasureSettings(pad, pad.parent / "pictures", **settings)  # type: ignore[arg-type]
    return analyse(models, AnalysisSettings(measure, Resampling(200, seed=3), seeds))


def test_an_interval_surrounds_its_metric(pad: Path):
    for model in run(pad).models.values():
        for name in ("align_px", "align_px_otsu", "cosine", "pointing"):
            assert model.metrics.loc[name, "low"] <= model.metrics.loc[name, "value"] <= model.metrics.loc[name, "high"]


def test_threshold_rules_stand_side_by_side(pad: Path):
    found = run(pad).models["start"].metrics
    assert found.loc["align_px"].equals(found.loc["align_px_mid_range"])
    for rule in THRESHOLD_RULES:
        chosen = run(pad, threshold_rule=rule).models["start"].metrics
        assert chosen.loc["align_px"].equals(found.loc[f"align_px_{rule}"])


def test_spectra_sum_to_one_and_give_the_entropy(pad: Path):
    for entropy in (run(pad).models["start"].entropy_before, run(pad).models["start"].entropy_after):
        assert len(entropy.spectrum) == entropy.width
        assert sum(entropy.spectrum) == pytest.approx(1, rel=1e-12)
        direct = -sum(share * math.log(share) for share in entropy.spectrum if share)
        assert entropy.entropy_nats == pytest.approx(direct, rel=1e-12)
        assert entropy.effective_rank == pytest.approx(math.exp(direct), rel=1e-12)
        assert entropy.tokens == 4 * 16


def test_what_is_left_out_is_counted(write_pad: Callable):
    pad = write_pad(
        [rectangle(26, 14, 29, 17, "cup")],  # covers no token, and with it the image
        [rectangle(12, 0, 40, 28, "dog"), rectangle(0, 0, 12, 56, "tree")],  # the second lies outside the crop
        [],
    )
    counts = run(pad).models["start"].counts
    assert counts == {
        "images_with_regions": 2, "images_without_token": 1, "regions": 3, "regions_outside": 1,
        "regions_without_token": 1,
    }  # fmt: skip


def test_breakdowns_make_up_the_whole(pad: Path):
    found = run(pad)
    model = found.models["start"]
    assert next(iter(model.by_label)) == "dog"  # the only label of two regions
    assert (found.labels, len(model.by_label)) == (6, 6)
    for parts in (model.by_label, model.by_size):
        aligns = [part.loc["align_px"] for part in parts.values() if part.loc["align_px", "regions"]]
        mean = sum(align["value"] * align["regions"] for align in aligns) / sum(align["regions"] for align in aligns)
        assert mean == pytest.approx(model.metrics.loc["align_px", "value"], rel=1e-12)


def test_the_later_model_is_compared_with_each_earlier_one(pad: Path):
    found = run(pad, "a=random:1", "b=random:2", START)
    assert [(pair.first, pair.second) for pair in found.comparisons] == [("b", "a"), ("start", "a"), ("start", "b")]
    values = {name: model.metrics.loc["cosine", "value"] for name, model in found.models.items()}
    assert found.comparisons[1].metrics.loc["cosine", "value"] == pytest.approx(values["start"] - values["a"], rel=1e-9)


def test_untrained_projectors_are_those_of_their_seeds(pad: Path):
    """`start` is an MLP like `random:SEED` beside it, so its untrained twins are the random projectors themselves."""
    found = run(pad, START, "one=random:1", "two=random:2", seeds=(1, 2), picture_rows=1)
    untrained = found.models["start"].untrained
    assert untrained is not None
    alone = [found.models[name] for name in ("one", "two")]
    entropies = [model.entropy_after.entropy_nats for model in alone]
    assert untrained.entropy_after_nats["mean"] == pytest.approx(statistics.fmean(entropies), rel=1e-9)
    assert untrained.entropy_after_nats["sd"] == pytest.approx(statistics.stdev(entropies), rel=1e-6)
    cosines = [model.metrics.loc["cosine", "value"] for model in alone]
    assert untrained.metrics.loc["cosine", "mean"] == pytest.approx(statistics.fmean(cosines), rel=1e-9)
    assert list(untrained.metrics.index) == list(METRICS)
    assert list(found.picture[0].cells) == ["start", "one", "two"]
    assert run(pad).models["start"].untrained is None


def test_a_number_that_a_seed_leaves_undefined_is_undefined():
    assert mean_and_sd([1.0, 3.0]) == {"mean": 2.0, "sd": math.sqrt(2)}
    assert math.isnan(mean_and_sd([1.0, math.nan])["mean"])
    assert math.isnan(mean_and_sd([1.0, math.nan])["sd"])


def test_models_of_other_towers_are_analysed_beside_ours(pad: Path, tmp_path: Path):
    """Hugging Face's form of a checkpoint sees the same pixels and gives the same numbers as the checkpoint itself."""
    config = json.loads(Path("tiny-llava/config.json").read_text())
    Path("tiny-llava/config.json").write_text(json.dumps(config | {"image_aspect_ratio": "pad"}))
    to_hf("tiny-llava", tmp_path / "hf", dtype="float32")
    told = []
    settings = AnalysisSettings(MeasureSettings(pad, pad.parent / "pictures", picture_rows=2), Resampling(50))
    models = load_models([f"hf={tmp_path / 'hf'}", "own=tiny-llava"], image_aspect_ratio="pad")
    found = analyse(models, settings, lambda done, total: told.append((done, total)))
    assert list(found.models) == ["hf", "own"]
    hf, own = found.models["hf"], found.models["own"]
    assert (hf.counts, hf.grid, hf.layouts) == (own.counts, (4, 4), {"4 × 4": 4})
    for which in ("entropy_before", "entropy_after"):
        assert getattr(hf, which).entropy_nats == pytest.approx(getattr(own, which).entropy_nats, rel=1e-5)
    np.testing.assert_allclose(hf.metrics["value"], own.metrics["value"], rtol=1e-4)
    assert told == [(1, 8), (2, 8), (3, 8), (4, 8), (8, 8)]
    for row in found.picture:
        assert list(row.cells) == ["hf", "own"]
        grids = [cell.grid for cell in row.cells.values()]
        assert (grids[0].x_edges, grids[0].y_edges) == (grids[1].x_edges, grids[1].y_edges)
        torch.testing.assert_close(row.cells["hf"].cosine, row.cells["own"].cosine, rtol=1e-4, atol=1e-6)


def test_the_result_is_strict_json_with_the_rule_of_every_metric(pad: Path):
    found = run(pad, seeds=(0, 1), threshold_rule="otsu", picture_rows=1)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    model = document["models"]["start"]
    assert model["figures"].keys() == document["rules"].keys() == METRICS.keys()
    assert "otsu" in document["rules"]["align_px"]
    assert document["settings"]["resampling"] == {"resamples": 200, "seed": 3, "confidence": 0.95}
    assert model["figures"]["cosine"]["value"] == found.models["start"].metrics.loc["cosine", "value"]
    assert model["by_label"]["cup"]["cosine"]["value"] is None  # covers no token
    assert model["entropy_after"]["spectrum"][0] == found.models["start"].entropy_after.spectrum[0]
    assert model["untrained"]["seeds"] == [0, 1]
    assert document["size_limits_px"] == [1024, 9216]
    assert document["picture"][0]["iou_px"].keys() == {"random", "start"}
    assert document["images_per_second"] > 0


def test_a_region_of_the_picture_outside_a_models_image_is_null_in_the_json(write_pad: Callable):
    pad = write_pad([rectangle(0, 0, 12, 56, "tree"), rectangle(14, 0, 40, 20, "dog")])  # the crop cuts the tree away
    document = run(pad, START).to_json()
    assert document["picture"] == [{"image_id": "0.png", "label": "tree", "iou_px": {"start": None}}]


def test_the_data_frame_has_a_row_a_region_and_model(pad: Path):
    found = run(pad, START, "a=random:1", seeds=(0,))
    regions = found.regions
    assert dict(regions.groupby("model").size()) == dict.fromkeys(["start", "a", "start, untrained, seed 0"], 7)
    means = regions.groupby("model")[list(SCORES)].mean()
    for name in ("start", "a"):
        assert means.loc[name, "cosine"] == pytest.approx(found.models[name].metrics.loc["cosine", "value"], rel=1e-12)
    trees = regions[(regions["model"] == "start") & (regions["label"] == "tree")]
    assert (trees["area_px"].tolist(), trees["size"].tolist(), trees["image"].tolist()) == ([672], ["small"], [2])


def test_the_data_file_is_read_once_whatever_is_chosen(pad: Path, monkeypatch: pytest.MonkeyPatch):
    read = []

    def counted(path: Path) -> Iterator[AnnotatedImage]:
        read.append(path)
        return read_annotations(path)

    monkeypatch.setattr("patch_aligned.annotated_sets.read_annotations", counted)
    run(pad, START, limit=3, subset="random", on_error="skip", seeds=(0,))
    assert read == [pad]


def test_a_random_subset_follows_its_seed(pad: Path):
    def images(seed: int) -> int:
        return run(pad, START, limit=3, subset="random", seed=seed).models["start"].counts["regions"]

    assert {images(seed) for seed in range(8)} != {images(0)}
    assert images(1) == images(1)


def test_sets_and_models_that_cannot_be_analysed_say_why(pad: Path, write_pad: Callable):
    with pytest.raises(ValueError, match=r"none of the 1 regions covers a token.*--min-coverage"):
        run(write_pad([rectangle(26, 14, 29, 17, "cup")]))
    with pytest.raises(ValueError, match="no regions in 1 images"):
        run(write_pad([]))
    with pytest.raises(ValueError, match="--base is missing"):
        load_models([START], None, "tiny-clip")
    with pytest.raises(ValueError, match="'a' is given twice"):
        load_models(["a=random:1", "a=tiny-llava"], "tiny-vicuna", "tiny-clip")
    with pytest.raises(ValueError, match="at least once"):
        load_models([], "tiny-vicuna")
