"""What the page answers: the figures of the analysis, and nothing to other pages or beyond the image folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from patch_aligned.analysis import localise, token_maps
from patch_aligned.analysis.matching_pursuit import matching_pursuit
from patch_aligned.analysis.words import PursuitSettings, TokenMap, dictionary_of
from patch_aligned.explore import app, session
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.load import load_models
from tests.patch_aligned.analysis.conftest import rectangle
from tests.patch_aligned.models.families import FAMILIES, save_tiny

Models = list[VisionLanguageModel]
IMAGE = "0.png"
"""80 x 56 pixels; the tower sees columns 12 to 67, in 4 x 4 cells of 14 pixels."""


@pytest.fixture
def client(page_over: Callable, models: Models, pad: Path) -> Any:
    return page_over(models, pad)


def post(client: Any, path: str, **question: Any) -> Any:
    response = client.post(path, json={"image": IMAGE, **question})
    assert response.status_code == 200, response.text
    return response.json()


def assert_words(entry: dict[str, Any], found: TokenMap, cell: int) -> None:
    """Compare the words of a token on the page with those of a token map."""
    pursuit = found.pursuit
    assert entry["ids"] == [pursuit.ids[cell].tolist()]
    for name in ("coefficients", "cosines", "residual_norms"):
        np.testing.assert_allclose(entry[name][0], getattr(pursuit, name)[cell], atol=6e-5)
    for word in pursuit.ids[cell].tolist():
        assert entry["words"][str(word)]["text"] == found.words[word].text


def test_words_are_those_of_a_token_map(client: Any, models: Models, pad: Path):
    maps = token_maps(models, [(IMAGE, pad.parent / "pictures" / IMAGE)], PursuitSettings(5)).images[0].maps
    whole = post(client, "/words")
    clicked = post(client, "/region", point=[12 + 14 * 2 + 1, 14 + 1])["regions"]
    for shown, entry, (name, found) in zip(whole["maps"], clicked, maps.items(), strict=True):
        assert shown["projector"] == entry["projector"] == name
        assert shown["ids"] == found.pursuit.ids[:, :1].tolist()
        assert shown["grid"]["x_edges"] == [12, 26, 40, 54, 68]
        assert entry["cells"] == [6]
        assert_words(entry, found, 6)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_a_model_of_transformers_stands_beside_a_projector(name: str, page_over: Callable, pad: Path, tmp_path: Path):
    if not FAMILIES[name].is_installed:
        pytest.skip(f"needs transformers >= {FAMILIES[name].since}")
    save_tiny(name, tmp_path / "whole")
    both = load_models(["start=train_init/mm_projector.bin", f"whole={tmp_path / 'whole'}"], "tiny-vicuna", "tiny-clip")
    client = page_over(both, pad)
    path = pad.parent / "pictures" / IMAGE
    maps = token_maps(both, [(IMAGE, path)], PursuitSettings(5)).images[0].maps
    places = localise(both, path, "what").cells
    shown = {entry["projector"]: entry for entry in post(client, "/heat", word="what")["maps"]}
    for entry in post(client, "/region", point=[30, 30])["regions"]:
        found, [cell] = maps[entry["projector"]], entry["cells"]
        assert cell == found.grid.cells_under([30], [30]).item()
        assert_words(entry, found, cell)
        heat = shown[entry["projector"]]
        np.testing.assert_allclose(heat["cosine"], places[entry["projector"]].cosine.ravel(), atol=1e-6)
        assert len(heat["grid"]["x_edges"]) == found.grid.cols + 1
    assert shown["start"]["grid"] != shown["whole"]["grid"]


@pytest.mark.parametrize("word", ["dog", " DOG"])
def test_a_word_has_the_map_and_iou_of_localise(client: Any, models: Models, pad: Path, word: str):
    record = json.loads(pad.read_text().splitlines()[0])
    [dog] = [region for region in record["labels"] if region["tag"] == "dog"]
    mask = coco_mask.decode({"size": [56, 80], "counts": dog["rle_mask"].encode()})
    expected = localise(models, pad.parent / "pictures" / IMAGE, word.strip(), mask).cells
    answer = post(client, "/heat", word=word)
    assert answer["truth"] == dog["rle_mask"]
    for entry in answer["maps"]:
        cell = expected[entry["projector"]]
        if word == "dog":
            np.testing.assert_allclose(entry["cosine"], cell.cosine.ravel(), atol=1e-6)
            assert entry["predicted"] == cell.predicted.ravel().nonzero().ravel().tolist()
            assert entry["iou"] == pytest.approx(cell.iou_px, rel=1e-6)
        assert entry["iou"] is not None


def test_a_label_with_several_regions_is_their_union_and_one_without_has_no_iou(
    page_over: Callable, models: Models, write_pad: Callable
):
    halves = [rectangle(12, 0, 40, 56, "dog"), rectangle(40, 0, 68, 56, "dog")]
    client = page_over(models, write_pad(halves))
    both = coco_mask.merge([{"size": [56, 80], "counts": half["rle_mask"].encode()} for half in halves])
    assert post(client, "/heat", word="dog")["truth"] == both["counts"].decode()
    answer = post(client, "/heat", word="a red car at night")
    assert answer["truth"] is None and [entry["iou"] for entry in answer["maps"]] == [None, None]
    assert post(client, "/image")["labels"] == ["dog"]


def test_a_region_has_the_words_of_the_mean_of_its_tokens(client: Any, models: Models, pad: Path):
    polygon = [12, 0, 44, 0, 44, 30, 12, 30]  # four cells, and of five more less than half
    image = Image.open(pad.parent / "pictures" / IMAGE)
    for entry, model in zip(post(client, "/region", polygon=polygon)["regions"], models, strict=True):
        [tokens] = model.visual_tokens(model.encode([image]))
        mean = tokens[[0, 1, 4, 5]].mean(dim=0, keepdim=True)
        found = matching_pursuit(mean, dictionary_of(model.words, "cpu"), 5)
        assert entry["cells"] == [0, 1, 4, 5]
        assert entry["ids"] == found.ids.tolist()
        np.testing.assert_allclose(entry["coefficients"], found.coefficients, atol=6e-5)


def test_where_no_token_is_there_are_no_words(client: Any):
    for where in ({"point": [5, 5]}, {"polygon": [20, 20, 22, 20, 22, 22]}):  # cut off by the crop; under half a cell
        assert [(entry["cells"], "ids" in entry) for entry in post(client, "/region", **where)["regions"]] == [
            ([], False)
        ] * 2


def test_the_difference_is_one_map_less_the_other(client: Any):
    answer = post(client, "/heat", word="dog", less=["start", "random"])
    random, start = (np.array(entry["cosine"]) for entry in answer["maps"])
    np.testing.assert_allclose(answer["difference"]["cosine"], start - random, atol=1e-6)
    assert answer["difference"]["grid"] == answer["maps"][0]["grid"]
    assert "difference" not in post(client, "/heat", word="dog")


def test_an_upload_is_read_as_the_same_file_of_the_set(client: Any, pad: Path):
    uploaded = client.post("/upload", content=(pad.parent / "pictures" / IMAGE).read_bytes()).json()
    described = post(client, "/image")
    assert uploaded["size"] == described["size"] == [80, 56]
    assert uploaded["picture"] == described["picture"] and uploaded["picture"].startswith("data:image/jpeg;base64,")
    assert (uploaded["labels"], described["labels"]) == ([], ["dog", "red car"])
    assert post(client, "/words", image=uploaded["image"])["maps"] == post(client, "/words")["maps"]


def test_uploads_are_rotated_as_their_exif_says_and_forgotten_in_turn(
    page_over: Callable, models: Models, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(session, "MOST_OPEN", 1)
    client, image, turned = page_over(models, None), Image.new("RGB", (30, 20)), Image.Exif()
    turned[274] = 6
    keys = []
    for exif, size in ((turned, [20, 30]), (Image.Exif(), [30, 20])):
        image.save(content := io.BytesIO(), "JPEG", exif=exif)
        answer = client.post("/upload", content=content.getvalue()).json()
        assert answer["size"] == size
        keys.append(answer["image"])
    assert client.post("/words", json={"image": keys[1]}).status_code == 200
    refused = client.post("/words", json={"image": keys[0]})
    assert refused.status_code == 404 and "send an upload again" in refused.json()["error"]
    assert client.get("/images").json() == {"images": [], "next": None}


def test_images_of_the_set_are_found_by_name_caption_and_label(client: Any, monkeypatch: pytest.MonkeyPatch):
    def listed(**query: Any) -> Any:
        answer = client.get("/images", params=query).json()
        return [entry["image"] for entry in answer["images"]], answer["next"]

    assert listed() == (["0.png", "1.png", "2.png", "3.png"], None)
    assert listed(text="DOG") == (["0.png", "2.png"], None)
    assert listed(text="noise", start=3) == (["3.png"], None)
    assert client.get("/images").json()["images"][0]["thumbnail"].startswith("data:image/jpeg;base64,")
    monkeypatch.setattr(session, "_LISTED", 2)
    assert listed(start=1) == (["1.png", "2.png"], 3)
    assert client.get("/images", params={"start": "-1"}).status_code == 400


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://elsewhere.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "elsewhere.example"},
        {"Host": "127.0.0.1.elsewhere.example:8300", "Origin": "http://127.0.0.1.elsewhere.example:8300"},
    ],
)
def test_other_pages_get_nothing(client: Any, headers: dict[str, str]):
    for response in (
        client.get("/images", headers=headers),
        client.post("/words", json={"image": IMAGE}, headers=headers),
        client.post("/upload", content=b"", headers=headers),
        client.options("/words", headers={"Access-Control-Request-Method": "POST", **headers}),
    ):
        assert response.status_code in (400, 403)
        assert "maps" not in response.text and IMAGE not in response.text
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_the_page_itself_is_served_under_its_names_and_to_links_and_frames_of_others_get_nothing(client: Any):
    for headers in (
        {},
        {"Host": "localhost:9000", "Origin": "http://localhost:9000"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        response = client.get("/", headers=headers)
        assert response.status_code == 200 and "Explore visual tokens" in response.text
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert response.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert client.get("/images", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    del client.headers["Origin"]  # a command, such as curl
    assert client.get("/images").status_code == 200


def bytes_of(image: Image.Image, cut: int | None = None) -> bytes:
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()[:cut]


def test_uploads_are_bounded_and_must_be_images(
    client: Any, page_over: Callable, models: Models, monkeypatch: pytest.MonkeyPatch
):
    def refused(content: bytes, client: Any = client) -> tuple[int, str]:
        response = client.post("/upload", content=content)
        return response.status_code, response.json()["error"]

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for content in (b"", b"<svg onload='alert(1)'/>", bytes_of(noise, 2000)):
        assert refused(content)[0] == 400 and "Found no image" in refused(content)[1]
    bomb = bytes_of(Image.new("1", (9000, 6000)))
    assert len(bomb) < 20_000
    assert refused(bomb) == (400, "Found an image of 54,000,000 pixels, expected at most 50,000,000: make it smaller.")
    assert refused(bytes_of(Image.new("1", (20000, 10000))))[0] == 400  # beyond PIL's own bound
    monkeypatch.setattr(app, "MOST_BYTES", 1000)
    assert refused(bytes_of(noise), page_over(models, None))[0] == 413


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "pictures/../../secret.png"])
def test_paths_come_from_the_set_and_never_leave_the_image_folder(
    page_over: Callable, models: Models, write_pad: Callable, image: str
):
    pad = write_pad([])
    Image.new("RGB", (80, 56)).save(pad.parent / "secret.png")
    asked = page_over(models, pad).post("/image", json={"image": image})
    assert asked.status_code == 404 and "no such image" in asked.json()["error"]
    record = json.loads(pad.read_text()) | {"image_id": image}
    pad.write_text(json.dumps(record) + "\n")
    client = page_over(models, pad)
    listed = client.get("/images").json()["images"]
    assert [entry["thumbnail"] for entry in listed] == [None] * len(listed)
    asked = client.post("/image", json={"image": image})
    assert asked.status_code in (400, 404) and "picture" not in asked.json()


def test_what_does_not_fit_says_why(client: Any, pad: Path):
    def error(path: str, **question: Any) -> str:
        response = client.post(path, json=question)
        assert response.status_code == 400, response.text
        return response.json()["error"]

    assert "'less'" in error("/heat", image=IMAGE, word="dog", less="random")
    assert "random, start" in error("/heat", image=IMAGE, word="dog", less=["random", "none"])
    assert "label" in error("/heat", image=IMAGE, word=" ")
    assert "both or neither" in error("/region", image=IMAGE)
    assert "far outside" in error("/region", image=IMAGE, polygon=[0, 0, 1e9, 0, 1e9, 1e9])
    assert "polygon" in error("/region", image=IMAGE, polygon=[0, 0])
    assert "'image'" in error("/words")
    Image.new("RGB", (10, 10)).save(pad.parent / "pictures" / "3.png")
    assert "[10, 10] pixels, expected [80, 56]" in error("/image", image="3.png")
    assert client.post("/words", content=b"[" * 70_000).status_code == 413
    assert client.post("/words", content=b"no JSON").status_code == 400
    assert client.get("/../../etc/passwd").status_code == 404
