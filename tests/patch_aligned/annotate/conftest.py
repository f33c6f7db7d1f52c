"""Tiny detectors with random weights, as folders in transformers' format."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

# Where bert-base-uncased has them: the model's code knows some by their ids.
SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ",": 1010, ".": 1012, "?": 1029}
WORDS = ["person", "dog", "cat", "tennis", "racket", "shirt", "under", "##shirt", "woman", "##ab", "swab", "-", "'"]
LETTERS = [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase + string.digits]
TINY_DETECTORS: dict[str, tuple[Any, Any]] = {
    "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
}


def _vocabulary() -> dict[str, int]:
    token_of_id = {number: f"[unused{number}]" for number in range(1030)}
    token_of_id |= {number: token for token, number in SPECIAL_IDS.items()}
    return {token: number for number, token in enumerate([*token_of_id.values(), *WORDS, *LETTERS])}


def _save_tiny_detector(folder: Path, kind: str) -> Path:
    """A detector of half a million random weights; images are 96 px at their shortest edge and 160 at most."""
    torch.manual_seed(0)
    config_class, model_class = TINY_DETECTORS[kind]
    tokenizer = BertTokenizer(vocab=_vocabulary())
    backbone = SwinConfig(
        image_size=128, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=7,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256,
    )  # fmt: skip
    config = config_class(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=30,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = model_class(config)
    with torch.no_grad():  # as they come, boxes are the anchors, and scores are all 0 or all 1
        for name, parameter in model.named_parameters():
            if "bbox_embed" in name:
                parameter.normal_(std=0.15)
            elif "class_embed" in name:
                parameter.zero_()
        if kind == "grounding-dino":  # MM Grounding DINO divides by the root of the width
            model.model.decoder.layer_norm.weight.fill_(0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> BertTokenizer:
    """A tokenizer with BERT's special ids and a few words; all others are spelled in letters."""
    return BertTokenizer(vocab=_vocabulary())


@pytest.fixture(scope="session")
def tiny_detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Grounding DINO."""
    return _save_tiny_detector(tmp_path_factory.mktemp("grounding_dino"), "grounding-dino")


@pytest.fixture(scope="session")
def tiny_mm_detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MM Grounding DINO."""
    return _save_tiny_detector(tmp_path_factory.mktemp("mm_grounding_dino"), "mm-grounding-dino")
