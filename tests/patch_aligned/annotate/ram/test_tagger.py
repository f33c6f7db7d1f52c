"""Pictures in, tags out: preprocessing, thresholds, precision, and what happens to scores that are not finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from patch_aligned.annotate.pipeline import ImageInWork
from patch_aligned.annotate.ram.model import RamModel
from patch_aligned.annotate.ram.tagger import RamTagger, preprocess
from patch_aligned.annotate.regions import NonFiniteScoresError, Tag

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def tagger_of(model: RamModel, threshold: float = 0.5, **options: Any) -> RamTagger:
    tags = [f"tag {number}" for number in range(model.config.num_tags)]
    return RamTagger(model, tags, [threshold] * len(tags), **options)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["ram", "ram_plus"])
def test_the_tags_are_the_originals(kind: str, request: pytest.FixtureRequest, ram_goldens: Path) -> None:
    golden, model = request.getfixturevalue(f"{kind}_golden"), request.getfixturevalue(kind)
    recorded = json.loads(next(ram_goldens.glob(f"{kind}_mini96*.json")).read_text(encoding="utf-8"))
    names = (ram_goldens / "tags_32.txt").read_text(encoding="utf-8").splitlines()
    tagger = RamTagger(
        model, [names[place] for place in recorded.get("kept_tags", range(32))], golden["class_threshold"].tolist()
    )
    tags = tagger.select(model.tag_logits(golden["output.image_embeds"]).sigmoid())
    assert [" | ".join(tag.name for tag in image_tags) for image_tags in tags] == recorded["tags"]
    if kind == "ram":
        from_pixels = tagger.select(tagger.scores(golden["input.image"]))
        assert [[tag.name for tag in image_tags] for image_tags in from_pixels] == [
            [tag.name for tag in image_tags] for image_tags in tags
        ]


def test_pictures_are_squashed_and_normalised() -> None:
    image = picture(200, 100)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (96, 96), mode="bilinear", antialias=True)[0]
    found = preprocess([image, image.transpose(Image.Transpose.ROTATE_90)], 96)
    assert found.shape == (2, 3, 96, 96)
    # PIL rounds to whole grey levels after each axis.
    assert_close((found[0] * DEVIATION + MEAN) * 255, resized, rtol=0, atol=1.01)


def test_the_filter_is_bilinear_or_bicubic() -> None:
    image = picture(200, 100)
    bicubic = image.resize((96, 96), Image.Resampling.BICUBIC)
    assert_close(preprocess([image], 96, "bicubic"), preprocess([bicubic], 96), rtol=0, atol=0)
    assert not torch.equal(preprocess([image], 96), preprocess([bicubic], 96))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_pictures_of_any_mode_are_taken(mode: str) -> None:
    image = picture(100, 100).convert(mode)
    assert_close(preprocess([image], 96), preprocess([image.convert("RGB")], 96), rtol=0, atol=0)


def test_pictures_of_any_shape_get_the_tags_that_they_get_alone(
    model: RamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger = tagger_of(model.double())  # float32 rounds otherwise in a batch, more on some CPUs than on others
    monkeypatch.setattr(tagger, "preprocess", lambda images: preprocess(images, 96).double())
    pictures = [picture(200, 100), picture(90, 300, seed=1), picture(100, 100, seed=2)]
    together = tagger.tag([ImageInWork("", image) for image in pictures])
    alone = [tagger.tag([ImageInWork("", image)])[0] for image in pictures]
    assert [[tag.name for tag in tags] for tags in together] == [[tag.name for tag in tags] for tags in alone]
    for tags, same in zip(together, alone, strict=True):
        assert [tag.score for tag in tags] == pytest.approx([tag.score for tag in same], rel=1e-5)
    assert tagger.tag([]) == []


def test_a_tag_is_given_strictly_above_its_threshold(ram: RamModel) -> None:
    scores = torch.zeros(1, 32)
    scores[0, :4] = torch.tensor([0.65, 0.6500001, 1.0, 0.64])
    assert tagger_of(ram, 0.65).select(scores) == [[Tag("tag 1", scores[0, 1].item()), Tag("tag 2", 1.0)]]
    assert tagger_of(ram, 1.0).select(scores) == [[]]


def test_a_tagger_reads_all_it_needs_from_files(
    ram_golden: dict[str, Tensor], published_file: Callable[..., Path], ram_goldens: Path, tmp_path: Path
) -> None:
    thresholds = tmp_path / "thresholds.txt"
    thresholds.write_text("0.5\n" * 32, encoding="utf-8")
    path = published_file(ram_golden)
    tagger = RamTagger.from_checkpoint(path, ram_goldens / "tags_32.txt", thresholds, resample="bicubic")
    assert_close(tagger.scores(ram_golden["input.image"]), ram_golden["output.logits"].sigmoid(), rtol=1e-5, atol=1e-5)
    assert tagger.tags[0] == "3D CG rendering"
    settings = json.loads(json.dumps(tagger.settings))
    assert (settings["kind"], settings["resample"], settings["dtype"]) == ("ram", "bicubic", "float32")
    assert (settings["checkpoint"], len(settings["checkpoint_sha256"])) == ("ram_mini.pth", 64)
    thresholds.write_text("0.5\n" * 31, encoding="utf-8")
    with pytest.raises(ValueError, match="found 31 thresholds, expected 32"):
        RamTagger.from_checkpoint(path, ram_goldens / "tags_32.txt", thresholds)


def test_lists_of_another_length_than_the_models_are_refused(ram: RamModel) -> None:
    with pytest.raises(ValueError, match=r"found 1 tags, expected 32.*--ram_tag_list"):
        RamTagger(ram, ["cat"], [0.5] * 32)
    with pytest.raises(ValueError, match=r"found 3 thresholds, expected 32.*--ram_thresholds"):
        RamTagger(ram, [f"tag {number}" for number in range(32)], [0.5] * 3)


def test_half_precision_halves_the_descriptions_and_keeps_their_mixture(ram_plus: RamModel) -> None:
    ram_plus.label_embed.data /= 60  # of length 1, as embeddings of text are
    token = torch.linspace(-1, 1, 512)[None]
    exact = ram_plus.tag_queries(token).hidden
    tagger = tagger_of(ram_plus, dtype=torch.bfloat16)
    assert tagger.model.label_embed.dtype == torch.float16
    assert_close(tagger.model.tag_queries(token).hidden, exact, rtol=1e-3, atol=1e-4)


def test_bfloat16_scores_stay_near(ram: RamModel, ram_golden: dict[str, Tensor]) -> None:
    scores = tagger_of(ram, dtype=torch.bfloat16).scores(ram_golden["input.image"])
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, ram_golden["output.logits"].sigmoid())
    assert_close(scores, ram_golden["output.logits"].sigmoid(), rtol=0, atol=0.02)


def test_scores_that_overflow_are_computed_again_in_float32(ram: RamModel, ram_golden: dict[str, Tensor]) -> None:
    ram.image_proj.weight.data *= 1e5  # beyond float16, within float32
    images = ram_golden["input.image"]
    half = tagger_of(ram, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not half.model(images).isfinite().any()
    assert_close(half.scores(images), tagger_of(ram).scores(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_without_finite_scores_are_named(ram: RamModel, dtype: torch.dtype) -> None:
    images = torch.zeros(3, 3, 96, 96)
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(NonFiniteScoresError, match=r"images \[1\] of the batch") as caught:
        tagger_of(ram, dtype=dtype).scores(images)
    assert caught.value.positions == [1]


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(model: RamModel, golden: dict[str, Tensor]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = golden["input.image"]
    expected = tagger_of(model).scores(images)
    assert_close(tagger_of(model, device="cuda", dtype=torch.float32).scores(images), expected, rtol=0, atol=1e-3)
