"""Fixtures of the data tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

TOKENIZER_FOLDERS = {"vicuna": "tiny-vicuna", "legacy": "tiny-tok-legacy", "mpt": "tiny-tok-mpt"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of converted data files go to a folder of the test."""
    monkeypatch.setattr("llava.data.records.HF_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tokenizers(goldens: Path) -> dict[str, Any]:
    """SentencePiece as Vicuna 1.5 has it, the same in legacy mode, and a byte-level one with ChatML marks, no BOS."""
    return {name: AutoTokenizer.from_pretrained(goldens / folder) for name, folder in TOKENIZER_FOLDERS.items()}


@pytest.fixture
def tokenizer(tokenizers: dict[str, Any]) -> Any:
    tokenizer = copy.deepcopy(tokenizers["vicuna"])
    tokenizer.model_max_length = 2048
    return tokenizer


@pytest.fixture(scope="session")
def conversations(goldens: Path) -> list[dict[str, Any]]:
    """The ten dialogues c0 to c9 that labels were recorded for."""
    return json.loads((goldens / "data_conv.json").read_text())


@pytest.fixture
def data_args() -> SimpleNamespace:
    return SimpleNamespace(
        image_folder="images",
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
        lazy_preprocess=True,
    )
