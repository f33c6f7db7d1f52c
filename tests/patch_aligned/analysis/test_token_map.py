"""Token maps: the words on the patches, their texts, and the page and pictures that show them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llava.convert.to_hf import to_hf
from llava.mm_utils import load_rgb_image
from patch_aligned.analysis.cli import token_map as token_map_command
from patch_aligned.analysis.localisation import HEAT_MAP
from patch_aligned.analysis.token_map import save_token_map_figure, token_map_document, write_token_map_page
from patch_aligned.analysis.words import (
    WORD_LISTS,
    MappedImage,
    PursuitSettings,
    TokenMapper,
    TokenMaps,
    TokenText,
    VocabularyText,
    WordList,
    colours_of_words,
    english_words,
    token_maps,
)
from patch_aligned.cells import TokenGrid, grid_over_box
from patch_aligned.cli import app
from patch_aligned.models.base import WordEmbeddings
from patch_aligned.models.llava import load_words
from patch_aligned.models.load import load_models
from tests.folders import set_config

IMAGE = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
ENGLISH = WordList("a test's list", frozenset({"the", "red", "he", "t"}))


def id_of(tokenizer, raw: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(raw)
    assert tokenizer.convert_ids_to_tokens(token_id) == raw
    return token_id


def grid_of(rows: int, cols: int) -> TokenGrid:
    return grid_over_box((28, 28), (0, 0, 28, 28), (rows, cols))


def data_of(page: Path) -> dict[str, Any]:
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert text is not None
    return json.loads(text.group(1))


@pytest.fixture
def mapped(golden_world: Path) -> MappedImage:
    """Tokens that are words of the tiny LLM: `▁the` in three of four patches, and `ing`."""
    words = load_words("tiny-vicuna")
    mapper = TokenMapper(words, PursuitSettings(rounds=2), ENGLISH)
    the, ing = (id_of(AutoTokenizer.from_pretrained("tiny-vicuna"), raw) for raw in ("▁the", "ing"))
    tokens = 3 * words.table[[the, ing, the, the]].float()
    return MappedImage("street.jpg", IMAGE, {"ours": mapper.map(tokens, grid_of(2, 2))})


def maps_of(mapped: MappedImage) -> TokenMaps:
    return TokenMaps([mapped], {"ours": "a file"}, PursuitSettings(), ENGLISH)


# --- texts of single tokens -----------------------------------------------------------------------------------------


def test_sentencepiece_tokens_are_shown_on_their_own(golden_world: Path):
    tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")
    texts = VocabularyText(tokenizer)
    assert texts[id_of(tokenizer, "▁the")] == TokenText("the", starts_word=True, special=False)
    assert texts[id_of(tokenizer, "ing")] == TokenText("ing", starts_word=False, special=False)
    assert texts[id_of(tokenizer, "</s>")] == TokenText("</s>", starts_word=False, special=True)
    assert texts[id_of(tokenizer, "<0x0A>")].text == "⏎"
    assert texts[id_of(tokenizer, "<0xC5>")].text == "<0xC5>"
    assert texts[id_of(tokenizer, "▁")].text == "␣"


def test_byte_level_tokens_are_shown_on_their_own(golden_world: Path):
    tokenizer = AutoTokenizer.from_pretrained("tiny-tok-mpt")
    texts = VocabularyText(tokenizer)
    assert texts[id_of(tokenizer, "Ġa")] == TokenText("a", starts_word=True, special=False)
    assert texts[id_of(tokenizer, "<|endoftext|>")] == TokenText("<|endoftext|>", starts_word=False, special=True)
    assert texts[id_of(tokenizer, "<|im_start|>")].special  # added, though the tokenizer does not call it special
    assert texts[id_of(tokenizer, "Ċ")].text == "⏎"
    assert texts[id_of(tokenizer, "Ġ")].text == "␣"
    assert texts[id_of(tokenizer, "â")].text == "<0xE2>"  # the first byte of a character of three


@pytest.mark.parametrize("name", ["tiny-vicuna", "tiny-tok-mpt"])
def test_every_token_has_a_visible_text(golden_world: Path, name: str):
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = VocabularyText(tokenizer)
    for token_id in range(len(tokenizer)):
        text = texts[token_id].text
        assert text
        assert text.isprintable() and not any(character.isspace() for character in text), (token_id, text)


# --- word lists -----------------------------------------------------------------------------------------------------


def test_a_word_is_english_whatever_its_case_but_lone_letters_are_not():
    words = WordList("", frozenset({"dog", "a", "i", "b"}))
    assert [text in words for text in ("Dog", "dog", "I", "a", "b", "dogg", "")] == [True] * 4 + [False] * 3


def test_without_a_list_auto_takes_none_and_a_named_one_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    for package in ("spellchecker", "nltk"):
        monkeypatch.setitem(sys.modules, package, None)
    assert english_words("auto") is None
    assert english_words("none") is None
    with pytest.raises(ImportError, match=r"pip install 'patch-aligned-llava\[analysis\]'"):
        english_words("pyspellchecker")
    with pytest.raises(ValueError, match="the lists are auto, pyspellchecker, nltk, none"):
        english_words("klingon")


def test_the_installed_list_knows_inflected_words():
    pytest.importorskip("spellchecker", reason="pyspellchecker is part of the extra `analysis`")
    found = english_words("pyspellchecker")
    assert found is not None
    assert [text in found for text in ("bananas", "White", "tion", "的")] == [True, True, False, False]


# --- maps -----------------------------------------------------------------------------------------------------------


def test_a_map_holds_the_nearest_words_and_how_near_they_are(mapped: MappedImage):
    token_map = mapped.maps["ours"]
    first = [token_map.words[word].text for word in token_map.pursuit.ids[:, 0].tolist()]
    assert first == ["the", "ing", "the", "the"]
    assert token_map.caption(0) == "word 1 · mean cosine 1.00 · 75% English"
    assert mapped.top_cosine == pytest.approx(1, rel=1e-5)


def test_without_a_list_no_word_is_called_english(golden_world: Path):
    words = load_words("tiny-vicuna")
    token_map = TokenMapper(words).map(words.table[[300]].float(), grid_of(1, 1))
    assert token_map.pursuit.ids.shape == (1, 5)
    assert token_map.caption(0) == "word 1 · mean cosine 1.00"
    assert colours_of_words(MappedImage("x", IMAGE, {"a": token_map})) == {}


def test_rows_beyond_the_tokenizer_are_never_chosen(golden_world: Path):
    words = load_words("tiny-vicuna")
    extra = torch.full((1, words.width), 5.0)
    padded = WordEmbeddings(
        AutoTokenizer.from_pretrained("tiny-vicuna"), torch.cat([words.table.float(), extra]), "tiny-vicuna"
    )
    assert int(TokenMapper(padded).map(extra, grid_of(1, 1)).pursuit.ids.max()) < 1000


def test_the_place_of_an_image_is_no_word(golden_world: Path, tmp_path: Path):
    """Hugging Face's form of a checkpoint has an `<image>` in its table, which no LLM reads: its words are the same."""
    to_hf("tiny-llava", tmp_path / "hf", dtype="float32")
    hf, own = load_models([f"hf={tmp_path / 'hf'}", "own=tiny-llava"])
    words = hf.words
    assert words.tokenizer.convert_ids_to_tokens(words.placeholder) == "<image>"
    tokens = torch.cat([words.table[[words.placeholder]].float(), own.words.table[[7, 300]].float()])
    found, expected = (TokenMapper(model.words).map(tokens, grid_of(1, 3)).pursuit for model in (hf, own))
    assert torch.equal(found.ids, expected.ids)


def test_a_word_has_one_dark_colour_everywhere_and_fragments_have_none(mapped: MappedImage):
    colours = colours_of_words(mapped)
    assert "the" in colours
    assert "ing" not in colours
    for colour in colours.values():
        red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
        assert (0.64 + 0.05) / (luminance + 0.05) > 4  # contrast on the darkest background of a map


def test_maps_lie_over_the_whole_image_each_under_the_cells_of_its_own_model(pad: Path, tmp_path: Path):
    set_config("tiny-llava", image_aspect_ratio="pad")
    to_hf("tiny-llava", tmp_path / "hf", dtype="float32")
    models = load_models(
        ["cut=random:1", "padded=" + str(tmp_path / "hf"), "too=tiny-llava"], "tiny-vicuna", "tiny-clip", "square"
    )
    path = pad.parent / "pictures" / "0.png"
    maps = token_maps(models, [("0.png", path)], PursuitSettings(rounds=1), "none")
    (image,) = maps.images
    np.testing.assert_array_equal(image.image, np.asarray(load_rgb_image(path)))
    boxes = {name: token_map.grid.box_xyxy_px for name, token_map in image.maps.items()}
    assert boxes == {"cut": (12, 0, 68, 56), "padded": (0, -12, 80, 68), "too": (12, 0, 68, 56)}
    (shown,) = data_of(write_token_map_page(maps, tmp_path / "out")[0])["images"]
    assert (shown["size"], shown["picture"][:23]) == ([80, 56], "data:image/jpeg;base64,")
    assert [of_map["grid"]["x_edges"][0] for of_map in shown["maps"]] == [12, 0, 12]
    assert [of_map["grid"]["y_edges"][-1] for of_map in shown["maps"]] == [56, 68, 56]

    drawn = []
    for name in ("cut", "padded"):
        moved = replace(image.maps["cut"], grid=image.maps[name].grid)
        save_token_map_figure(replace(image, maps={"cut": moved}), tmp_path / f"{name}.png", "words", False)
        with Image.open(tmp_path / f"{name}.png") as picture:
            drawn.append(picture.crop((0, 250, picture.width, picture.height)).tobytes())  # below the thumbnail
    assert drawn[0] != drawn[1]


def test_tokens_of_a_grid_in_another_order_land_in_their_cells(golden_world: Path):
    words = load_words("tiny-vicuna")
    grid = replace(grid_of(1, 3), tokens=np.array([[2, 0, 1]]))
    found = TokenMapper(words).map(words.table[[300, 301, 302]].float(), grid)
    assert found.pursuit.ids[:, 0].tolist() == [302, 300, 301]


# --- page and picture -----------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_no_text_can_leave_its_data(mapped: MappedImage, tmp_path: Path):
    hostile = "</script><img src=x onerror=alert(1)>"
    token_map = mapped.maps["ours"]
    first = int(token_map.pursuit.ids[0, 0])
    token_map.words[first] = TokenText(hostile, True, False, False)
    named = replace(mapped, image_id=hostile)
    page, numbers = write_token_map_page(maps_of(named), tmp_path / "out")
    text = page.read_text()
    assert hostile not in text
    assert text.count("</script>") == 2
    assert not re.search(r"""(?:src|href)\s*=\s*["']?http|@import|url\(""", text)
    (image,) = data_of(page)["images"]
    assert image["image_id"] == hostile
    assert image["picture"].startswith("data:image/jpeg;base64,")
    assert image["maps"][0]["words"][str(first)]["text"] == hostile
    (recorded,) = json.loads(numbers.read_text())["images"][0]["maps"]
    assert recorded | {"grid": image["maps"][0]["grid"]} == image["maps"][0]


def test_the_numbers_are_those_of_the_pursuit(mapped: MappedImage):
    token_map = mapped.maps["ours"]
    (entry,) = token_map_document(maps_of(mapped))["images"][0]["maps"]
    assert entry["ids"] == token_map.pursuit.ids.tolist()
    assert entry["grid"] == [2, 2]
    for name in ("coefficients", "cosines", "residual_norms"):
        torch.testing.assert_close(torch.tensor(entry[name]), getattr(token_map.pursuit, name), atol=6e-5, rtol=0)
    assert entry["captions"][0] == "word 1 · mean cosine 1.00 · 75% English"
    assert entry["words"][str(int(token_map.pursuit.ids[0, 0]))]["colour"] == colours_of_words(mapped)["the"]


def test_the_picture_is_drawn_even_where_a_font_lacks_a_sign(
    mapped: MappedImage, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    token_map = mapped.maps["ours"]
    first = int(token_map.pursuit.ids[0, 0])
    token_map.words[first] = TokenText("$x_1$\U000e0100的", True, False, False)
    path = tmp_path / "map.png"
    save_token_map_figure(mapped, path, "words found by a test", has_word_list=True)
    with Image.open(path) as picture:
        assert picture.width >= 700
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 50
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]


def test_cosine_maps_stand_beside_the_words(mapped: MappedImage, tmp_path: Path):
    """One column more a model, whose cells have the colours of their cosines on one scale from 0 to the largest."""
    for cosines in (False, True):
        save_token_map_figure(mapped, tmp_path / f"{cosines}.png", "words", True, cosines)
    with Image.open(tmp_path / "False.png") as plain, Image.open(tmp_path / "True.png") as both:
        assert both.width > plain.width
        assert both.height == plain.height
        half = np.asarray(both.convert("RGB"))[:, both.width // 2 :].astype(int)
    brightest = np.array(colormaps[HEAT_MAP](1.0)[:3]) * 255
    assert (abs(half - brightest).max(axis=2) <= 2).sum() > 500  # cosine 1: the tokens are words


# --- the command ----------------------------------------------------------------------------------------------------


def invoke(output: Path, *words: str, **changed: str | None):
    options: dict[str, str | None] = {
        "--projector": "start=train_init/mm_projector.bin",
        "--base": "tiny-vicuna",
        "--vision-tower": "tiny-clip",
        "--image": "images/im0.png",
        "--output": str(output),
        "--english": "none",
    }
    options |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    flat = [word for name, value in options.items() if value is not None for word in (name, value)]
    return CliRunner().invoke(app, ["token-map", "--projector", "random=random:3", *flat, *words])


def test_the_command_writes_a_page_the_numbers_and_a_picture_an_image(golden_world: Path, tmp_path: Path):
    output = tmp_path / "out"
    result = invoke(output, "--image", "images/im1.png", rounds="2")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == [
        "001_im0.png", "002_im1.png", "run.json", "token_map.html", "token_map.json",
    ]  # fmt: skip
    document = json.loads((output / "token_map.json").read_text())
    assert document["word_list"] is None
    hashed = json.loads((output / "run.json").read_text())["sha256"]
    assert hashed.keys() == {"im0.png", "im1.png", "tiny-clip", "tiny-vicuna"}
    assert list(document["projectors"]) == ["random", "start"]
    assert [image["image_id"] for image in document["images"]] == ["im0.png", "im1.png"]


def test_the_nearest_words_equal_a_reference_from_files_to_ids(golden_world: Path, tmp_path: Path, goldens: Path):
    import numpy as np

    golden = np.load(goldens / "g_tower.npz")
    assert invoke(tmp_path / "out", "--no-png", projector="full=tiny-llava", vision_tower=None).exit_code == 0
    document = json.loads((tmp_path / "out" / "token_map.json").read_text())
    (table,) = [value for name, value in load_file("tiny-llava/model.safetensors").items() if "embed_tokens" in name]
    units = table.double() / table.double().norm(dim=1, keepdim=True)
    expected = (torch.from_numpy(golden["encode_images"][0]).double() @ units[:1000].T).argmax(dim=1)
    found = next(entry for entry in document["images"][0]["maps"] if entry["projector"] == "full")
    assert [ids[0] for ids in found["ids"]] == expected.tolist()


def test_images_come_from_a_pad_file_too(pad: Path, tmp_path: Path):
    output = tmp_path / "out"
    folder = str(pad.parent / "pictures")
    result = invoke(output, "--no-png", image=None, data=str(pad), image_folder=folder, limit="2")
    assert result.exit_code == 0, result.output
    document = json.loads((output / "token_map.json").read_text())
    assert [image["image_id"] for image in document["images"]] == ["0.png", "1.png"]


def test_images_come_from_cocos_instances_too(pad: Path, tmp_path: Path):
    image = {"id": 7, "file_name": "2.png", "width": 80, "height": 56}
    coco = tmp_path / "instances.json"
    coco.write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    folder = str(pad.parent / "pictures")
    result = invoke(tmp_path / "out", "--no-png", image=None, data=str(coco), image_folder=folder, rounds="1")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "token_map.json").read_text())
    assert [image["image_id"] for image in document["images"]] == ["2.png"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": None}, "Found neither of --image and --data"),
        ({"data": "pad.jsonl"}, "Found both of --image and --data"),
        ({"image": "nowhere.png"}, "--image nowhere.png: there is no such file"),
        ({"image": None, "data": "nowhere.json"}, "--data nowhere.json: there is no such file"),
        ({"image": None, "data": "PAD"}, "--image-folder: found nothing"),
        ({"image": None, "data": "PAD", "image_folder": "images"}, "Is --image-folder images the right one?"),
        ({"projector": "start=nowhere"}, "there is no nowhere"),
        ({"device": "cuda:9"}, "--device cuda:9"),
    ],
)
def test_wrong_input_ends_with_a_sentence_and_code_2(
    pad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    changed = {name: str(pad) if value == "PAD" else value for name, value in changed.items()}
    result = invoke(tmp_path / "out", **changed)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_image_id_that_leads_out_of_the_folder_is_refused(write_pad: Callable[..., Path], tmp_path: Path):
    pad = write_pad([])
    record = json.loads(pad.read_text())
    pad.write_text(json.dumps(record | {"image_id": "../pad.jsonl"}))
    result = invoke(tmp_path / "out", image=None, data=str(pad), image_folder=str(pad.parent / "pictures"))
    assert result.exit_code == 2
    assert "out of the image folder" in " ".join(result.output.split()) or "leads out of" in result.output


def test_the_word_lists_of_the_command_are_those_there_are():
    assert get_args(get_type_hints(token_map_command)["english"]) == WORD_LISTS
