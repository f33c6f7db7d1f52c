"""`patch-aligned train`: both arms from one start, exact resuming, and an output that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models
from patch_aligned.cli import app
from patch_aligned.intervals import Resampling
from patch_aligned.models.reads import measure_reads, open_reader, read_captions, reads_metrics
from patch_aligned.models.stitch import stitch
from tests.patch_aligned.train.world import SIZE, sample_of

GOLDENS = Path(__file__).parents[2] / "goldens" / "llava"
SETTINGS = {
    "per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "use_cpu": True,
    "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "seed": 7,
}  # fmt: skip
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]

pytest.importorskip("trl", reason="trl is part of the extra `train`")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny stitched LLaVA, images and a PAD file."""
    root = tmp_path_factory.mktemp("world")
    stitch(str(GOLDENS / "tiny-clip"), str(GOLDENS / "tiny-vicuna"), "llava", root / "model")
    (root / "images").mkdir()
    write_pad(root / "pad.jsonl", [record_of(number, root / "images") for number in range(8)])
    return root


def record_of(number: int, images: Path) -> dict[str, Any]:
    sample = sample_of(number)
    sample["images"][0].save(images / f"{number}.png")
    labels = [
        {"tag": region["tag"], "rle_mask": region["rle_mask"], "bbox": [0, 0, 9, 9]} for region in sample["regions"]
    ]
    caption = " and ".join(label["tag"] for label in labels)
    return {"image_id": f"{number}.png", "size": list(SIZE), "caption": caption, "labels": labels}


def write_pad(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(tmp_path_factory.getbasetemp() / "pad_cache"))


def run(world: Path, output: Path, *flags: str, data: str = "pad.jsonl", images: str = "images") -> Any:
    words = ["train", str(world / "model"), "--data", str(world / data), "--images", str(world / images)]
    return CliRunner().invoke(app, [*words, "--output_dir", str(output), *FLAGS, *flags])


def trained(world: Path, output: Path, *flags: str, data: str = "pad.jsonl") -> Path:
    result = run(world, output, *flags, data=data)
    assert result.exit_code == 0, result.output
    return output


def losses(output: Path, name: str = "loss", step: int = 6) -> list[float]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [line[name] for line in state["log_history"] if name in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(output).state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, weight in one.items() if not torch.equal(weight, other[name])]


@pytest.fixture(scope="module")
def aligned(world: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCH_ALIGNED_CACHE", str(world / "cache"))
        return trained(world, world / "aligned")


def test_both_arms_start_alike_and_beta_0_is_the_baseline(world: Path, aligned: Path, tmp_path: Path) -> None:
    captions = trained(world, tmp_path / "captions", "--captions_only")
    zero = trained(world, tmp_path / "zero", "--patch_beta_end", "0")
    assert losses(captions)[0] == losses(aligned)[0] == pytest.approx(losses(aligned, "loss/caption")[0], rel=1e-5)
    assert losses(aligned, "patch/beta") == [0, 1, 2, 3, 4, 5]
    assert losses(captions) == losses(zero) != losses(aligned)
    assert_equal(weights(captions), weights(zero))
    assert not losses(captions, "loss/patch")


def test_a_run_that_was_killed_resumes_exactly(world: Path, aligned: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(aligned / "checkpoint-3", killed / "checkpoint-3")
    record = json.loads((aligned / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps(record))
    trained(world, killed)
    assert losses(killed) == losses(aligned) and losses(killed, "loss/patch") == losses(aligned, "loss/patch")
    assert_equal(weights(killed), weights(aligned))
    assert len(json.loads((killed / "run.json").read_text())["sittings"]) == 2

    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    again = run(world, killed)
    assert again.exit_code == 0 and "6 of 6" in again.output
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before

    other = run(world, killed, "--captions_only")
    assert other.exit_code == 2 and "captions_only" in other.output


def test_the_output_is_a_plain_model_of_which_the_projector_alone_is_new(world: Path, aligned: Path) -> None:
    before, after = weights(world / "model"), weights(aligned)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)
    assert_equal(load_file(aligned / "projector.safetensors"), {name: after[name] for name in changed})
    model, processor = AutoModelForImageTextToText.from_pretrained(aligned), AutoProcessor.from_pretrained(aligned)
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    inputs = processor(text=prompt, images=sample_of(0)["images"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    card = ModelCard.load(aligned / "README.md")
    assert card.data.base_model == str(world / "model")
    assert "loss/patch" in card.text and "| seed | 7 |" in card.text


def test_reads_of_held_out_captions_are_those_of_the_command_and_change_nothing_else(
    world: Path, tmp_path: Path
) -> None:
    records = [record_of(number, world / "images") for number in range(24)]
    records[3]["caption"] = " "
    write_pad(world / "more.jsonl", records)
    flags = ("--eval_reads_steps", "4", "--eval_reads_captions", "18", "--patch_warmup_steps", "1")
    reading = trained(world, tmp_path / "reading", *flags, data="more.jsonl")
    captions = read_captions(reading / "held_out.jsonl")
    held_out = {caption.image_id for caption in captions}
    assert len(held_out) == 18 and "3.png" not in held_out

    state = json.loads((reading / "checkpoint-6" / "trainer_state.json").read_text())
    logged = {line["step"]: line for line in state["log_history"] if "reads" in line}
    assert list(logged) == [0, 4, 6]
    rows = measure_reads(open_reader(str(reading)), captions, world / "images")
    found = reads_metrics(rows, Resampling()).loc["reads_per_caption"]
    assert [logged[6][name] for name in ("reads", "reads/low", "reads/high")] == pytest.approx(found[:3].tolist())
    assert logged[6]["reads/low"] < logged[6]["reads"] < logged[6]["reads/high"]

    write_pad(world / "less.jsonl", [record for record in records if record["image_id"] not in held_out])
    silent = trained(world, tmp_path / "silent", "--patch_warmup_steps", "1", data="less.jsonl")
    assert losses(silent) == losses(reading)
    assert_equal(weights(silent), weights(reading))


@pytest.mark.parametrize(
    "arm", [(), ("--captions_only", "--gradient_accumulation_steps", "2")], ids=["patch", "captions"]
)
def test_align_of_held_out_images_is_that_of_an_analysis_and_changes_nothing_else(
    world: Path, tmp_path: Path, arm: tuple[str, ...]
) -> None:
    flags = ("--eval_align_steps", "4", "--eval_align_images", "2", "--patch_picture_steps", "3", *arm)
    watched = trained(world, tmp_path / "watched", *flags)
    state = json.loads((watched / "checkpoint-6" / "trainer_state.json").read_text())
    logged = {line["step"]: line for line in state["log_history"] if "eval/align" in line}
    assert list(logged) == [0, 4, 6]
    columns = [json.loads(line) for line in (watched / "patch_pictures.jsonl").read_text().splitlines()]
    assert [column["step"] for column in columns] == [0, 3, 6]
    held_out = {image_id for image_id, _ in columns[0]["of"]}
    records = [record_of(number, world / "images") for number in range(8)]
    assert len(held_out) == 2

    write_pad(tmp_path / "held_out.jsonl", [record for record in records if record["image_id"] in held_out])
    settings = AnalysisSettings(MeasureSettings(tmp_path / "held_out.jsonl", world / "images"), Resampling(2), ())
    found = analyse(load_models((f"p={watched}",)), settings).models["p"].metrics["value"]
    for key, name in (("align", "align_px"), ("contrast", "contrast"), ("retrieval", "retrieval_top1")):
        # An analysis resizes images by PIL, this training by the processor's default, torchvision.
        assert logged[6][f"eval/{key}"] == pytest.approx(found[name], rel=1e-3), key

    write_pad(world / "others.jsonl", [record for record in records if record["image_id"] not in held_out])
    silent = trained(world, tmp_path / "silent", *arm, data="others.jsonl")
    assert losses(silent) == losses(watched) and losses(silent, "entropy") == losses(watched, "entropy")
    assert_equal(weights(silent), weights(watched))


def test_all_weights_train_on_request(world: Path, tmp_path: Path) -> None:
    output = trained(
        world,
        tmp_path / "all",
        "--train_what",
        "all",
        "--max_steps",
        "1",
        "--learning_rate",
        "0.1",
        "--warmup_steps",
        "0",
    )
    before, after = weights(world / "model"), weights(output)
    changed = {name.split(".")[1] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {"multi_modal_projector", "language_model"} <= changed
    assert not (output / "projector.safetensors").exists()


def test_a_config_file_trains_what_its_flags_train(world: Path, aligned: Path, tmp_path: Path) -> None:
    places = {"model": "model", "data": "pad.jsonl", "images": "images"}
    settings = {name: str(world / place) for name, place in places.items()} | SETTINGS | {"max_steps": 60}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(tmp_path / "run.yaml"), "--max_steps", "6", "--output_dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run") == losses(aligned)


def test_wrong_input_is_named_before_the_first_step(world: Path, tmp_path: Path) -> None:
    record = record_of(0, world / "images")
    write_pad(world / "empty.jsonl", [])
    (world / "misspelt.yaml").write_text("eval_read_steps: 4")
    write_pad(world / "no_caption.jsonl", [{key: record[key] for key in record if key != "caption"}])
    write_pad(world / "silent.jsonl", [record | {"caption": " "}])
    for flags, places, expected in (
        ((), {"images": "elsewhere"}, "elsewhere: found no such file or folder"),
        ((), {"images": "."}, "found no 0.png"),
        ((), {"data": "absent.jsonl"}, "absent.jsonl"),
        ((), {"data": "empty.jsonl"}, "found no records"),
        ((), {"data": "no_caption.jsonl"}, "caption"),
        (("--captions_only",), {"data": "silent.jsonl"}, "found an empty caption"),
        (("--patch_regions_only_ratio", "1"), {}, "--patch_regions_only_ratio"),
        (("--config", str(world / "misspelt.yaml")), {}, "which is no flag; did you mean eval_reads_steps"),
        (("--eval_reads_steps", "1"), {}, "found 8 captions"),
    ):
        result = run(world, tmp_path / "out", *flags, **places)
        assert result.exit_code == 2, (expected, result.output)
        assert expected in " ".join(result.output.split())
    assert not list(tmp_path.glob("out/checkpoint*"))
