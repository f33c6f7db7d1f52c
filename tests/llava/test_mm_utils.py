"""Image and prompt preparation against outputs recorded from the original LLaVA."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, StoppingCriteriaList
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava import mm_utils
from llava.mm_utils import KeywordsStoppingCriteria, parse_grid_pinpoints, process_images, tokenizer_image_token
from llava.plugin import ImageView

TOKENIZERS = {"vicuna": "tiny-vicuna", "legacy": "tiny-tok-legacy", "mpt": "tiny-tok-mpt"}


@pytest.fixture(scope="module")
def tokenizers(goldens: Path) -> dict:
    return {name: AutoTokenizer.from_pretrained(goldens / folder) for name, folder in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def processor(goldens: Path) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil.from_pretrained(goldens / "tiny-clip")


@pytest.fixture(scope="module")
def images(goldens: Path) -> list[Image.Image]:
    count = len(json.loads((goldens / "g_images.json").read_text())["sizes"])
    return [Image.open(goldens / "images" / f"im{position}.png").convert("RGB") for position in range(count)]


@pytest.fixture(scope="module")
def image_facts(goldens: Path) -> dict:
    return json.loads((goldens / "g_images.json").read_text())


@pytest.mark.golden
@pytest.mark.usefixtures("pillow_of_the_recordings")
@pytest.mark.parametrize("aspect_ratio", [None, "square", "pad", "anyres"])
def test_pixels_equal_upstream(goldens: Path, processor, images, image_facts, aspect_ratio) -> None:
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=image_facts["pinpoints"])
    recorded = np.load(goldens / "g_images.npz")
    for position, image in enumerate(images):
        pixels = process_images([image], processor, config)[0].numpy()
        np.testing.assert_array_equal(pixels, recorded[f"{aspect_ratio}/{position}"])


def test_original_is_the_processor_alone(processor, images) -> None:
    """The value that tasks of lmms-eval write into a config that names no aspect ratio."""
    square, original = (SimpleNamespace(image_aspect_ratio=ratio) for ratio in ("square", "original"))
    assert torch.equal(process_images(images, processor, original), process_images(images, processor, square))


@pytest.mark.golden
def test_batches_are_stacked_where_shapes_agree(processor, images, image_facts) -> None:
    assert process_images(images, processor, SimpleNamespace(image_aspect_ratio="pad")).shape == (7, 3, 56, 56)
    anyres = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=str(image_facts["pinpoints"]))
    tiles = process_images(images, processor, anyres)
    assert isinstance(tiles, list)
    assert [list(tensor.shape) for tensor in tiles] == image_facts["anyres_shapes"]
    same = process_images([images[1]] * 2, processor, anyres)
    assert list(same.shape) == image_facts["anyres_same_shape_stacked"]


@pytest.mark.golden
@pytest.mark.usefixtures("pillow_of_the_recordings")
def test_canvases_and_resolutions_equal_upstream(goldens: Path, images, image_facts) -> None:
    for position in (1, 2):
        recorded = np.load(goldens / f"g_expand_{position}.npz")
        background = tuple(image_facts["pad_background"])
        square = mm_utils.expand2square(images[position], background)
        np.testing.assert_array_equal(np.asarray(square), recorded["a"])
        letterboxed = mm_utils.resize_and_pad_image(images[position], (112, 56))
        np.testing.assert_array_equal(np.asarray(letterboxed), recorded["b"])
    pinpoints = image_facts["pinpoints"]
    for size, grid, best in zip(
        image_facts["sizes"], image_facts["grid_shape"], image_facts["best_resolution"], strict=True
    ):
        assert list(mm_utils.get_anyres_image_grid_shape(size, pinpoints, 56)) == grid
        assert list(mm_utils.get_anyres_image_grid_shape(size, str(pinpoints), 56)) == grid
        assert mm_utils.select_best_resolution(size, pinpoints) == best
    published = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    for size_text, best in image_facts["best_resolution_336"].items():
        size = tuple(json.loads(size_text.replace("(", "[").replace(")", "]")))
        assert list(mm_utils.select_best_resolution(size, published)) == best


@pytest.mark.golden
@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_upstream(goldens: Path, tokenizers, name: str) -> None:
    recorded = json.loads((goldens / "g_tokenize.json").read_text())
    for prompt, ids in zip(recorded["prompts"], recorded["ids"][name], strict=True):
        assert tokenizer_image_token(prompt, tokenizers[name]) == ids, prompt
    tensor = tokenizer_image_token(recorded["prompts"][2], tokenizers[name], return_tensors="pt")
    assert tensor.dtype == torch.long
    assert tensor.tolist() == recorded["ids"][name][2]


@pytest.mark.golden
def test_other_index_and_other_tensors(goldens: Path, tokenizers) -> None:
    recorded = json.loads((goldens / "g_tokenize.json").read_text())
    ids = tokenizer_image_token("a <image> b", tokenizers["vicuna"], image_token_index=-7)
    assert ids == recorded["custom_index"]
    with pytest.raises(ValueError) as error:
        tokenizer_image_token("a", tokenizers["vicuna"], return_tensors="np")
    assert ["ValueError", str(error.value)] == recorded["bad_return_tensors"]


def test_a_spelled_out_bos_costs_no_token_after_an_image(goldens: Path) -> None:
    """Chatml models name `<|im_start|>` their BOS but add none: the text after an image must stay whole."""
    tokenizer = AutoTokenizer.from_pretrained(goldens / "tiny-tok-mpt", bos_token="<|im_start|>")
    ids = tokenizer_image_token("<|im_start|>user\n<image>\nWhat?", tokenizer)
    after = tokenizer("\nWhat?", add_special_tokens=False).input_ids
    assert ids == [*tokenizer("<|im_start|>user\n", add_special_tokens=False).input_ids, -200, *after]


@pytest.mark.golden
def test_model_names_equal_upstream(goldens: Path) -> None:
    for path, name in json.loads((goldens / "g_model_name.json").read_text()).items():
        assert mm_utils.get_model_name_from_path(path) == name


@pytest.mark.golden
def test_stopping_equals_upstream(goldens: Path, tokenizers) -> None:
    """Prompt and answer, and the answer alone; the criteria of both know the prompt or not, as recorded."""
    for case in json.loads((goldens / "g_stopping.json").read_text()):
        tokenizer, start = tokenizers[case["tok"]], case["start_len"]
        prompt, full = torch.tensor([case["prompt_ids"]]), torch.tensor([case["ids"]])
        criteria = KeywordsStoppingCriteria(case["keywords"], tokenizer, prompt)
        assert [ids.tolist() for ids in criteria.keyword_ids] == case["keyword_ids"]
        assert (criteria.max_keyword_len, criteria.start_len) == (case["max_keyword_len"], start)
        ends = range(start + 1, full.shape[1] + 1)
        assert [bool(criteria(full[:, :end], None)) for end in ends] == case["stop_with_prompt"]
        unprompted = KeywordsStoppingCriteria(case["keywords"], tokenizer, torch.zeros(1, 0, dtype=torch.long))
        for either in (criteria, unprompted):  # where generate() was given embeddings, the prompt is not handed over
            assert [bool(either(full[:, start:end], None)) for end in ends] == case["stop_new_tokens_only"]


def test_rows_stop_one_by_one(tokenizers) -> None:
    tokenizer = tokenizers["vicuna"]
    prompts = torch.tensor([[1, 5, 5], [1, 6, 6]])
    criteria = StoppingCriteriaList([KeywordsStoppingCriteria(["</s>"], tokenizer, prompts)])
    answers = torch.tensor([[7, 2], [7, 7]])
    assert criteria(answers, None).tolist() == [True, False]
    assert criteria(torch.cat([prompts, answers], 1), None).tolist() == [True, False]
    beams = torch.cat([prompts.repeat_interleave(2, 0), torch.tensor([[7, 7], [7, 2], [7, 7], [7, 2]])], 1)
    assert criteria(beams, None).tolist() == [False, True, False, True]


def test_a_keyword_in_the_prompt_stops_nothing(tokenizers) -> None:
    prompts = torch.tensor([[1, 5, 2]])
    criteria = KeywordsStoppingCriteria(["</s>"], tokenizers["vicuna"], prompts)
    assert not criteria(prompts, None).any()


def test_image_counts_are_compared(tmp_path: Path) -> None:
    mm_utils.require_image_tokens("<image>\nand <image>", 2, "sample 7")
    with pytest.raises(ValueError, match=r"sample 7: found 1 <image> in the text, expected 0"):
        mm_utils.require_image_tokens("<image>", 0, "sample 7")


def test_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such image file"):
        mm_utils.load_rgb_image(tmp_path / "gone.jpg")
    (tmp_path / "page.jpg").write_text("<html>moved")
    with pytest.raises(mm_utils.UnreadableImageError, match=r"page\.jpg: found a file that begins with b'<html>moved'"):
        mm_utils.load_rgb_image(tmp_path / "page.jpg")
    (tmp_path / "empty.png").touch()
    with pytest.raises(mm_utils.UnreadableImageError, match=r"empty\.png: found an empty file"):
        mm_utils.load_rgb_image(tmp_path / "empty.png")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in (".jpg", ".png"):
        whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
        Image.fromarray(pixels).save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(mm_utils.UnreadableImageError, match=rf"cut\{suffix}: cannot be decoded"):
            mm_utils.load_rgb_image(cut)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(mm_utils.UnreadableImageError, match=r"whole\.png: .*MAX_IMAGE_PIXELS"):
        mm_utils.load_rgb_image(tmp_path / "whole.png")


def test_a_decoder_that_fails_in_its_own_way_is_an_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("Failed to decode frame 0")  # as PIL does for broken AVIF

    (tmp_path / "x.avif").touch()
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(mm_utils.UnreadableImageError, match=r"x\.avif: cannot be decoded"):
        mm_utils.load_rgb_image(tmp_path / "x.avif")


def test_any_picture_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "1", "LA"):
        Image.new(mode, (3, 2)).save(tmp_path / f"{mode}.png")
        image = mm_utils.load_rgb_image(tmp_path / f"{mode}.png")
        assert (image.mode, image.size) == ("RGB", (3, 2))
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    decoded = mm_utils.load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert decoded.getpixel((1, 1)) == (9, 8, 7)
    with pytest.raises(mm_utils.UnreadableImageError, match="base64 image of 8 characters"):
        mm_utils.load_image_from_base64("aGVsbG8=")


def test_the_view_reads_the_processor() -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    view = mm_utils.image_view_of((640, 480), clip, "pad", (16, 16))
    assert view == ImageView((640, 480), "pad", 256, 224, 224, (16, 16))
    squeezing = SimpleNamespace(size={"height": 384, "width": 384})
    view = mm_utils.image_view_of((640, 480), squeezing, None, (27, 27), seen_side=378)
    assert view == ImageView((640, 480), "squeeze", 384, 384, 378, (27, 27))
    with pytest.raises(ValueError, match="image_aspect_ratio: found 'letterbox'"):
        mm_utils.image_view_of((640, 480), clip, "letterbox", (16, 16))


def test_anyres_choices() -> None:
    pinpoints = [(336, 672), (672, 336), (672, 672)]
    assert mm_utils.select_best_resolution((640, 480), pinpoints) == (672, 672)
    assert mm_utils.select_best_resolution((200, 200), pinpoints) == (336, 672)  # a tie in both respects: the first
    assert mm_utils.get_anyres_image_grid_shape((200, 200), str([list(p) for p in pinpoints]), 336) == (1, 2)
    assert mm_utils.letterboxed_wh((100, 30), (50, 50)) == (50, 15)
    assert mm_utils.letterboxed_wh((101, 30), (50, 50)) == (50, 15)  # 14.85 is rounded up
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        mm_utils.get_anyres_image_grid_shape((200, 200), "[[1], [2]]", 336)


def test_unknown_aspect_ratio_is_refused(processor, images) -> None:
    with pytest.raises(ValueError, match="found 'anyres_max_9'"):
        process_images(images[:1], processor, SimpleNamespace(image_aspect_ratio="anyres_max_9"))


@pytest.mark.parametrize(
    "pinpoints", ["[[336, 672]", "(1x1),...,(6x6)", "5", [[100, 672]], [[0, 336]], [], [[336]], None]
)
def test_odd_pinpoints_are_named(pinpoints: object) -> None:
    with pytest.raises(ValueError, match=r"image_grid_pinpoints: found .*multiples of the tower's side 336"):
        parse_grid_pinpoints(pinpoints, 336)
