"""Checkpoints hold all that a run needs to go on, and no more, and are never half written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava.train import phases
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.checkpointing import (
    check_state_files,
    checkpoint_to_resume,
    last_complete_checkpoint,
    load_projector_weights,
    publish_checkpoint,
    safe_save_model_for_hf_trainer,
    save_projector,
)
from llava.train.llava_trainer import LLaVATrainer
from llava.train.phases import describe_run
from tests.folders import set_config
from tests.llava.train.conftest import stage_1_flags
from tests.training import logged

# Four samples, three epochs: saved in the middle of an epoch, and of a logging window.
LONG_RUN = "--per_device_train_batch_size 1 --num_train_epochs 3 --save_strategy steps --save_steps 3 --logging_steps 2"


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without what a clock measured."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "train_runtime" not in entry]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run_stage_1: Any) -> None:
    run_stage_1("whole", LONG_RUN)

    command = [sys.executable, str(Path(__file__).with_name("killed_run.py")), *stage_1_flags("killed", LONG_RUN)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in Path("killed").glob("checkpoint-*")] == ["checkpoint-3"]
    run_stage_1("killed", LONG_RUN)

    assert history(Path("killed")) == history(Path("whole"))
    whole, resumed = (torch.load(f"{name}/mm_projector.bin") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not Path("killed/.unfinished").exists()


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for entry in values for tensor in tensors_in(entry)]


def test_a_checkpoint_of_stage_1_holds_nothing_of_the_frozen_parts(run_stage_1: Any) -> None:
    trainer = run_stage_1("run", "--save_strategy steps --save_steps 1 --save_total_limit 2")
    assert {path.name for path in Path("run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    folder = Path("run/checkpoint-5")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "mm_projector.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < names
    trained = sum(param.numel() for param in trainer.model.parameters() if param.requires_grad)
    weights = torch.load(folder / "mm_projector.bin")
    moments = torch.load(folder / "optimizer.pt")["state"]
    assert sum(tensor.numel() for tensor in tensors_in(weights)) == trained
    assert sum(tensor.numel() for tensor in tensors_in(moments)) <= 2 * trained + 4  # two moments, one counter each
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 4 * trained + 50_000


ONE_STEP = "--per_device_train_batch_size 1 --save_strategy steps --save_steps 1 --max_steps 1"
TWO_STEPS = f"{ONE_STEP} --max_steps 2"


def test_data_in_another_order_and_another_model_are_refused(
    run_stage_1: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_stage_1("run", ONE_STEP)
    Path("other.json").write_text(json.dumps(json.loads(Path("data_plain.json").read_text())[::-1]))
    before = contents("run")
    for flags, named in {
        "--data_path other.json": r"data_path: data_plain.json \(sha256",
        "--gradient_accumulation_steps 2": "global_batch_size: 1 before, 2 now",
        "--seed 7": "seed: 42 before, 7 now",
        "--data_seed 7": "data_seed: None before, 7 now",
        "--version v1": "version: ",
        "--pretrain_mm_mlp_adapter run/mm_projector.bin": "pretrain_mm_mlp_adapter: ",
    }.items():
        with pytest.raises(ValueError, match=f"run holds another run, up to checkpoint-1.*{named}"):
            run_stage_1("run", f"{TWO_STEPS} {flags}")
    assert contents("run") == before
    resumed = run_stage_1("other", f"{TWO_STEPS} --version v1 --resume_from_checkpoint run/checkpoint-1")  # asked for
    assert resumed.state.global_step == 2
    set_config("tiny-vicuna", rope_theta=1e6)  # another LLM of the same name
    with pytest.raises(ValueError, match=r"holds another run.*model_name_or_path: "):
        run_stage_1("run", TWO_STEPS)
    Path("run/run.json").unlink()  # as in folders of earlier versions
    run_stage_1("run", f"{TWO_STEPS} --data_seed 7")
    assert "samples will be repeated" in caplog.text


def test_another_rate_is_named_and_recorded(run_stage_1: Any, caplog: pytest.LogCaptureFixture) -> None:
    run_stage_1("run", ONE_STEP)
    run_stage_1("run", f"{TWO_STEPS} --learning_rate 5e-4")
    assert "learning_rate: 0.001 before, 0.0005 now" in caplog.text
    record = json.loads(Path("run/run.json").read_text())
    assert [sitting["changed"] for sitting in record["sittings"]] == [
        {},
        {"learning_rate": [0.001, 0.0005], "max_steps": [1, 2]},
    ]
    assert record["flags"]["learning_rate"] == 0.0005 and all(sitting["ended"] for sitting in record["sittings"])
    caplog.clear()
    assert run_stage_1("run", TWO_STEPS) is None  # finished
    assert "learning_rate: 0.0005 before, 0.001 now" in caplog.text


def test_other_spellings_of_the_same_files_resume_the_same_run(
    run_stage_1: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_stage_1("run", ONE_STEP)
    shutil.copytree("tiny-vicuna", "moved/tiny-vicuna")
    shutil.copyfile("data_plain.json", "moved/copy.json")
    Path("images/README.md").touch()
    spelled = (
        f"--model_name_or_path ./moved/tiny-vicuna/ --data_path {Path.cwd()}/moved/copy.json --image_folder images/"
    )
    trainer = run_stage_1("run/", f"{TWO_STEPS} {spelled}")
    assert trainer.state.global_step == 2
    (named,) = [entry.message for entry in caplog.records if "Changed since" in entry.message]
    assert "max_steps" in named and not any(word in named for word in ("model", "data", "image"))


def test_the_first_rank_alone_hashes_and_writes(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ModelArguments("tiny-vicuna"), DataArguments("data_plain.json"), TrainingArguments("run", use_cpu=True)
    assert describe_run(*arguments, None, False).run["sha256"].keys() == {"data_path", "model_name_or_path"}
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    monkeypatch.setattr(phases, "sha256", lambda path: pytest.fail(f"{path} was hashed"))
    describe_run(*arguments, None, False).begin()
    assert not Path("run").exists()


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("length", ["--num_train_epochs 3", "--max_steps 3", "--num_train_epochs 0.7"])
def test_a_finished_run_is_left_as_it_is(run_stage_1: Any, length: str, caplog: pytest.LogCaptureFixture) -> None:
    flags = f"--save_strategy steps --save_steps 2 --save_total_limit 1 --per_device_train_batch_size 1 {length}"
    trainer = run_stage_1("run", flags)
    steps = trainer.state.global_step
    before = contents("run")
    caplog.set_level("INFO", "llava")
    assert run_stage_1("run", flags) is None
    assert contents("run") == before
    assert f"{steps} of {steps} steps" in caplog.text


def test_a_run_killed_while_it_saved_its_weights_saves_them(run_stage_1: Any) -> None:
    flags = "--save_strategy steps --save_steps 2 --per_device_train_batch_size 1 --max_steps 3"
    first = run_stage_1("run", flags)
    weights = Path("run/mm_projector.bin")
    before = torch.load(weights)
    Path("run/trainer_state.json").unlink()
    weights.unlink()
    again = run_stage_1("run", flags)
    assert logged(again) == logged(first) and again.state.global_step == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in torch.load(weights).items())


@pytest.mark.parametrize("stage", ["", "--version v1 --data_path data_mix.json --tune_mm_mlp_adapter False"])
def test_a_disk_too_full_for_the_last_checkpoint_does_not_cost_the_result(
    run_stage_1: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{stage} --save_strategy steps --save_steps 1 --max_steps 2 --per_device_train_batch_size 1"
    run_stage_1("whole", flags)
    save = LLaVATrainer._save_optimizer_and_scheduler

    def save_while_there_is_room(trainer: Any, folder: str) -> None:
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(trainer, folder)

    monkeypatch.setattr(LLaVATrainer, "_save_optimizer_and_scheduler", save_while_there_is_room)
    with pytest.raises(OSError, match=r"No space left on device.* GB.*checkpoint-1 is complete"):
        run_stage_1("run", flags)
    name = "model.safetensors" if stage else "mm_projector.bin"
    assert (Path("run") / name).read_bytes() == (Path("whole") / name).read_bytes()
    assert Path("run/config.json").read_bytes() == Path("whole/config.json").read_bytes()
    assert run_stage_1("run", flags) is None


def test_a_trained_tower_is_saved_and_goes_on(golden_world: Path, run_stage_1: Any) -> None:
    flags = (
        "--version v1 --data_path data_mix.json --tune_mm_mlp_adapter False --unfreeze_mm_vision_tower True "
        "--num_train_epochs 2 --save_strategy steps --save_steps 2"
    )
    whole = run_stage_1("run", flags)
    at_end = load_file("run/model.safetensors")
    prefix, name = "model.vision_tower.vision_tower.", "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(at_end[prefix + name], load_file("tiny-clip/model.safetensors")[name])
    shutil.rmtree(f"run/checkpoint-{whole.state.global_step}")
    Path("run/trainer_state.json").unlink()  # as after a kill
    assert Path("run/checkpoint-2").is_dir() and whole.state.global_step > 2
    resumed = run_stage_1("run", flags)
    assert logged(resumed) == logged(whole)
    resumed_end = load_file("run/model.safetensors")
    assert all(torch.equal(resumed_end[name], tensor) for name, tensor in at_end.items())


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "mm_projector.bin"):
        (folder / name).touch()
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_the_last_complete_checkpoint_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_complete_checkpoint(tmp_path / "none") is None
    complete(tmp_path / "checkpoint-9")
    ten = complete(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path) == ten  # by number, not by name
    half = tmp_path / "checkpoint-11"  # as upstream leaves them: weights alone
    half.mkdir()
    (half / "mm_projector.bin").touch()
    assert last_complete_checkpoint(tmp_path) == ten
    assert "checkpoint-11 is skipped" in caplog.text and "trainer_state.json" in caplog.text
    complete(tmp_path / "checkpoint-tmp")
    assert last_complete_checkpoint(tmp_path) == ten


@pytest.mark.parametrize("broken", ["optimizer.pt", "mm_projector.bin", "trainer_state.json"])
def test_each_part_of_a_checkpoint_is_needed(tmp_path: Path, broken: str) -> None:
    (complete(tmp_path / "checkpoint-1") / broken).unlink()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_cut_off_state_file_counts_as_missing(tmp_path: Path) -> None:
    (complete(tmp_path / "checkpoint-1") / "trainer_state.json").write_text('{"epoch": 1')
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_named_must_be_complete(tmp_path: Path) -> None:
    nine, ten = complete(tmp_path / "checkpoint-9"), complete(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(None, tmp_path) == ten
    assert checkpoint_to_resume(str(nine), tmp_path) == nine
    (nine / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-9: it lacks optimizer.pt or latest"):
        checkpoint_to_resume(str(nine), tmp_path)
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint True: it lacks .*leave the flag out"):
        checkpoint_to_resume("True", tmp_path)


def test_publishing_replaces_an_older_checkpoint_of_the_name(tmp_path: Path) -> None:
    old = complete(tmp_path / "checkpoint-1")
    staged = complete(tmp_path / ".unfinished" / "checkpoint-1")
    (staged / "new").touch()
    publish_checkpoint(staged, old)
    assert (old / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


class TinyModel(nn.Module):
    def __init__(self, width: int, **config: Any):
        super().__init__()
        self.mm_projector = nn.Linear(2, width)
        self.embed_tokens = nn.Embedding(3, width)
        self.config = SimpleNamespace(**config)


def test_the_projector_comes_back_as_saved(tmp_path: Path) -> None:
    model, other = TinyModel(3), TinyModel(3)
    save_projector(model, tmp_path / "mm_projector.bin", is_writer=True)
    load_projector_weights(other, tmp_path / "mm_projector.bin")
    assert torch.equal(model.mm_projector.weight, other.mm_projector.weight)
    assert not torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["mm_projector.bin"]


def test_word_embeddings_go_along_where_stage_1_trains_them(tmp_path: Path) -> None:
    model, other = TinyModel(3, mm_use_im_start_end=True), TinyModel(3, mm_use_im_start_end=True)
    save_projector(model, tmp_path / "mm_projector.bin", is_writer=True)
    load_projector_weights(other, tmp_path / "mm_projector.bin")
    assert torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)


def test_a_projector_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_projector(TinyModel(3), tmp_path / "mm_projector.bin", is_writer=True)
    with pytest.raises(ValueError, match=r"mm_projector.bias: model \(4,\), file \(3,\)"):
        load_projector_weights(TinyModel(4), tmp_path / "mm_projector.bin")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    save_projector(TinyModel(3), tmp_path / "mm_projector.bin", is_writer=False)
    assert not list(tmp_path.iterdir())


def test_saving_into_a_checkpoint_folder_keeps_upstreams_place(tmp_path: Path) -> None:
    trainer = SimpleNamespace(saves_projector_only=True, model=TinyModel(3), args=SimpleNamespace(should_save=True))
    safe_save_model_for_hf_trainer(trainer, str(tmp_path / "checkpoint-7"))
    assert (tmp_path / "mm_projector" / "checkpoint-7.bin").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "global_step1/mp_rank_00_model_states.pt"])
def test_code_in_a_checkpoint_is_not_run(run_stage_1: Any, name: str) -> None:
    (complete(Path("run/checkpoint-1")) / "global_step1").mkdir()
    Path("run/checkpoint-1/latest").write_text("global_step1")
    Path("run/checkpoint-1/optimizer.pt").unlink()
    torch.save({"state": Payload()}, Path("run/checkpoint-1", name))
    with pytest.raises(ValueError, match=Path(name).name):
        run_stage_1("run", "--save_strategy steps")
    assert not Path("ran").exists()


class Attribute:
    """Pickled as early releases of Python 3.11 pickle the member of an enum."""

    def __init__(self, *of: Any) -> None:
        self.of = of

    def __call__(self) -> None:
        raise AssertionError

    def __reduce__(self) -> Any:
        return getattr, self.of


class Call(Attribute):
    def __reduce__(self) -> Any:
        return Attribute(*self.of), ()


def test_members_of_deepspeeds_enums_are_read_and_no_other_attribute(tmp_path: Path) -> None:
    enum = pytest.importorskip("deepspeed.runtime.zero.config", reason="needs the extra `train`").ZeroStageEnum
    folder = complete(tmp_path / "checkpoint-1")
    torch.save({"stage": Attribute(enum, "gradients")}, folder / "optimizer.pt")
    check_state_files(folder)
    for refused in (
        Attribute(enum, "__init_subclass__"),
        Attribute(Attribute(enum, "gradients"), "name"),
        Attribute(OrderedDict, "fromkeys"),
        Call(enum, "gradients"),
    ):
        torch.save({"stage": refused}, folder / "optimizer.pt")
        with pytest.raises(ValueError, match=r"optimizer\.pt"):
            check_state_files(folder)


def test_deepspeeds_files_stay_in_the_checkpoint(tmp_path: Path) -> None:
    folder = complete(tmp_path / "checkpoint-1")
    (folder / "optimizer.pt").unlink()
    for tag in ("..", "../elsewhere", "/elsewhere"):
        (folder / "latest").write_text(tag)
        with pytest.raises(ValueError, match=r"latest: found"):
            check_state_files(folder)


def test_a_spoiled_run_goes_on_from_the_last_good_checkpoint(run_stage_1: Any) -> None:
    flags = (
        "--save_strategy steps --save_steps 1 --per_device_train_batch_size 1 --max_steps 4 "
        "--lr_scheduler_type constant_with_warmup --warmup_steps 2"
    )
    with pytest.raises(ValueError, match=r"Step 2: .*run/checkpoint-1\b"):
        run_stage_1("run", f"{flags} --learning_rate 1e38")
    assert {path.name for path in Path("run").glob("*checkpoint-*")} == {"checkpoint-1", "spoiled-checkpoint-2"}
    again = run_stage_1("run", f"{flags} --learning_rate 1e-3")
    assert again.state.global_step == 4
    rates = [entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3])


def test_weights_that_are_not_finite_are_not_saved(run_stage_1: Any) -> None:
    trainer = run_stage_1("run", "--max_steps 1")
    next(param for param in trainer.model.parameters() if param.requires_grad).data[0] = torch.inf
    with pytest.raises(ValueError, match="Step 1"):
        trainer.save_model("spoiled")
    assert not Path("spoiled").exists()
