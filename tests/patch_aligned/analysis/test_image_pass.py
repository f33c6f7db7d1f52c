"""The whole measurement on a tiny world, against a reference that goes its own way from files to numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patch_aligned.analysis.localisation import save_localisation_figure
from patch_aligned.analysis.run import Analysis, AnalysisSettings, MeasureSettings, analyse
from patch_aligned.intervals import Resampling
from patch_aligned.models.load import load_models
from tests.patch_aligned.analysis.conftest import rectangle


def run(pad: Path, *specifications: str, image_aspect_ratio: str | None = None, **settings: object) -> Analysis:
    specifications = specifications or ("random=random:1", "start=train_init/mm_projector.bin")
    models = load_models(specifications, "tiny-vicuna", "tiny-clip", image_aspect_ratio)
    measure = MeasureSettings(pad, pad.parent / "pictures", **settings)  # type: ignore[arg-type]
    return analyse(models, AnalysisSettings(measure, Resampling(resamples=0)))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def entropy(tokens: np.ndarray) -> float:
    energies = np.linalg.svd(tokens.reshape(-1, tokens.shape[-1]).astype(np.float64), compute_uv=False) ** 2
    shares = energies / energies.sum()
    return float(-(shares * np.log(shares)).sum())


def test_measures_equal_a_reference_from_files_to_numbers(pad: Path):
    """The centre crop keeps columns 12 to 67 of 80 x 56 pixels, unscaled, so model pixels are slices of the mask."""
    records = [json.loads(line) for line in pad.read_text().splitlines()]
    processor, tower = CLIPImageProcessorPil.from_pretrained("tiny-clip"), CLIPVisionModel.from_pretrained("tiny-clip")
    images = [Image.open(pad.parent / "pictures" / record["image_id"]) for record in records]
    with torch.no_grad():
        hidden = tower(processor(images, return_tensors="pt")["pixel_values"], output_hidden_states=True).hidden_states
    before = hidden[-2][:, 1:].double().numpy()  # [images, 16, 32]
    stored = torch.load("train_init/mm_projector.bin", weights_only=True)
    weights = {name.removeprefix("model.mm_projector."): weight.double().numpy() for name, weight in stored.items()}
    inner = torch.nn.functional.gelu(torch.from_numpy(before @ weights["0.weight"].T + weights["0.bias"])).numpy()
    after = inner @ weights["2.weight"].T + weights["2.bias"]  # [images, 16, 64]
    table = load_file("tiny-vicuna/model.safetensors")["model.embed_tokens.weight"].double().numpy()
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")

    ious, cosines, best = [], [], []
    for record, tokens in zip(records, after, strict=True):
        for region in record["labels"]:
            label = table[tokenizer(region["tag"], add_special_tokens=False).input_ids].mean(axis=0)
            mask = coco_mask.decode({"size": [56, 80], "counts": region["rle_mask"].encode()})[:, 12:68]
            if not mask.any():
                continue
            cosine = unit(tokens) @ unit(label)
            predicted = (cosine > (cosine.min() + cosine.max()) / 2).reshape(4, 4).repeat(14, 0).repeat(14, 1)
            ious.append((predicted & (mask == 1)).sum() / (predicted | (mask == 1)).sum())
            covered = mask.reshape(4, 14, 4, 14).mean(axis=(1, 3)).reshape(-1) >= 0.5
            if covered.any():
                cosines.append(unit(tokens[covered].mean(axis=0)) @ unit(label))
                best.append((unit(table[:1000]) @ unit(tokens[covered].mean(axis=0))).max())

    analysis = run(pad)
    found = analysis.models["start"]
    assert analysis.images == 4
    assert found.entropy_before.entropy_nats == pytest.approx(entropy(before), rel=1e-5)
    assert found.entropy_after.entropy_nats == pytest.approx(entropy(after), rel=1e-5)
    assert found.entropy_drop_nats == found.entropy_before.entropy_nats - found.entropy_after.entropy_nats
    assert found.metrics.loc["align_px", "value"] == pytest.approx(np.mean(ious), rel=1e-5)
    assert found.metrics.loc["cosine", "value"] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert found.metrics.loc["best_word_cosine", "value"] == pytest.approx(np.mean(best), rel=1e-5)
    tags = dict.fromkeys(region["tag"] for record in records for region in record["labels"])
    labels = np.stack([unit(table[tokenizer(tag, add_special_tokens=False).input_ids].mean(axis=0)) for tag in tags])
    assert found.cosine_floor == pytest.approx(np.linalg.norm(labels.mean(axis=0)), rel=1e-6)
    assert found.metrics.loc[["align_px", "cosine"], "regions"].tolist() == [6, 5]
    assert (found.counts["images_with_regions"], found.counts["regions"]) == (3, 7)
    assert (found.counts["regions_outside"], found.counts["regions_without_token"]) == (1, 1)


def test_padding_keeps_the_region_that_the_crop_cuts_away(pad: Path):
    assert run(pad, image_aspect_ratio="pad").models["start"].counts["regions_outside"] == 0


def test_no_number_depends_on_the_batch_size_or_on_other_projectors(pad: Path):
    together, alone = run(pad, batch_size=3), run(pad, "start=train_init/mm_projector.bin", batch_size=1)
    first, second = together.models["start"], alone.models["start"]
    assert first.entropy_after.entropy_nats == pytest.approx(second.entropy_after.entropy_nats, rel=1e-6)
    for name, tolerance in (("align_px", 1e-6), ("shuffled_cosine", 1e-5)):
        values = [model.metrics.loc[name, "value"] for model in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


def test_only_the_chosen_images_and_regions_count(pad: Path):
    limited = run(pad, limit=2)
    assert (limited.images, limited.models["start"].counts["regions"]) == (2, 2)
    objects = run(pad, region_kind="object")
    assert (objects.images, objects.models["start"].counts["regions"]) == (4, 2)


def test_instances_of_a_label_can_be_one_region(write_pad: Callable):
    """A map of a label cannot fit one of two instances, but both together."""
    halves, cup = [rectangle(12, 0, 40, 28, "dog"), rectangle(40, 0, 68, 28, "dog")], rectangle(12, 28, 68, 56, "cup")
    apart = run(write_pad([*halves, cup]), "start=train_init/mm_projector.bin")
    together = run(write_pad([*halves, cup]), "start=train_init/mm_projector.bin", region_unit="label")
    drawn = run(write_pad([rectangle(12, 0, 68, 28, "dog"), cup]), "start=train_init/mm_projector.bin")
    assert [len(found.regions) for found in (apart, together)] == [3, 2]
    assert together.models["start"].metrics.equals(drawn.models["start"].metrics)


def test_thresholds_can_be_kept_above_zero(pad: Path):
    found = [run(pad, positive_threshold=positive, picture_rows=3) for positive in (False, True)]
    free, positive = (np.stack([row.cells["start"].predicted for row in analysis.picture]) for analysis in found)
    cosines = np.stack([row.cells["start"].cosine for row in found[0].picture])
    assert np.array_equal(positive, free & (cosines > 0))
    assert not np.array_equal(positive, free)
    aligns = [analysis.models["start"].metrics.loc["align_px", "value"] for analysis in found]
    assert aligns[0] != aligns[1]


def test_the_control_follows_its_seed(pad: Path):
    cosines = {run(pad, seed=seed).models["start"].metrics.loc["shuffled_cosine", "value"] for seed in (0, 0, 1, 2, 3)}
    assert 1 < len(cosines) < 5


def test_sets_that_cannot_be_measured_say_why(write_pad: Callable):
    with pytest.raises(ValueError, match=r"no regions in 2 images.*records have labels"):
        run(write_pad([], []))
    with pytest.raises(ValueError, match=r"of kind 'object' \(kinds in the file: \['background'\]\)"):
        run(write_pad([rectangle(20, 0, 40, 20, "dog") | {"kind": "background"}]), region_kind="object")
    with pytest.raises(ValueError, match=r"all 1 regions lie outside.*--image-aspect-ratio pad"):
        run(write_pad([rectangle(0, 0, 10, 56, "dog")]))


def test_images_that_do_not_fit_their_records_are_named(pad: Path):
    records = [json.loads(line) for line in pad.read_text().splitlines()]
    Image.new("RGB", (56, 80)).save(pad.parent / "pictures" / "2.png")
    with pytest.raises(ValueError, match=r"2\.png.*\[80, 56\].*\[56, 80\]"):
        run(pad)
    (pad.parent / "pictures" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images are missing, the first is .*2\.png"):
        run(pad)
    records[0]["image_id"] = "../pad.jsonl"
    pad.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match="does not lead out of the image folder"):
        run(pad)


def test_images_that_cannot_be_measured_can_be_left_out_as_if_they_had_never_been_there(pad: Path):
    records = [json.loads(line) for line in pad.read_text().splitlines()]
    extra = [rectangle(14, 0, 40, 30, "broken"), rectangle(14, 0, 40, 50, "dog")]
    for name in ("cut off.png", "turned.png", "missing.png"):
        records.insert(1, records[0] | {"image_id": name, "labels": extra})
    pictures = pad.parent / "pictures"
    (pictures / "cut off.png").write_bytes((pictures / "0.png").read_bytes()[:4000])
    Image.new("RGB", (56, 80)).save(pictures / "turned.png")
    whole = run(pad)
    pad.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(FileNotFoundError, match=r"1 of 7 images are missing.*--on_error skip"):
        run(pad)
    left = run(pad, on_error="skip", picture_rows=3)
    assert left.to_json()["models"] == whole.to_json()["models"]
    assert (left.images, [row.image_id for row in left.picture]) == (4, ["0.png", "2.png", "3.png"])
    assert list(left.broken_images) == ["missing.png", "turned.png", "cut off.png"]
    for word, reason in zip(("no such", "[56, 80]", "decoded"), left.broken_images.values(), strict=True):
        assert word in reason
    assert whole.broken_images == {}

    pad.write_text("\n".join(json.dumps(record) for record in records if record["image_id"] == "cut off.png"))
    with pytest.raises(OSError, match=r"cut off\.png.*leave images like it out with --on_error skip"):
        run(pad)
    with pytest.raises(ValueError, match=r"none of its 1 images can be measured. The first: .*cut off\.png"):
        run(pad, on_error="skip")


def test_a_projector_of_another_width_names_both_shapes(pad: Path, tmp_path: Path):
    torch.save(
        {"model.mm_projector.weight": torch.zeros(64, 48), "model.mm_projector.bias": torch.zeros(64)}, "wide.bin"
    )
    with pytest.raises(ValueError, match=r"\(64, 32\).*\(64, 48\)"):
        run(pad, "wide=wide.bin")


def test_the_picture_shows_the_largest_region_of_evenly_spread_images(pad: Path, tmp_path: Path):
    measures = run(pad, picture_rows=3)
    assert [(row.image_id, row.label) for row in measures.picture] == [
        ("0.png", "dog"), ("2.png", "dog"), ("3.png", "table"),
    ]  # fmt: skip
    cell = measures.picture[2].cells["start"]
    assert cell.cosine.shape == cell.predicted.shape == (4, 4)
    assert measures.picture[2].truth.sum() == 56 * 28
    path = tmp_path / "picture.png"
    save_localisation_figure(measures.picture, path, "mid_range")
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 100
    assert [row.image_id for row in run(pad, picture_rows=1).picture] == ["2.png"]
    assert run(pad, picture_rows=0).picture == []
