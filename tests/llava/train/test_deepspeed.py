"""Two processes under DeepSpeed train as one does, and resume: in both stages, with adapters, sharded either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.llava.train.conftest import stage_1_flags
from tests.training import logged, run_in_two_processes

for package in ("deepspeed", "peft", "bitsandbytes"):
    pytest.importorskip(package, reason=f"{package} is part of the extra `train`")

SAVING = "--save_strategy steps --save_steps 2 --gradient_checkpointing True"
STAGE_2 = (
    "--version v1 --data_path mix.json --tune_mm_mlp_adapter False --image_aspect_ratio pad --learning_rate 2e-4 "
    "--mm_projector_lr 2e-5 --weight_decay 0.01 --num_train_epochs 2 --group_by_modality_length True"
)

LORA = f"{STAGE_2} --lora_enable True --lora_r 4 --lora_alpha 8 --lora_dropout 0"


def write_engine_config(stage: int) -> str:
    """The usual configuration of LLaVA's scripts, with everything left to the Trainer."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    zero |= {"reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": 0}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    batch = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    config = dict.fromkeys(batch, "auto") | {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    Path(f"zero{stage}.json").write_text(json.dumps(config))
    return f"zero{stage}.json"


def write_mixed_data() -> None:
    """Four samples with an image and four without, so that some batches of a rank hold text alone."""
    records = [record for record in json.loads(Path("data_mix.json").read_text()) if record["id"] != "c8"]
    images = [record for record in records if "image" in record][:4]
    texts = [record for record in records if "image" not in record]
    Path("mix.json").write_text(json.dumps([*images, *texts, texts[0] | {"id": "again"}]))


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)


def read_adapter(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(f"{folder}/adapter_model.safetensors"), torch.load(f"{folder}/non_lora_trainables.bin")


KINDS = {
    "pretrain": "",
    "finetune": STAGE_2,
    "half": f"{STAGE_2} --bf16 True",
    "lora": LORA,
    "qlora": f"{LORA} --bits 4",
}


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(run_training: Any) -> None:
    write_mixed_data()
    one = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    singles = {kind: run_training(stage_1_flags(f"{kind}_one", f"{flags} {one}")) for kind, flags in KINDS.items()}

    commands: list[str] = []
    runs: dict[str, str] = {}  # kinds by output folder
    for stage in (2, 3):
        engine = f"--deepspeed {write_engine_config(stage)} --per_device_train_batch_size 2 {SAVING}"
        for kind, flags in KINDS.items():
            if (kind, stage) != ("qlora", 3):  # ZeRO-3 cannot split quantised weights
                runs[f"{kind}_zero{stage}"] = kind
                commands += ["--next", *stage_1_flags(f"{kind}_zero{stage}", f"{flags} {engine}")]
    run_in_two_processes(str(Path(__file__).with_name("train_twice.py")), *commands[1:])

    for run, kind in runs.items():
        first, resumed = json.loads(Path(run, "losses.json").read_text())
        assert resumed == first, run
        # DeepSpeed computes with bfloat16 copies of the weights, whose eight bits take up steps of 2e-4 late.
        assert first == pytest.approx(logged(singles[kind]), rel=2e-2 if kind == "half" else 1e-5), run
        check_files(run, kind)


def check_files(run: str, kind: str) -> None:
    """What a run of two processes saved, and before it was resumed, against what one process saved."""
    finished = (f"{run}_first", run)
    if kind == "pretrain":
        for folder in finished:
            assert_same_weights(torch.load(f"{folder}/mm_projector.bin"), torch.load("pretrain_one/mm_projector.bin"))
        # Of the frozen parts a checkpoint of stage 1 holds nothing: the smallest table alone would take 256 kB.
        saved = [path for path in Path(run, "checkpoint-2").rglob("*") if path.suffix in (".pt", ".bin", ".pth")]
        assert len(saved) >= 6
        assert max(path.stat().st_size for path in saved) < 64_000 * 4
    elif kind == "finetune":
        for folder in finished:
            assert_same_weights(load_file(f"{folder}/model.safetensors"), load_file("finetune_one/model.safetensors"))
    elif kind == "half":
        assert {tensor.dtype for tensor in load_file(f"{run}/model.safetensors").values()} == {torch.bfloat16}
    else:
        for ours, theirs in zip(read_adapter(f"{run}/checkpoint-2"), read_adapter(f"{kind}_one"), strict=True):
            assert ours.keys() == theirs.keys()
        for folder in finished:
            for ours, theirs in zip(read_adapter(folder), read_adapter(f"{kind}_one"), strict=True):
                assert_same_weights(ours, theirs)
