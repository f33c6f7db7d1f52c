"""Name scores: formulas against literal loops, the LLM's part against a forward pass of each name by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from patch_aligned.analysis.names import (
    NameSettings,
    caption_metrics,
    name_auc,
    name_finder,
    name_information,
    read_names,
)
from patch_aligned.analysis.regions import SCORES_BY_NAME
from patch_aligned.analysis.run import Analysis, AnalysisSettings, MeasureSettings, analyse
from patch_aligned.intervals import Resampling
from patch_aligned.models import language as language_module
from patch_aligned.models.language import name_bounds
from patch_aligned.models.llava import CAPTION_REQUEST, LlavaEncoder
from patch_aligned.models.load import load_models
from patch_aligned.models.whole import TransformersSource, WholeModel
from tests.patch_aligned.analysis.conftest import rectangle
from tests.patch_aligned.models.families import save_tiny

START, STEM = "start=train_init/mm_projector.bin", "A picture of a"
PICTURES, NAMES = 5, 4


@pytest.fixture
def log_p() -> np.ndarray:
    return np.log(np.random.default_rng(0).dirichlet(np.ones(NAMES + 1), PICTURES)[:, :NAMES])  # part of the mass


def test_scores_equal_the_literal_formulas(log_p: np.ndarray):
    p, present = np.exp(log_p), np.random.default_rng(1).random(log_p.shape) < 0.4
    bounds, information, auc = name_bounds(log_p), name_information(log_p), name_auc(log_p, present)
    absent = [(i, n) for i in range(PICTURES) for n in range(NAMES) if not present[i, n]]
    for i in range(PICTURES):
        for n in range(NAMES):
            assert bounds[i, n] == pytest.approx(math.log(p[i, n] / np.mean(p[:, n])), rel=1e-12)
            assert information[i, n] == pytest.approx(math.log(NAMES * p[i, n] / p[i].sum()), rel=1e-12)
            own = log_p[i, n] - log_p[:, n].mean()
            wins = [np.sign(own - log_p[j, m] + log_p[:, m].mean()) for j, m in absent if (j, m) != (i, n)]
            if present[i, n]:
                assert auc[i, n] == pytest.approx((1 + np.mean(wins)) / 2, rel=1e-12)


def test_a_blind_model_scores_nothing_and_a_perfect_one_the_most():
    present = np.eye(6, dtype=bool)
    blind = np.tile(np.arange(-6.0, 0), (6, 1))  # the same whatever the picture
    assert name_bounds(blind) == pytest.approx(0, abs=1e-12)
    assert name_auc(blind, present)[present] == pytest.approx(0.5)
    assert name_information(np.full((6, 6), -3.0)) == pytest.approx(0, abs=1e-12)
    perfect = np.where(present, 0.0, -60.0)
    assert name_bounds(perfect)[present] == pytest.approx(math.log(6))
    assert name_information(perfect)[present] == pytest.approx(math.log(6))
    assert name_auc(perfect, present)[present] == pytest.approx(1)
    assert np.isnan(name_auc(blind, np.ones((6, 6), dtype=bool))).all()  # nothing is absent


def test_a_prior_of_names_moves_neither_bound_nor_auc(log_p: np.ndarray):
    present, prior = np.random.default_rng(2).random(log_p.shape) < 0.5, np.array([-3.0, 0.0, -1.0, -7.0])
    np.testing.assert_allclose(name_bounds(log_p + prior), name_bounds(log_p), atol=1e-12)
    np.testing.assert_allclose(name_auc(log_p + prior, present), name_auc(log_p, present))


def test_names_in_captions_are_whole_words_the_longest_first():
    regular: dict[str, tuple[str, ...]] = dict.fromkeys(["panda", "red panda", "ant", "butterfly", "knife", "bus"], ())
    find = name_finder(regular | {"mouse": ("mice",)})
    assert find("A red panda by an elephant.") == {"red panda"}
    assert find("A red panda, a Panda") == {"red panda", "panda"}
    assert find("two mice, three butterflies and knives near buses") == {"mouse", "butterfly", "knife", "bus"}
    assert find("a giant pandas' ants, red\n pandas") == {"panda", "ant", "red panda"}
    assert find("") == set()


def test_caption_metrics_are_shares_over_all_pictures():
    mentioned = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1]], dtype=bool)
    present = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    found = caption_metrics(mentioned, present, Resampling(200))
    assert found["value"].to_dict() == pytest.approx({"precision": 2 / 4, "recall": 2 / 4, "f1": 4 / 8})
    assert (found["low"] <= found["value"]).all()
    assert found["images"].to_dict() == {"precision": 2, "recall": 3, "f1": 3}


# --- the LLM --------------------------------------------------------------------------------------------------------


def pictures(world: Path) -> list[Image.Image]:
    return [Image.open(world / "images" / f"im{index}.png").convert("RGB") for index in range(3)]


@pytest.mark.parametrize("specification", [START, "full=tiny-llava"])
def test_log_probabilities_equal_a_forward_pass_for_each_name(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch, specification: str
):
    """In float64, in several groups of names, after a bare image and inside a dialogue."""
    monkeypatch.setattr(language_module, "_NAMES_AT_ONCE", 2)
    [model] = load_models([specification], "tiny-vicuna", "tiny-clip", image_aspect_ratio="square")
    assert model.language is not None
    language = model.language.load()
    llm = language.model.double()
    names = ["dog", "red car", "the", "a very odd dog-house", "traffic light", "é"]
    ids = [model.words.token_ids(name) for name in names]
    assert {len(of_name) for of_name in ids} >= {1, 12}
    shown = pictures(golden_world)
    batches = [shown[:2], shown[2:]]
    [log_p, _], captions = read_names(model, language, batches, names, NameSettings())

    before, after = language.prompt_ids(STEM)
    words = llm.get_input_embeddings()
    expected = np.empty((3, len(names)))
    # The tower runs in float32, where a picture's tokens round by its batch on some CPUs.
    visual = [tokens.double() for batch in batches for tokens in model.visual_tokens(model.encode(batch))]
    for row, tokens in enumerate(visual):
        for column, of_name in enumerate(ids):
            start, end = (words(torch.tensor(part, dtype=torch.long)) for part in (before, [*after, *of_name]))
            with torch.no_grad():
                log_shares = llm(inputs_embeds=torch.cat([start, tokens, end])[None]).logits[0].log_softmax(dim=-1)
            places = range(-len(of_name) - 1, -1)
            expected[row, column] = sum(float(log_shares[p, i]) for p, i in zip(places, of_name, strict=True))
    assert len(captions) == 3
    np.testing.assert_allclose(log_p, expected, rtol=1e-9)


def test_the_prompt_is_that_of_training(golden_world: Path):
    bare, full = load_models([START, "full=tiny-llava"], "tiny-vicuna", "tiny-clip", "square")
    assert bare.language != full.language
    for model, prompt in ((bare, "<image>"), (full, None)):
        assert model.language is not None
        language = model.language.load()
        before, after = language.prompt_ids("")
        text = language.tokenizer.decode(before) + "<image>" + language.tokenizer.decode(after)
        if prompt:
            assert tokenizer_image_token(prompt, language.tokenizer) == [*before, IMAGE_TOKEN_INDEX, *after]
        else:
            assert text.count("<image>") == 1
            assert "Describe the image" in text
        *_, last = language.prompt_ids(STEM)
        assert language.tokenizer.decode(last).endswith(STEM)


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_log_probabilities_of_a_family_equal_a_forward_pass_for_each_name(name: str, tmp_path: Path):
    """In float64; the second family counts positions in three directions."""
    save_tiny(name, tmp_path)
    [model] = load_models([f"tiny={tmp_path}"])
    assert model.language is not None
    language = model.language.load()
    assert isinstance(language, WholeModel)
    whole, processor = language.model.double(), language.processor
    names, stem = ["cat", "is a cat", "what is", "is"], "what is a"
    ids = [model.words.token_ids(name) for name in names]
    noise = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    settings = NameSettings(stems=(stem,), max_new_tokens=3)
    [log_p], captions = read_names(model, language, [[image] for image in images], names, settings)
    for row, image in enumerate(images):
        for column, of_name in enumerate(ids):
            text = f"{processor.image_token} {stem} {names[column]}"
            inputs = processor(text=[text], images=[[image]], return_tensors="pt").to("cpu", torch.float64)
            with torch.no_grad():
                log_shares = whole(**inputs).logits[0].log_softmax(dim=-1)
            places = range(-len(of_name) - 1, -1)
            expected = sum(float(log_shares[p, i]) for p, i in zip(places, of_name, strict=True))
            assert log_p[row, column] == pytest.approx(expected, rel=1e-9)
    given = processor(text=[processor.image_token], images=[[images[1]]], return_tensors="pt").to("cpu", torch.float64)
    new = whole.generate(**given, do_sample=False, max_new_tokens=3)[0, given["input_ids"].shape[1] :]
    assert captions[1] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_prompt_of_a_family_is_that_of_stage_1_directly_after_it(tmp_path: Path):
    save_tiny("internvl", tmp_path)
    template = "{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %} is"
    (tmp_path / "chat_template.jinja").write_text(template)
    source = TransformersSource(str(tmp_path), "cpu")
    assert source.load().prompt == f"<image>{CAPTION_REQUEST} is"
    (tmp_path / "projector.safetensors").touch()
    assert source.load().prompt == "<image> is"


def test_captions_are_those_of_the_whole_model(golden_world: Path):
    """Greedy tokens of `LlavaLlamaForCausalLM.generate` on ids and pixels."""
    [model] = load_models(["full=tiny-llava"], None, None, image_aspect_ratio="square")
    assert model.language is not None
    language, encoder = model.language.load(), model.encoder
    assert isinstance(encoder, LlavaEncoder)
    images = pictures(golden_world)
    tokens = torch.stack(list(model.visual_tokens(model.encode(images))))
    before, after = language.prompt_ids("")
    ids = torch.tensor([[*before, IMAGE_TOKEN_INDEX, *after]]).expand(3, -1)
    pixels = process_images(images, encoder.tower.image_processor, SimpleNamespace(image_aspect_ratio="square"))
    new = language.model.generate(ids, images=pixels, do_sample=False, max_new_tokens=9)
    texts = language.tokenizer.batch_decode(new, skip_special_tokens=True)
    expected = [text.split(language.stop)[0].strip() for text in texts]
    assert language.captions(language.read(tokens[1:]), 9) == expected[1:]
    seen, asked = language.read(tokens), ("is a", [[5], [7, 9, 11], [8, 2]])  # one reading, whatever is asked before
    first = language.log_probabilities(seen, *asked)
    assert language.captions(seen, 9) == expected
    assert torch.equal(language.log_probabilities(seen, *asked), first)
    assert language.captions(seen, 9) == expected


# --- in an analysis -------------------------------------------------------------------------------------------------


def run(pad: Path, names: NameSettings | None = None) -> Analysis:
    models = load_models([START], "tiny-vicuna", "tiny-clip", "square")
    measure = MeasureSettings(pad, pad.parent / "pictures", batch_size=3)
    return analyse(models, AnalysisSettings(measure, Resampling(50), (0,), names))


def test_an_analysis_has_name_scores_of_the_regions_it_sees(pad: Path):
    told = []
    models = load_models([START, "full=tiny-llava"], "tiny-vicuna", "tiny-clip", "square")
    measure = MeasureSettings(pad, pad.parent / "pictures", batch_size=3)
    settings = AnalysisSettings(measure, Resampling(50), (0,), NameSettings(stems=(STEM,), max_new_tokens=4))
    found = analyse(models, settings, lambda done, total: told.append((done, total)))
    start = found.models["start"]
    regions = found.regions[found.regions["model"] == "start"]
    assert regions.loc[regions["label"] == "tree", list(SCORES_BY_NAME)].isna().all(axis=None)  # cut away by the crop
    assert regions["name_bound"].notna().sum() == start.metrics.loc["name_bound", "regions"] == 6
    assert regions["name_bound"].mean() == pytest.approx(start.metrics.loc["name_bound", "value"], rel=1e-12)
    assert start.metrics.loc["name_bound", "value"] < math.log(found.images)
    assert start.untrained is not None
    assert math.isnan(start.untrained.metrics.loc["name_auc", "mean"])
    assert told[-1] == (12, 12)  # 4 images: once for the regions, once for each LLM
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(document["models"]["full"]["names"]["caption_of"]) == ["0.png", "1.png", "2.png", "3.png"]
    assert document["models"]["full"]["names"]["names"] == 6
    assert document["settings"]["names"]["stems"] == [STEM]
    assert run(pad).models["start"].names is None


def test_a_name_counts_once_an_image_at_its_largest(write_pad: Callable):
    dogs = [rectangle(12, 0, 26, 14, "dog"), rectangle(12, 0, 68, 28, "dog"), rectangle(40, 28, 68, 56, "cow")]
    asked = NameSettings({"cat": (), "dog": ()}, (STEM,), 2)
    regions = run(write_pad(dogs, dogs[:1]), asked).regions.query("model == 'start'")
    assert regions["name_auc"].notna().tolist() == [False, True, False, True]  # a cow is none of the names


def test_names_of_the_caption_and_others_stand_apart(write_pad: Callable):
    regions = [rectangle(12, 0, 40, 28, "dog"), rectangle(40, 28, 68, 56, "car"), rectangle(12, 28, 40, 56, "cup")]
    told = [region | {"in_caption": region["tag"] == "dog"} for region in regions]
    by_caption = run(write_pad(told, told[:2]), names=NameSettings(stems=(STEM,))).models["start"].by_caption
    assert {part: metrics.loc["name_bound", "regions"] for part, metrics in by_caption.items()} == {
        "in the caption": 2, "not named": 3,
    }  # fmt: skip
    assert run(write_pad(regions)).models["start"].by_caption == {}
