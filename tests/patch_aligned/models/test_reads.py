"""Reads: captions after their own and other pictures, against forward passes of one pair each in float64."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.intervals import Resampling
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.language import LanguageModel
from patch_aligned.models.llava import CAPTION_REQUEST
from patch_aligned.models.load import load_models
from patch_aligned.models.reads import PICTURES, Caption, measure_reads, read_captions, reader_of, reads_metrics
from patch_aligned.models.tiny import tiny_config
from patch_aligned.models.whole import WholeModel
from tests.patch_aligned.models.families import FAMILIES

WORDS = ("dog", "red car", "a tree", "two birds", "the sea", "my house", "old man", "blue sky", "hot tea", "a lamp")
NOISE = [
    Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (10, 56, 56, 3), dtype=np.uint8)
]


@pytest.fixture
def pairs(tmp_path: Path) -> list[Caption]:
    for number, image in enumerate(NOISE):
        image.save(tmp_path / f"{number}.png")
    return [Caption(f"{number}.png", word) for number, word in enumerate(WORDS)]


@pytest.fixture
def tiny_llava(golden_world: Path) -> tuple[VisionLanguageModel, LanguageModel]:
    """A stage-1 projector, its tower and its LLM, in float64."""
    [model] = load_models(["start=train_init/mm_projector.bin"], "tiny-vicuna", "tiny-clip", "square")
    assert model.language is not None
    language = model.language.load()
    language.model.double()
    return model, language


def log_share(logits: torch.Tensor, ids: list[int]) -> float:
    """Sum of log-probabilities of the last `ids` of a row, from its logits `[L, M]`."""
    shares = logits.log_softmax(dim=-1)[-len(ids) - 1 : -1]
    return float(sum(share[index] for share, index in zip(shares, ids, strict=True)))


def test_llava_reads_a_caption_as_stage_1_writes_it(tiny_llava: tuple[VisionLanguageModel, LanguageModel]):
    model, language = tiny_llava
    log_p, tokens = reader_of(language, model)(NOISE[:3], WORDS[:4])
    words = language.model.get_input_embeddings()
    # The tower runs in float32, where a picture's tokens round by its batch on some CPUs.
    tokens_of = [tokens.double() for tokens in model.visual_tokens(model.encode(NOISE[:3]))]
    for column, caption in enumerate(WORDS[:4]):
        bos, *ids = language.tokenizer(caption).input_ids
        assert tokens[column] == len(ids)
        for row, visual in enumerate(tokens_of):
            with torch.no_grad():
                given = torch.cat([words(torch.tensor([bos])), visual, words(torch.tensor(ids))])[None]
                expected = log_share(language.model(inputs_embeds=given).logits[0], ids)
            assert log_p[row, column] == pytest.approx(expected, rel=1e-9)


TEMPLATE = """<s>USER: {% for part in messages[0].content %}{{ part.text or IMAGE }} {% endfor %}ASSISTANT:"""


@pytest.mark.parametrize(
    ("name", "has_template", "adds_bos"),
    [("qwen3_vl", True, False), ("internvl", True, True), ("internvl", False, False), ("smolvlm", True, False)],
)
def test_a_family_reads_captions_of_several_lengths_at_once(name: str, has_template: bool, adds_bos: bool):
    processor = copy.deepcopy(FAMILIES[name].make_processor())
    prompt = image_token = processor.image_token
    if has_template:
        processor.chat_template = TEMPLATE.replace("IMAGE", repr(image_token))
        prompt = f"{'' if adds_bos else '<s>'}USER: {image_token} {CAPTION_REQUEST} ASSISTANT: "
    if adds_bos:
        bos = ("<s>", processor.tokenizer.bos_token_id)
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config(FAMILIES[name].make_config())).double().eval()
    captions, images = ["a cat", "what is a cat", "cat"], NOISE[:2]
    log_p, tokens = reader_of(WholeModel(model, processor))(images, captions)
    assert tokens.tolist() == [2, 4, 1]
    for row, image in enumerate(images):
        for column, caption in enumerate(captions):
            given = processor(text=[prompt + caption], images=[[image]], return_tensors="pt").to("cpu", torch.float64)
            with torch.no_grad():
                logits = model(**given).logits[0]
            ids = processor.tokenizer(caption, add_special_tokens=False).input_ids
            assert log_p[row, column] == pytest.approx(log_share(logits, ids), rel=1e-9)


def test_constant_visual_tokens_are_blind(
    tiny_llava: tuple[VisionLanguageModel, LanguageModel], pairs: list[Caption], tmp_path: Path
):
    model, language = tiny_llava
    for parameter in model.projector.parameters():
        torch.nn.init.constant_(parameter, 0.01 * (parameter.ndim == 1))
    rows = measure_reads(reader_of(language, model), pairs, tmp_path)
    assert len(rows) == 10
    assert rows["reads_nats"].abs().max() < 1e-9
    assert (rows["loss_nats"] > 0).all()


def test_a_model_that_learned_its_captions_reads(
    tiny_llava: tuple[VisionLanguageModel, LanguageModel], pairs: list[Caption], tmp_path: Path
):
    model, language = tiny_llava
    llm, pairs = language.model, pairs[:PICTURES]
    features = model.encode(NOISE[:PICTURES]).features  # [P, S, d]
    parameters = [*model.projector.parameters(), *llm.parameters()]
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in parameters], lr=3e-3)
    words, ids = llm.get_input_embeddings(), [language.answer_ids(pair.text) for pair in pairs]
    for _ in range(40):
        loss = torch.zeros(())
        for visual, of_one in zip(model.projector(features).double(), ids, strict=True):
            given = torch.cat([words(torch.tensor([1])), visual, words(torch.tensor(of_one))])[None]
            logits = llm(inputs_embeds=given).logits[0, -len(of_one) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(of_one))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = measure_reads(reader_of(language, model), pairs, tmp_path)
    assert 1 < rows["reads_nats"].mean() <= math.log(PICTURES)


def test_captions_are_scored_once_in_groups_of_nine_and_groups_are_drawn(tmp_path: Path):
    pairs = [Caption(f"{number}.png", f"caption {number}") for number in range(20)]
    for pair in pairs:
        Image.new("RGB", (2, 2), (int(pair.image_id[:-4]), 0, 0)).save(tmp_path / pair.image_id)

    def reader(images: Any, captions: Any) -> tuple[np.ndarray, np.ndarray]:
        assert len(images) == len(captions) == PICTURES
        shown = np.array([image.getpixel((0, 0))[0] for image in images])
        own = np.array([int(caption.split()[1]) for caption in captions])
        return np.where(shown[:, None] == own, -1.0, -3.0) - own / 10, 1 + own % 2

    rows = measure_reads(reader, pairs, tmp_path, seed=3)
    assert sorted(rows["image_id"]) == sorted(pair.image_id for pair in pairs)
    assert rows.groupby("group").size().tolist() == [9, 9, 2]
    score = 2 - math.log((math.exp(2) + 8) / 9)
    assert rows["reads_nats"].to_numpy() == pytest.approx(score)
    found = reads_metrics(rows, Resampling(200))
    assert found.loc["reads_per_caption"].to_numpy() == pytest.approx([score] * 3)
    assert found.loc["reads_per_token", "value"] == pytest.approx(20 * score / 30)
    assert found.loc["loss_per_token", "value"] == pytest.approx((20 + 190 / 10) / 30)
    assert found.loc["loss_per_token", "low"] < found.loc["loss_per_token", "high"]


def test_captions_come_from_training_files_and_from_pad(tmp_path: Path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A cat.\n"}]
    llava = [{"image": f"{number}.jpg", "conversations": turns} for number in range(9)]
    pad = [{"image_id": f"{number}.jpg", "caption": "A cat.", "labels": []} for number in range(9)]
    first, second = tmp_path / "train.json", tmp_path / "pad.jsonl"
    first.write_text(json.dumps([*llava, {"conversations": turns}]))
    second.write_text("\n".join(map(json.dumps, pad)))
    assert read_captions(first) == read_captions(second) == [Caption(f"{n}.jpg", "A cat.") for n in range(9)]
    first.write_text(json.dumps(llava[:8]))
    with pytest.raises(ValueError, match=r"train\.json: found 8 pictures with a caption"):
        read_captions(first)


def test_the_command_prints_a_table_and_writes_json(golden_world: Path, pairs: list[Caption]):
    Path("held_out.json").write_text(json.dumps([{"image": p.image_id, "caption": p.text} for p in pairs]))
    models = ["reads", "train_init/mm_projector.bin", "--base", "tiny-vicuna", "--vision-tower", "tiny-clip"]
    done = CliRunner().invoke(
        app, [*models, "--data", "held_out.json", "--image-folder", ".", "--output", "reads.json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(Path("reads.json").read_text())
    assert len(report["captions"]) == 10
    rows = pd.DataFrame(report["captions"])
    assert report["metrics"]["reads_per_caption"]["value"] == pytest.approx(rows["reads_nats"].mean())
    assert "reads_per_caption" in done.output
