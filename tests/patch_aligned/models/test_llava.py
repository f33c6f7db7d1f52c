"""LLaVA's checkpoints give the tokens and word embeddings that the whole model would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from patch_aligned.models.base import WordEmbeddings
from patch_aligned.models.llava import (
    DEFAULT_CONFIG,
    LlavaEncoder,
    LlavaLanguage,
    ProjectorSource,
    load_encoder,
    load_words,
)
from patch_aligned.models.load import load_models


@pytest.mark.golden
def test_pixels_features_and_tokens_equal_the_recorded_model(golden_world: Path, goldens: Path):
    golden = np.load(goldens / "g_tower.npz")
    source = ProjectorSource.parse("full", "tiny-llava")
    encoder = load_encoder([source], None, None, "cpu")
    model = source.build(encoder, load_words("tiny-vicuna"), source.config)
    images = [Image.open(golden_world / "images" / f"im{index}.png") for index in range(4)]
    encoded = model.encode(images)
    tokens = model.visual_tokens(encoded)
    np.testing.assert_allclose(encoded.features, golden["tower/patch_-2"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(torch.stack(list(tokens)), golden["encode_images"], rtol=1e-5, atol=1e-5)
    assert model.layout((64, 48), tokens[0]).whole.shape == (4, 4)
    with pytest.raises(ValueError, match="gives 5 visual tokens, which do not fill a square grid"):
        model.layout((64, 48), tokens[0][:5])


@pytest.mark.golden
@pytest.mark.parametrize("path", ["ckpt_stage1", "ckpt_stage1/mm_projector.bin", "ckpt_stage1ckpt/checkpoint-2"])
def test_a_stage_1_folder_gives_its_recorded_weights(golden_world: Path, goldens: Path, path: str):
    source = ProjectorSource.parse("ours", f"{goldens / path}")
    encoder = load_encoder([source], None, None, "cpu")
    words = load_words("tiny-vicuna")
    model = source.build(encoder, words, source.config)
    stored = torch.load(source.path, weights_only=True)
    for name, parameter in model.projector.named_parameters():
        assert torch.equal(parameter, stored[f"model.mm_projector.{name}"].float())
    assert model.words is words
    assert (encoder.image_aspect_ratio, encoder.tower.select_layer) == ("square", -2)


def test_a_lone_file_shows_its_architecture_by_its_keys(golden_world: Path):
    source = ProjectorSource.parse("lone", "train_init/mm_projector.bin")
    encoder = load_encoder([source], "tiny-clip", None, "cpu")
    model = source.build(encoder, load_words("tiny-vicuna"), {})
    assert [type(layer).__name__ for layer in model.projector] == ["Linear", "GELU", "Linear"]


def test_a_full_checkpoint_is_measured_against_its_own_words(golden_world: Path):
    source = ProjectorSource.parse("full", "tiny-llava")
    encoder = load_encoder([source], None, None, "cpu")
    base = load_words("tiny-vicuna")
    model = source.build(encoder, base, {})
    assert model.words is not base
    stored = load_file(golden_world / "tiny-llava" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.words.table, stored)


def test_random_weights_follow_their_seed_and_leave_the_global_stream_alone(golden_world: Path):
    encoder, words = LlavaEncoder("tiny-clip"), load_words("tiny-vicuna")
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        ProjectorSource.parse("r", f"random{seed}")
        .build(encoder, words, {"mm_projector_type": "linear"})
        .projector.weight
        for seed in ("", ":0", ":1")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(1), expected_next)


def test_random_weights_are_arranged_like_the_trained_ones(golden_world: Path):
    shapes = {"weight": (64, 32), "bias": (64,)}
    torch.save({f"mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, "mm_projector.bin")
    config = json.loads(Path("tiny-llava/config.json").read_text())
    Path("config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    random, _ = load_models(["random=random", "trained=mm_projector.bin"], "tiny-vicuna")
    assert isinstance(random.projector, torch.nn.Linear)
    [alone] = load_models(["random=random"], "tiny-vicuna", "tiny-clip")
    assert [type(layer).__name__ for layer in alone.projector] == ["Linear", "GELU", "Linear"]


def test_label_embedding_is_the_mean_of_its_tokens_rows(golden_world: Path):
    words = load_words("tiny-vicuna")
    table = load_file("tiny-vicuna/model.safetensors")["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")
    ids = tokenizer("red car", add_special_tokens=False).input_ids
    embedded = words.of_labels(["red car", "dog"])
    assert embedded.shape == (2, 64)
    torch.testing.assert_close(embedded[0], table[ids].mean(dim=0))
    assert words.of_labels([]).shape == (0, 64)


def test_a_table_too_short_for_the_tokenizer_is_refused(golden_world: Path):
    words = load_words("tiny-vicuna")
    with pytest.raises(ValueError, match=r"cut.safetensors.*ids up to 999.*has 5 rows"):
        WordEmbeddings(words.tokenizer, words.table[:5], "cut.safetensors")


def test_a_checkpoint_without_projector_is_named(golden_world: Path):
    with pytest.raises(ValueError, match=r"tiny-vicuna holds no projector.*as --base"):
        ProjectorSource.parse("llm", "tiny-vicuna")


@pytest.mark.parametrize("seed", [0, 3])
def test_an_untrained_twin_is_the_random_projector_of_the_same_shape(golden_world: Path, goldens: Path, seed: int):
    trained = ProjectorSource.parse("trained", str(goldens / "ckpt_stage1"))
    random = ProjectorSource.parse("random", f"random:{seed}")
    encoder, words = LlavaEncoder("tiny-clip"), load_words("tiny-vicuna")
    twin = trained.build(encoder, words, {}).untrained(seed).projector.state_dict()
    expected = random.build(encoder, words, trained.config).projector.state_dict()
    assert twin.keys() == expected.keys()
    assert all(torch.equal(twin[name], expected[name]) for name in twin)


def test_a_whole_models_projector_is_not_that_of_an_earlier_stage_beside_it(golden_world: Path, goldens: Path):
    shutil.copy(goldens / "ckpt_stage1" / "mm_projector.bin", "tiny-llava")
    assert ProjectorSource.parse("full", "tiny-llava").is_full_checkpoint


@pytest.mark.parametrize(
    ("changed", "message", "arguments"),
    [
        ({"mm_vision_select_layer": -1}, r"mm_vision_select_layer is \{'a': -2, 'b': -1\}.*separately", None),
        ({"mm_vision_tower": "tiny-siglip"}, r"mm_vision_tower is .*pass --vision-tower", ("tiny-clip", None)),
        ({"image_aspect_ratio": "pad"}, r"image_aspect_ratio is .*Pass --image-aspect-ratio", (None, "pad")),
    ],
)
def test_projectors_of_different_features_are_measured_together_only_where_one_is_chosen(
    golden_world: Path, goldens: Path, changed: dict, message: str, arguments: tuple | None
):
    shutil.copytree(goldens / "ckpt_stage1", "other")
    config = json.loads(Path("other/config.json").read_text())
    assert config["image_aspect_ratio"] == "square"
    Path("other/config.json").write_text(json.dumps(config | changed))
    sources = [ProjectorSource.parse("a", str(goldens / "ckpt_stage1")), ProjectorSource.parse("b", "other")]
    with pytest.raises(ValueError, match=message):
        load_encoder(sources, None, None, "cpu")
    if arguments:
        encoder = load_encoder(sources, *arguments, "cpu")
        assert encoder.image_aspect_ratio == (arguments[1] or "square")


def test_a_trained_tower_cannot_be_shared(golden_world: Path):
    config = json.loads(Path("tiny-llava/config.json").read_text())
    Path("tiny-llava/config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": True}))
    with pytest.raises(ValueError, match="trained vision tower"):
        ProjectorSource.parse("full", "tiny-llava")


def test_specifications_that_cannot_be_meant_are_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for specification, message in {
        "runs/stage1": r"expected NAME=PATH",
        "a=random:x": r"there is no random:x",
        "a=missing": r"there is no missing.*--output_dir",
        f"a={tmp_path / 'empty'}": r"holds neither mm_projector.bin",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_models([specification], "tiny-vicuna")
    with pytest.raises(ValueError, match="'a' is given twice"):
        load_models(["a=random", "a=random:1"])
    with pytest.raises(ValueError, match="at least once"):
        load_models([])


def test_the_llm_behind_a_projector_is_its_base_its_adapter_or_its_own(golden_world: Path, goldens: Path):
    encoder, words = LlavaEncoder("tiny-clip"), load_words("tiny-vicuna")
    stage_1, adapter = goldens / "ckpt_stage1", goldens / "ckpt_lora"
    places = {"stage_1": stage_1, "random": "random:0", "lora": adapter, "full": "tiny-llava"}
    sources = [ProjectorSource.parse(name, str(place)) for name, place in places.items()]
    languages = [source.build(encoder, words, DEFAULT_CONFIG).language for source in sources]
    expected = [("tiny-vicuna", None), ("tiny-vicuna", None), (str(adapter), "tiny-vicuna"), ("tiny-llava", None)]
    assert languages == [LlavaLanguage(path, base, "cpu") for path, base in expected]
