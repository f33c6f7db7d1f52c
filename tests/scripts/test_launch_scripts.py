"""The training scripts print commands that the real argument parser reads as the paper's recipe."""

from __future__ import annotations

import json
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.train.arguments import parse_arguments
from patch_aligned.train.arguments import PatchArguments
from tests.scripts.shell import ROOT, printed, run_script

ADAPTERS = ("finetune_lora", "finetune_qlora")
RECIPES = ("pretrain", "pretrain_patchaligned", "finetune", *ADAPTERS)
GLOBAL_BATCH = {"pretrain": 256, "pretrain_patchaligned": 256} | dict.fromkeys(("finetune", *ADAPTERS), 128)
LEARNING_RATE = {"pretrain": 1e-3, "pretrain_patchaligned": 1e-3, "finetune": 2e-5} | dict.fromkeys(ADAPTERS, 2e-4)


def recipe_words(name: str, *flags: str, **variables: str) -> list[str]:
    """The command that a training script prints."""
    (words,) = printed(f"v1_5/{name}.sh", *flags, **variables)
    return words


def parse(words: list[str]) -> tuple[Any, Any, Any, Any]:
    """Reads a printed command with the parser of training. DeepSpeed and bfloat16 would ask for devices: left out."""
    program = next(i for i, word in enumerate(words) if word.endswith("train_mem.py"))
    argv = words[program + 1 :]
    for flag in ("--deepspeed", "--bf16"):
        if flag in argv:
            at = argv.index(flag)
            del argv[at : at + 2]
    plugin = PatchArguments if words[program].startswith("patch_aligned") else None
    return parse_arguments([*argv, "--use_cpu", "True"], plugin)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NUM_GPUS": "1"},
        {"NUM_GPUS": "4", "GPU": "24g"},
        {"NUM_GPUS": "16"},
        {"GPU": "24g", "LLM": "vicuna13b"},
        {"LLM": "llama31"},
        {"GPU": "24g", "LLM": "llama31"},
        {"PROJECTOR": "cabstractor"},
        {"PROJECTOR": "linear", "PER_DEVICE_TRAIN_BATCH_SIZE": "2"},
        {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head"},
    ],
    ids=lambda variables: "-".join(f"{key}={value}" for key, value in variables.items()) or "defaults",
)
def test_recipe_keeps_its_global_batch_and_hyper_parameters(recipe: str, variables: dict[str, str]) -> None:
    model, data, training, _ = parse(recipe_words(recipe, **variables))
    devices = int(variables.get("NUM_GPUS", 8)) * int(variables.get("NNODES", 1))
    batch = devices * training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert batch == GLOBAL_BATCH[recipe]
    assert training.learning_rate == LEARNING_RATE[recipe]
    assert training.lr_scheduler_type == "cosine"
    assert training.warmup_steps == pytest.approx(0.03)
    assert training.weight_decay == 0
    assert training.num_train_epochs == 1
    assert training.max_steps == -1
    assert training.model_max_length == 2048
    assert model.mm_vision_select_layer == -2
    assert not model.mm_use_im_patch_token
    assert not model.mm_use_im_start_end
    assert model.mm_projector_type == variables.get("PROJECTOR", "mlp2x_gelu")
    assert (model.mm_projector_num_queries, model.mm_projector_depth, model.mm_projector_hidden_size) == (256, 3, 1024)
    stage1 = recipe.startswith("pretrain")
    assert data.image_aspect_ratio == ("square" if stage1 else "pad")
    assert model.tune_mm_mlp_adapter == stage1
    llama = variables.get("LLM") == "llama31"
    assert model.version == ("plain" if stage1 else "llava_llama_3" if llama else "v1")
    assert ("Llama-3.1-8B" in model.model_name_or_path) == llama
    assert training.group_by_modality_length == (not stage1)
    assert training.lora_enable == (recipe in ADAPTERS)
    assert training.bits == (4 if recipe == "finetune_qlora" else 16)
    if training.lora_enable:
        assert (training.lora_r, training.lora_alpha, training.mm_projector_lr) == (128, 256, 2e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_gpus_go_through_deepspeed_in_bfloat16(recipe: str) -> None:
    words = recipe_words(recipe)
    assert words[:3] == ["deepspeed", "--num_gpus", "8"]
    assert words[words.index("--bf16") + 1] == "True"
    assert words[words.index("--tf32") + 1] == "True"
    config = json.loads((ROOT / words[words.index("--deepspeed") + 1]).read_text())
    assert config["zero_optimization"]["stage"] == (3 if recipe in ("finetune", "finetune_lora") else 2)


def test_patch_aligned_differs_from_the_baseline_in_the_patch_flags_alone() -> None:
    baseline, aligned = recipe_words("pretrain"), recipe_words("pretrain_patchaligned")
    patch_flags = [word for word in aligned if word.startswith("--patch_")]
    for flag in patch_flags:
        at = aligned.index(flag)
        del aligned[at : at + 2]
    assert patch_flags
    different = [(a, b) for a, b in zip(baseline, aligned, strict=True) if a != b]
    assert different == [
        ("llava/train/train_mem.py", "patch_aligned/train_mem.py"),
        ("./checkpoints/llava-v1.5-7b-pretrain", "./checkpoints/llava-v1.5-7b-patchaligned-pretrain"),
    ]


def test_patch_loss_takes_the_papers_schedule() -> None:
    *_, patch = parse(recipe_words("pretrain_patchaligned"))
    assert (patch.patch_beta_start, patch.patch_beta_end, patch.patch_min_coverage) == (0, 5, 0.5)


@pytest.mark.parametrize("recipe", ["finetune", *ADAPTERS])
@pytest.mark.parametrize(("choice", "script"), [("patchaligned", "pretrain_patchaligned"), ("captions", "pretrain")])
def test_stage_2_starts_where_stage_1_of_the_same_row_ended(recipe: str, choice: str, script: str) -> None:
    _, _, stage1, _ = parse(recipe_words(script, PROJECTOR="linear"))
    model, _, stage2, _ = parse(recipe_words(recipe, STAGE1=choice, PROJECTOR="linear"))
    assert model.pretrain_mm_mlp_adapter == f"{stage1.output_dir}/mm_projector.bin"
    assert stage2.output_dir != stage1.output_dir


def test_output_folders_of_all_rows_differ() -> None:
    rows = [(recipe, {}) for recipe in ("pretrain", "pretrain_patchaligned")]
    rows += [
        (recipe, {"STAGE1": choice}) for recipe in ("finetune", *ADAPTERS) for choice in ("patchaligned", "captions")
    ]
    folders = set()
    for llm, projector in product(("vicuna7b", "vicuna13b", "llama31"), ("mlp", "linear", "cabstractor")):
        for recipe, stage_1 in rows:
            words = recipe_words(recipe, LLM=llm, PROJECTOR=projector, **stage_1)
            folders.add(words[words.index("--output_dir") + 1])
    assert len(folders) == 72


@pytest.mark.parametrize("recipe", RECIPES)
def test_mini_preset_runs_the_same_script_on_the_processor(recipe: str) -> None:
    words = recipe_words(recipe, PRESET="mini")
    assert words[0] == "python"
    assert "--tf32" not in words
    assert "--deepspeed" not in words
    assert words[words.index("--bf16") + 1] == "False"
    model, _, training, _ = parse(words)
    assert training.use_cpu
    assert training.max_steps > 0
    assert model.version == ("plain" if recipe.startswith("pretrain") else "chatml_direct")
    global_batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert global_batch == (8 if recipe.startswith("pretrain") else 4)


def test_mini_preset_takes_two_processes_and_deepspeed() -> None:
    words = recipe_words("pretrain_patchaligned", PRESET="mini", NUM_GPUS="2", DEEPSPEED="./scripts/zero2.json")
    assert words[:3] == ["torchrun", "--nproc_per_node", "2"]
    assert words[words.index("--deepspeed") + 1] == "./scripts/zero2.json"
    assert words[words.index("--per_device_train_batch_size") + 1] == "4"


def test_flags_after_the_script_win_and_odd_paths_stay_one_word() -> None:
    folder = "/data/my images; rm $HOME"
    words = recipe_words("pretrain", "--learning_rate", "5e-4", IMAGE_FOLDER=folder)
    _, data, training, _ = parse(words)
    assert (training.learning_rate, data.image_folder) == (5e-4, folder)
    pasted = run_script("v1_5/pretrain.sh", IMAGE_FOLDER=folder).stdout
    result = subprocess.run(["bash", "-c", f"printf '%s\\0' {pasted}"], capture_output=True, text=True, check=True)
    assert folder in result.stdout.split("\0")


def test_visible_devices_choose_the_gpus() -> None:
    words = recipe_words("pretrain", CUDA_VISIBLE_DEVICES="2,5")
    assert words[:3] == ["deepspeed", "--include", "localhost:2,5"]
    assert words[words.index("--gradient_accumulation_steps") + 1] == "4"


@pytest.mark.parametrize("variables", [{}, {"CUDA_VISIBLE_DEVICES": "2,5"}, {"PRESET": "mini", "NUM_GPUS": "2"}])
def test_a_second_run_on_a_machine_can_have_a_port_of_its_own(variables: dict[str, str]) -> None:
    assert "--master_port" not in recipe_words("pretrain", **variables)
    words = recipe_words("pretrain", MASTER_PORT="29501", **variables)
    assert words[words.index("--master_port") + 1] == "29501"
    assert words.index("--master_port") < words.index("llava/train/train_mem.py")


@pytest.mark.parametrize(
    ("recipe", "variables", "words"),
    [
        ("pretrain", {"NUM_GPUS": "6"}, ["256", "6 devices", "nearest number that can: 4"]),
        ("pretrain", {"NUM_GPUS": "7"}, ["7 devices", "nearest number that can: 8"]),
        (
            "pretrain",
            {"PER_DEVICE_TRAIN_BATCH_SIZE": "24", "NUM_GPUS": "4"},
            ["=24", "64 samples", "nearest that does: 16"],
        ),
        ("pretrain", {"PROJECTOR": "resampler"}, ["unknown PROJECTOR=resampler", "mlp, linear or cabstractor"]),
        ("pretrain", {"LLM": "gpt2"}, ["unknown LLM=gpt2", "vicuna7b", "llama31"]),
        ("pretrain", {"GPU": "12g"}, ["unknown GPU=12g", "80g or 24g"]),
        ("pretrain", {"PRESET": "tiny"}, ["unknown PRESET=tiny", "mini"]),
        ("pretrain", {"NNODES": "2"}, ["NODE_RANK"]),
        ("finetune", {"NUM_GPUS": "0"}, ["NUM_GPUS=0"]),
        ("finetune", {"NUM_GPUS": "abc"}, ["NUM_GPUS=abc"]),
        ("finetune", {"NUM_GPUS": "2", "GLOBAL_BATCH_SIZE": "-8"}, ["GLOBAL_BATCH_SIZE=-8"]),
        ("finetune", {"NUM_GPUS": "1", "PER_DEVICE_TRAIN_BATCH_SIZE": "0"}, ["PER_DEVICE_TRAIN_BATCH_SIZE=0"]),
        ("finetune", {"NNODES": "none"}, ["NNODES=none"]),
        ("finetune", {"NUM_GPUS": "1", "MODEL_NAME_OR_PATH": "Qwen/Qwen2.5-7B-Instruct"}, ["VERSION", "OUTPUT_DIR"]),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_way_out(
    recipe: str, variables: dict[str, str], words: list[str]
) -> None:
    result = run_script(f"v1_5/{recipe}.sh", **variables)
    assert result.returncode != 0
    assert result.stdout == ""
    assert [word for word in words if word not in result.stderr] == [], result.stderr


@pytest.mark.parametrize(
    ("recipe", "file", "command"),
    [
        ("pretrain", "blip_laion_cc_sbu_558k.json", "prepare_data.sh --check"),
        ("finetune", "mm_projector.bin", "pretrain_patchaligned.sh"),
    ],
)
def test_missing_input_stops_before_anything_is_loaded(recipe: str, file: str, command: str, tmp_path: Path) -> None:
    projector = str(tmp_path / "mm_projector.bin")
    variables = {"DATA": str(tmp_path), "PRETRAIN_MM_MLP_ADAPTER": projector, "PYTHONPATH": str(ROOT)}
    result = run_script(f"v1_5/{recipe}.sh", DRY_RUN="", **variables)
    assert result.returncode == 1
    assert file in result.stderr
    assert command in result.stderr


def test_the_next_step_of_the_miniature_is_the_miniatures() -> None:
    result = run_script("v1_5/finetune.sh", DRY_RUN="", PRESET="mini", STAGE1="captions", DATA="nowhere")
    assert "PRESET=mini bash scripts/v1_5/pretrain.sh" in result.stderr


def test_another_package_of_our_name_is_named(mini_data: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "llava" / "__init__.py"
    other.parent.mkdir()
    other.touch()
    result = run_script("v1_5/pretrain.sh", DRY_RUN="", PRESET="mini", PYTHONPATH=str(tmp_path), **mini_data)
    assert result.returncode == 1
    assert str(other) in result.stderr and str(ROOT / "llava") in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would train")
def test_the_full_preset_without_a_gpu_ends_at_once(mini_data: dict[str, str]) -> None:
    result = run_script("v1_5/pretrain.sh", DRY_RUN="", PYTHONPATH=str(ROOT), **mini_data)
    assert result.returncode == 1
    assert "PRESET=mini" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def mini_data(tmp_path: Path) -> dict[str, str]:
    for name in ("data.json", "images"):
        (tmp_path / name).mkdir()
    return {"DATA_PATH": str(tmp_path / "data.json"), "IMAGE_FOLDER": str(tmp_path / "images")}


def test_shell_scripts_parse() -> None:
    check = 'for script; do bash -n "$script" || exit 1; done'
    scripts = [str(path) for suffix in ("sh", "sbatch") for path in ROOT.glob(f"scripts/**/*.{suffix}")]
    assert len(scripts) > 20
    result = subprocess.run(["bash", "-c", check, "bash", *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_configurations_leave_the_batch_to_the_trainer(name: str) -> None:
    config = json.loads((ROOT / "scripts" / f"{name}.json").read_text())
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == "auto"
    # Either key would replace the Trainer's cosine schedule or its parameter groups.
    assert not {"optimizer", "scheduler"} & config.keys()
    if name == "zero3_offload":
        assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("name", ["NNODES", "NUM_GPUS", "GLOBAL_BATCH_SIZE", "PER_DEVICE_TRAIN_BATCH_SIZE"])
def test_arithmetic_runs_no_command_of_a_variable(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    result = run_script("v1_5/pretrain.sh", **{"NUM_GPUS": "8", name: f"x[$(touch {made})]"})
    assert result.returncode == 1
    assert name in result.stderr
    assert not made.exists()


def test_near_misspellings_of_variables_are_named() -> None:
    result = run_script("v1_5/finetune.sh", NUM_GPUS="1", LEARNING_RAT="1e-3")
    assert result.returncode == 0
    assert "LEARNING_RAT is set" in result.stderr and "LEARNING_RATE?" in result.stderr


def test_another_place_of_the_same_llm_needs_no_template() -> None:
    assert run_script("v1_5/finetune.sh", NUM_GPUS="1", MODEL_NAME_OR_PATH="weights/vicuna-7b-v1.5").returncode == 0
