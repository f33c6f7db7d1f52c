"""The check before a long training: it trains ten steps and resumes, or stops at the first thing that would fail."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import preflight
from tests.pads import rle_of
from tests.scripts.shell import ROOT, printed, run_script


@pytest.fixture
def variables(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables that let the miniature train on tiny weights and four images with a region each."""
    records = []
    for sample in json.loads(Path("data_plain.json").read_text()):
        width, height = Image.open(golden_world / "images" / sample["image"]).size
        counts = rle_of(np.ones((height, width)))
        region = {"tag": "lake", "bbox": [0, 0, width, height], "rle_mask": counts}
        record = {"image_id": sample["image"], "size": [width, height], "caption": "a lake", "labels": [region]}
        records.append(record)
    Path("pad.json").write_text(json.dumps(records))
    monkeypatch.setenv("HF_HOME", str(golden_world / "hub"))
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(golden_world / "cache"))
    return {
        "PRESET": "mini",
        "MODEL_NAME_OR_PATH": str(golden_world / "tiny-vicuna"),
        "VISION_TOWER": str(golden_world / "tiny-clip"),
        "DATA_PATH": str(golden_world / "data_plain.json"),
        "IMAGE_FOLDER": str(golden_world / "images"),
        "PAD_PATH": str(golden_world / "pad.json"),
        "PRETRAIN_MM_MLP_ADAPTER": str(golden_world / "train_init" / "mm_projector.bin"),
        "VERSION": "v1",
        "OUTPUT_DIR": str(golden_world / "runs" / "run"),
    }


def command_of(script: str, variables: dict[str, str], *flags: str) -> list[str]:
    """Words of the command that a training script prints."""
    (words,) = printed(f"v1_5/{script}.sh", *flags, **variables)
    return words


def line_of(report: str, topic: str) -> str:
    return next(line for line in reversed(report.splitlines()) if line.startswith(topic))


def in_bytes(text: str) -> float:
    number, unit = re.search(r"([\d.]+) ([GM])B", text).groups()  # type: ignore[union-attr]
    return float(number) * {"G": 1e9, "M": 1e6}[unit]


@pytest.mark.slow
def test_the_script_trains_ten_steps_and_leaves_nothing(variables: dict[str, str]) -> None:
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "DRY_RUN": ""}
    result = run_script("v1_5/preflight.sh", "pretrain_patchaligned", "--weight_decay", "0.1", **environment)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 images have regions" in line_of(result.stdout, "regions")
    assert len(re.findall(r"\d+\.\d{3}", line_of(result.stdout, "losses"))) == 10
    assert in_bytes(line_of(result.stdout, "memory")) > 1e8  # torch alone is more
    assert re.search(r"\d+\.\d\d s a step", line_of(result.stdout, "speed"))
    assert "50 steps" in line_of(result.stdout, "whole run")
    assert not list(Path(variables["OUTPUT_DIR"]).parent.iterdir())


@pytest.mark.slow
def test_the_second_stage_is_checked_and_its_checkpoints_are_as_large_as_estimated(
    variables: dict[str, str], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    three_epochs = {"NUM_TRAIN_EPOCHS": "3", "MAX_STEPS": "-1"}
    assert preflight.main(command_of("finetune", variables | three_epochs)) == 0
    report = capfd.readouterr().out
    assert "\nwhole run  3 steps" in report  # 4 samples, 4 a step
    estimated, measured = (in_bytes(line.split("checkpoints of")[1]) for line in re.findall("disk .*", report))
    assert measured == pytest.approx(estimated, rel=0.15)
    assert not list(Path(variables["OUTPUT_DIR"]).parent.iterdir())


def test_adapters_are_counted(variables: dict[str, str]) -> None:
    pytest.importorskip("peft", reason="peft is part of the extra `train`")
    flags, _ = preflight.read_command(command_of("finetune_lora", variables | {"LORA_R": "16"}))
    width, tower_width = 64, json.loads(Path("tiny-clip/config.json").read_text())["hidden_size"]
    # in + out of q, k, v, o, gate, up and down in each of three layers; keys and values have half the heads
    adapters = 16 * 3 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    projector = (tower_width + 1) * width + (width + 1) * width
    trained = adapters + projector
    assert preflight.checkpoint_size(flags, preflight.model_without_weights(flags)) == trained * 4 + trained * 8
    flags.deepspeed, flags.bf16 = "zero2.json", True
    assert preflight.checkpoint_size(flags, preflight.model_without_weights(flags)) == trained * 2 + trained * 14


def break_json(variables: dict[str, str]) -> None:
    data = Path(variables["DATA_PATH"])
    data.write_text(data.read_text()[:-20])


def name_no_turns(variables: dict[str, str]) -> None:
    Path(variables["DATA_PATH"]).write_text('[{"id": "a", "image": "im0.png", "conversations": "a"}]')


def remove_shard(variables: dict[str, str]) -> None:
    folder = Path(variables["MODEL_NAME_OR_PATH"])
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def swap_sides(variables: dict[str, str]) -> None:
    path = Path(variables["PAD_PATH"])
    records = json.loads(path.read_text())
    for record in records:
        record["size"].reverse()
    path.write_text(json.dumps(records))


def rename_annotated_images(variables: dict[str, str]) -> None:
    path = Path(variables["PAD_PATH"])
    path.write_text(re.sub(r"im(?=\d)", "other", path.read_text()))


Spoil = Callable[[dict[str, str]], object]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda names: Path("images/im1.png").unlink(),
            ["data_plain.json, record 1", "im1.png", "no such file", "--image_folder"],
        ),
        (break_json, ["data_plain.json: record 3", "Is the file cut off?", "copy it again"]),
        (name_no_turns, ["data_plain.json, record 0", "field conversations: found 'a'", "--on_error skip"]),
        (
            lambda names: Path("data_plain.json").unlink(),
            ["--data_path", "data_plain.json: found no such file", "prepare_data.sh --check"],
        ),
        (
            lambda names: Path("tiny-vicuna/model.safetensors").unlink(),
            ["--model_name_or_path", "found no model.safetensors", "next:"],
        ),
        (remove_shard, ["--model_name_or_path", "found no model-00002-of-00002.safetensors"]),
        (lambda names: names.update(VISION_TOWER="./nowhere"), ["--vision_tower ./nowhere", "no such folder"]),
        (lambda names: names.update(MODEL_NAME_OR_PATH="a/b"), ["the hub's cache", "next: hf download a/b"]),
        (swap_sides, ["im", "size", "prepare_data.sh --check"]),
        (rename_annotated_images, ["found no image that has a region", "'im0.png'", "'other0.png'"]),
        (lambda names: names.update(MODEL_MAX_LENGTH="8"), ["--model_max_length"]),
        (
            lambda names: names.update(script="finetune", PRETRAIN_MM_MLP_ADAPTER="nowhere.bin"),
            ["nowhere.bin: found no such file", "next: bash scripts/v1_5/pretrain_patchaligned.sh"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else value[-1],
)
def test_what_would_fail_is_named_before_anything_is_trained(
    spoil: Spoil,
    words: list[str],
    variables: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(variables)
    monkeypatch.setattr(preflight, "run_steps", lambda *_: pytest.fail("trained"))
    script = variables.pop("script", "pretrain_patchaligned")
    assert preflight.main(command_of(script, variables)) == 1
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message


def test_a_full_disk_is_found_before_and_after_the_steps(
    variables: dict[str, str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    free = 5_000_000  # bytes; the weights are 1.2 MB, a checkpoint of all of them 3.5 MB, and two lie there at once
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert preflight.main(command_of("finetune", variables)) == 1
    message = capsys.readouterr().err
    assert "found 5.0 MB free, expected" in message
    assert "2 checkpoints" in message
    assert "OUTPUT_DIR" in message

    flags = Namespace(save_strategy="steps", save_steps=10, save_total_limit=3, output_dir=variables["OUTPUT_DIR"])
    preflight.check_room(flags, 20, 1_000_000, 2_000_000)  # 2 saves, and the one that is being written
    with pytest.raises(ValueError, match=r"expected 6\.0 MB for 4 checkpoints of 1\.0 MB"):
        preflight.check_room(flags, 100, 1_000_000, 2_000_000)


@pytest.mark.parametrize(("found", "way_out"), [(0, "next: nvidia-smi"), (4, "next: NUM_GPUS=4")])
def test_too_few_gpus_are_one_sentence(
    found: int, way_out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert preflight.main(command_of("pretrain_patchaligned", {"NUM_GPUS": "8"})) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"found {found} GPUs" in sentence
    assert "expected NUM_GPUS=8" in sentence
    assert way_out in sentence


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"NUM_GPUS": "4"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "2,5"}, 2),
        ({"PRESET": "mini"}, 1),
        ({"PRESET": "mini", "NUM_GPUS": "2"}, 2),
    ],
)
def test_processes_are_those_that_the_command_starts(variables: dict[str, str], processes: int) -> None:
    assert preflight.read_command(command_of("finetune", variables))[1] == processes


@pytest.mark.parametrize(("script", "samples", "steps"), [("pretrain", 558_128, 2181), ("finetune", 665_298, 5198)])
@pytest.mark.parametrize("gpus", ["8", "4"])
def test_the_whole_run_has_the_steps_of_llava(script: str, samples: int, steps: int, gpus: str) -> None:
    flags, processes = preflight.read_command(command_of(script, {"NUM_GPUS": gpus}))
    assert preflight.steps_of_whole_run(flags, samples, processes) == steps


@pytest.mark.parametrize(
    ("variables", "flags", "words"),
    [
        ({}, ["--learning_rat3", "1"], ["found --learning_rat3", "no flag of training"]),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, [], ["found NNODES=2", "NNODES=1"]),
    ],
)
def test_commands_that_cannot_be_checked(
    variables: dict[str, str], flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert preflight.main(command_of("pretrain", variables, *flags)) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_an_unknown_script_is_refused() -> None:
    result = run_script("v1_5/preflight.sh", "analyze")
    assert result.returncode == 1
    assert "unknown script analyze; choose pretrain_patchaligned" in result.stderr


# Stands for a training: logs its steps, and continues from the state that it finds, or begins anew, or fails.
STAND_IN = """
import json, pathlib, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder, last = pathlib.Path(flags["--output_dir"]), int(flags["--max_steps"])
state = folder / "trainer_state.json"
history = json.loads(state.read_text())["log_history"] if state.exists() and sys.argv[1] == "resumes" else []
assert not flags.get("--cache_features")
for step in range(0 if history else int(flags.get("--patch_warmup_steps", 0))):
    assert step < 2, "more than a taste of the warm-up"
    print(f"step {step + 1}/9  patch 1.00", flush=True)
for step in range(len(history) + 1, last + 1):
    history.append({"step": step, "loss": 1 / step})
    print(f"step {step}/{last}  caption {1 / step:.2f}", flush=True)
    if sys.argv[1] == "fails":
        raise ValueError("a loss of nan")
(folder / f"checkpoint-{last}").mkdir(exist_ok=True)
state.write_text(json.dumps({"log_history": history}))
"""


def stand_in(manner: str, output_dir: Path) -> tuple[list[str], Namespace]:
    flags = Namespace(
        output_dir=str(output_dir), use_cpu=True, save_strategy="steps", save_steps=10, save_total_limit=1
    )
    return [sys.executable, "-c", STAND_IN, manner], flags


@pytest.mark.parametrize("more", [[], ["--patch_warmup_steps", "800", "--cache_features", "features"]])
def test_a_run_that_resumes_passes_with_a_short_warm_up_and_no_cache(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, flags = stand_in("resumes", tmp_path / "run")
    preflight.run_steps([*words, *more], flags, 100)
    assert "100 steps" in line_of(capsys.readouterr().out, "whole run")
    assert not list(tmp_path.iterdir())


def test_a_run_that_begins_anew_in_place_of_resuming_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found 10 steps run .* expected steps 7 to 10"):
        preflight.run_steps(*stand_in("begins anew", tmp_path / "run"), 100)
    assert [path.name for path in tmp_path.iterdir()] == ["run.preflight.log"]


def test_a_step_that_fails_is_named_and_its_output_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"after 1 steps: ValueError: a loss of nan; output: .*run\.preflight\.log"):
        preflight.run_steps(*stand_in("fails", tmp_path / "run"), 100)
    (log,) = tmp_path.iterdir()
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\nChildFailedError: \n", "PER_DEVICE_TRAIN_BATCH_SIZE"),
        ("[rank1]: ValueError: one\nsubprocess.CalledProcessError: Command\n", "ValueError: one"),
        ("step 1/9  caption 2.00\nerror: pad.json, record 3\n", "pad.json, record 3"),
        ("Killed\n", "exit code -9"),
    ],
)
def test_the_error_of_a_rank_is_told_from_that_of_its_launcher(output: str, expected: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(output)
    assert expected in preflight.reason(log, -9)


def test_memory_is_the_most_that_nvidia_smi_saw_of_each_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = tmp_path / "done"
    lines = "0, 1000, 81559\n1, 900, 81559\n0, 60000, 81559\n1, 800, 81559\n0, 500, 81559"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{lines}'\ntouch {done}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with preflight.gpu_memory(Namespace(use_cpu=False)) as memory:
        while not done.exists():
            pass
    assert memory == {"0": (60000, 81559), "1": (900, 81559)}
