"""The flags and values of LLaVA's own launch scripts are read under their names, with nothing edited."""

from __future__ import annotations

import pytest

from llava.train.arguments import parse_arguments

_SHARED = {
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": "-2",
    "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False",
    "bf16": "True",
    "num_train_epochs": "1",
    "per_device_eval_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "evaluation_strategy": "no",
    "save_strategy": "steps",
    "save_total_limit": "1",
    "weight_decay": "0.",
    "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine",
    "logging_steps": "1",
    "tf32": "True",
    "model_max_length": "2048",
    "gradient_checkpointing": "True",
    "dataloader_num_workers": "4",
    "lazy_preprocess": "True",
    "report_to": "wandb",
}
_STAGE_1 = {
    "model_name_or_path": "lmsys/vicuna-13b-v1.5",
    "version": "plain",
    "data_path": "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "image_folder": "./playground/data/LLaVA-Pretrain/images",
    "tune_mm_mlp_adapter": "True",
    "output_dir": "./checkpoints/llava-v1.5-13b-pretrain",
    "per_device_train_batch_size": "32",
    "save_steps": "24000",
    "learning_rate": "1e-3",
}
_STAGE_2 = {
    "model_name_or_path": "lmsys/vicuna-13b-v1.5",
    "version": "v1",
    "data_path": "./playground/data/llava_v1_5_mix665k.json",
    "image_folder": "./playground/data",
    "pretrain_mm_mlp_adapter": "./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": "True",
    "output_dir": "./checkpoints/llava-v1.5-13b",
    "per_device_train_batch_size": "16",
    "save_steps": "50000",
    "learning_rate": "2e-5",
}
_TASK = {
    "model_name_or_path": "liuhaotian/llava-v1.5-13b",  # a LLaVA already, so no projector to start from
    "output_dir": "./checkpoints/llava-v1.5-13b-task",
}
_LORA = {
    "lora_enable": "True",
    "lora_r": "128",
    "lora_alpha": "256",
    "mm_projector_lr": "2e-5",
    "learning_rate": "2e-4",
}
# The first LLaVA's recipes name no projector type (it was linear), no aspect ratio and no grouping.
_FIRST_LLAVA = {
    "model_name_or_path": "./checkpoints/vicuna-v1-3-7b",
    "version": "v1",
    "data_path": "./playground/data/llava_instruct_80k.json",
    "image_folder": "/path/to/coco/train2017",
    "vision_tower": "openai/clip-vit-large-patch14",
    "pretrain_mm_mlp_adapter": "./checkpoints/llava-vicuna-v1-3-7b-pretrain/mm_projector.bin",
    "output_dir": "./checkpoints/llava-vicuna-v1-3-7b-finetune_lora",
    "per_device_train_batch_size": "16",
    "save_steps": "50000",
    "learning_rate": "2e-5",
}


def without(flags: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in flags.items() if name not in names}


FLAGS = {
    "v1_5/pretrain": _SHARED | _STAGE_1,
    "v1_5/finetune": _SHARED | _STAGE_2,
    "v1_5/finetune_lora": _SHARED | _STAGE_2 | _LORA,
    "v1_5/finetune_task": without(_SHARED | _STAGE_2 | _TASK, "pretrain_mm_mlp_adapter"),
    "v1_5/finetune_task_lora": without(_SHARED | _STAGE_2 | _TASK | _LORA, "pretrain_mm_mlp_adapter"),
    "finetune": without(_SHARED | _FIRST_LLAVA, "mm_projector_type"),
    "finetune_lora": without(_SHARED | _FIRST_LLAVA | {"lora_enable": "True"}, "mm_projector_type"),
    "finetune_qlora": without(_SHARED | _FIRST_LLAVA | {"lora_enable": "True", "bits": "4"}, "mm_projector_type"),
}
NEEDS_A_DEVICE = ("bf16", "tf32")


@pytest.mark.parametrize("script", FLAGS)
def test_launch_flags_of_upstream_are_read_unedited(script: str) -> None:
    flags = {name: value for name, value in FLAGS[script].items() if name not in NEEDS_A_DEVICE}
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    model, data, training, _ = parse_arguments([*argv, "--use_cpu", "True"])
    for name, given in flags.items():
        if name in ("warmup_ratio", "evaluation_strategy"):
            continue
        owner = next(part for part in (model, data, training) if hasattr(part, name))
        value = getattr(owner, name)
        if name == "report_to":
            assert value == [given]
        elif isinstance(value, bool):
            assert value == (given == "True"), name
        elif isinstance(value, (int, float)):
            assert value == float(given), name
        else:
            assert value == given, name
    # transformers 5 renamed these two; a share of all steps is what warmup_steps below 1 means there.
    assert training.warmup_steps == pytest.approx(0.03)
    assert training.eval_strategy == "no"
