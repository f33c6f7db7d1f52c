"""Launch scripts written for LLaVA and transformers 4 are understood; what cannot be trained is refused in words."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    check_projector_rate,
    parse_arguments,
)
from llava.train.assemble import choose_attention, start_engine
from patch_aligned.train.arguments import PatchArguments

SHORT = "--version plain --data_path d.json --image_folder i --vision_tower t --output_dir o --use_cpu True"


def parse(flags: str) -> tuple[ModelArguments, DataArguments, TrainingArguments, Any]:
    return parse_arguments([*flags.split(), "--use_cpu", "True"])


@pytest.mark.parametrize(
    ("flag", "multiplies", "expected"),
    [
        ("", True, (False, False)),
        ("--bf16", True, (True, False)),
        ("--bf16 true", False, (True, False)),
        ("--bf16 False", True, (False, False)),
        ("--bf16 auto", True, (False, True)),  # what is frozen alone
        ("--bf16 auto", False, (False, False)),
        ("--bf16 auto --deepspeed zero2.json", True, (False, False)),  # ZeRO-3 wants one dtype
    ],
)
def test_bf16_is_chosen_for_the_cpu(
    flag: str, multiplies: bool, expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("llava.train.arguments.cpu_multiplies_bf16", lambda: multiplies)
    monkeypatch.chdir(tmp_path)
    Path("zero2.json").write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}))
    training_args = parse(f"{SHORT} {flag}")[2]
    assert (training_args.bf16, training_args.frozen_in_bf16) == expected
    assert replace(training_args).bf16 is expected[0]  # as a warm-up makes them again


def test_another_value_of_bf16_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"{SHORT} --bf16 half")
    assert "--bf16: invalid choice: 'half'" in capsys.readouterr().err


def test_defaults_are_upstreams() -> None:
    model_args, data_args, training_args, _ = parse(SHORT)
    assert (model_args.mm_vision_select_layer, model_args.mm_projector_type) == (-1, "linear")
    assert model_args.mm_use_im_patch_token and not model_args.mm_use_im_start_end
    assert (data_args.image_aspect_ratio, data_args.is_multimodal) == ("square", False)
    assert (training_args.optim, training_args.model_max_length, training_args.bits) == ("adamw_torch", 512, 16)
    assert (training_args.lora_r, training_args.lora_alpha, training_args.lora_dropout) == (64, 16, 0.05)


CONFIG = """
version: plain
data_path: d.json
image_folder: i
vision_tower: t
output_dir: of_the_file
use_cpu: true
save_strategy: no          # a boolean to YAML
learning_rate: 1e-3        # a text to YAML
mm_vision_select_layer: -2
label_names: [labels, more]
gradient_checkpointing_kwargs: {use_reentrant: false}
image_grid_pinpoints: [[336, 672], [672, 336]]
weight_decay:
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "stage 1.yaml"
    path.write_text(CONFIG)
    return path


def test_a_config_file_says_what_the_same_flags_say(config: Path) -> None:
    words = f"{SHORT} --output_dir of_the_file --save_strategy no --learning_rate 1e-3 --mm_vision_select_layer -2"
    flags = [*words.split(), "--label_names", "labels", "more"]
    flags += ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
    flags += ["--image_grid_pinpoints", "[[336, 672], [672, 336]]"]
    expected = parse_arguments(flags)
    found = parse_arguments(["--config", str(config)])
    assert found[:2] == expected[:2]
    changing = {"logging_dir", "run_name"}
    assert {name: value for name, value in found[2].to_dict().items() if name not in changing} == {
        name: value for name, value in expected[2].to_dict().items() if name not in changing
    }
    assert (found[2].learning_rate, found[2].save_strategy, found[2].weight_decay) == (1e-3, "no", 0)
    assert found[2].gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("before", [True, False])
def test_the_command_line_outranks_the_config_file_wherever_it_stands(
    config: Path, before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--learning_rate", "2e-5", "--output_dir=of_the_line", "--seed", "3"]
    *_, training_args, _ = parse_arguments([*flags[: 5 * before], f"--config={config}", *flags[5 * before :]])
    assert (training_args.learning_rate, training_args.output_dir) == (2e-5, "of_the_line")
    assert "the command line replaces learning_rate, output_dir" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat, which is no flag; did you mean learning_rate"),
        ("patch_beta_end: 5", "patch_beta_end, which is no flag"),
        ("- learning_rate", "found no mapping"),
        ("a: [", "found no YAML"),
    ],
)
def test_a_config_file_that_holds_no_flags_is_refused_by_name(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    with pytest.raises(ValueError, match=rf"--config .*stage 1\.yaml: .*{message}"):
        parse_arguments(["--config", str(config)])
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse_arguments(["--config", "none.yaml"])


def test_a_config_file_has_the_flags_of_the_plugin(config: Path) -> None:
    config.write_text(f"{CONFIG}patch_beta_end: 3\n")
    assert parse_arguments(["--config", str(config)], PatchArguments)[3].patch_beta_end == 3


# Arguments of transformers 4.37 that later versions lack and launch scripts of LLaVA and its forks give.
RETIRED = """--overwrite_output_dir False --evaluation_strategy no --warmup_ratio 0.0 --no_cuda True --adafactor False
--local_rank 0"""


def test_retired_flags_parse() -> None:
    parse(f"{SHORT} {RETIRED}")


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--evaluation_strategy no", "eval_strategy", "no"),
        ("--warmup_ratio 1.0", "warmup_steps", pytest.approx(1.0)),
        ("--warmup_ratio 0.5 --warmup_steps 7", "warmup_steps", 7),
        ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
        ("--per_gpu_eval_batch_size 3", "per_device_eval_batch_size", 3),
        ("--adafactor True", "optim", "adafactor"),
        ("--tf32 True", "tf32", None),
    ],
)
def test_a_retired_flag_is_carried_over(flag: str, name: str, value: Any) -> None:
    assert getattr(parse(f"{SHORT} {flag}")[2], name) == value


def test_checkpointing_lets_trained_weights_go_without_gradient() -> None:
    training_args = parse(f"{SHORT} --gradient_checkpointing True")[2]
    assert training_args.ddp_find_unused_parameters is True
    assert training_args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    chosen = f"{SHORT} --gradient_checkpointing True --ddp_find_unused_parameters False"
    assert parse(chosen)[2].ddp_find_unused_parameters is False


@pytest.mark.parametrize(("ratio", "steps"), [("0.03", 30), ("1.0", 1000)])
def test_a_share_of_all_steps_warms_up(ratio: str, steps: int) -> None:
    assert parse(f"{SHORT} --warmup_ratio {ratio}")[2].get_warmup_steps(1000) == steps


def test_the_folder_of_tensorboard_is_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    parse(f"{SHORT} --logging_dir there")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "there"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (SHORT.replace("--version plain", ""), "--version is missing.*--version plain.*--version v1.*known: .*llama_2"),
        (SHORT.replace("plain", "v9"), "--version v9: unknown conversation template; known are .*vicuna_v1"),
        (SHORT.replace("--data_path d.json", ""), "--data_path is missing"),
        (SHORT.replace("--image_folder i", ""), "--image_folder is missing"),
        (SHORT.replace("--output_dir o", ""), "--output_dir is missing"),
        (
            f"{SHORT} --image_aspect_ratio letterbox",
            "--image_aspect_ratio letterbox: training supports square, pad, anyres",
        ),
        (f"{SHORT} --image_aspect_ratio anyres", "--image_grid_pinpoints is missing"),
        (SHORT.replace("--vision_tower t", "--tune_mm_mlp_adapter True"), "there is none without --vision_tower"),
        (f"{SHORT} --tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", "leave nothing to train"),
        (f"{SHORT} --tune_mm_mlp_adapter True --unfreeze_mm_vision_tower True", "would be lost"),
        (f"{SHORT} --tune_mm_mlp_adapter True --lora_enable True", "--lora_enable adapts the LLM"),
        (f"{SHORT} --lora_weight_path a", "add --lora_enable True"),
        (f"{SHORT} --bits 4", "--bits 4: quantised weights cannot be trained. Add --lora_enable True"),
        (f"{SHORT} --fsdp full_shard", "--fsdp.*not supported; shard with --deepspeed"),
        (f"{SHORT} --group_by_length True", "group_by_length"),
        (f"{SHORT} --warmup_ratio 3", "--warmup_ratio 3.0: expected a fraction"),
        (f"{SHORT} --remove_unused_columns True", "would drop the images"),
        (f"{SHORT} --label_smoothing_factor 0.1", "--label_smoothing_factor 0.1: .*without smoothing"),
        (f"{SHORT} --neftune_noise_alpha 5", "--neftune_noise_alpha 5.0: noise"),
        (f"{SHORT} --train_sampling_strategy group_by_length", "group_by_length: .*--group_by_modality_length True"),
        (f"{SHORT} --use_liger_kernel True", "--use_liger_kernel True: Liger has no kernels"),
        (f"{SHORT} --no_such_flag 1", "no_such_flag"),
        (f"{SHORT} --learning_r 1e-3", "learning_r"),
        (f"{SHORT} --evaluation_strategy epoch", "--evaluation_strategy epoch: there is no evaluation"),
    ],
)
def test_what_cannot_be_trained_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(flags.split())


def test_a_rate_that_an_engines_optimizer_would_pass_over_is_refused() -> None:
    def check(rate: float | None, *parts: str) -> None:
        engine = SimpleNamespace(config=dict.fromkeys(parts))
        arguments: Any = SimpleNamespace(mm_projector_lr=rate, deepspeed="z.json", hf_deepspeed_config=engine)
        check_projector_rate(arguments)

    check(2e-5, "zero_optimization")
    check(None, "optimizer")
    with pytest.raises(ValueError, match=r"--mm_projector_lr 2e-05: z.json sets an `optimizer`"):
        check(2e-5, "zero_optimization", "optimizer")


def test_flash_attention_is_given_up_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert choose_attention("auto", "flash_attention_2", parse(SHORT)[2]) == "sdpa"
    assert "sdpa in place of flash_attention_2, as there is no CUDA device" in caplog.text


def test_the_flag_outranks_the_entry_point() -> None:
    training_args = parse(SHORT)[2]
    assert choose_attention("eager", "flash_attention_2", training_args) == "eager"
    assert choose_attention("auto", None, training_args) == "sdpa"
    with pytest.raises(ValueError, match="--attn_implementation flash_attention_2: there is no CUDA device"):
        choose_attention("flash_attention_2", None, training_args)


@pytest.mark.parametrize(
    ("capability", "installed", "half", "reason"),
    [
        ((7, 0), True, True, "older than Ampere"),
        ((8, 0), False, True, "flash-attn is not installed"),
        ((8, 0), True, False, "needs --bf16 True"),
        ((8, 0), True, True, None),
    ],
)
def test_flash_attention_needs_card_package_and_precision(
    monkeypatch: pytest.MonkeyPatch, capability: Any, installed: bool, half: bool, reason: str | None
) -> None:
    from llava.train import assemble

    monkeypatch.setattr(assemble.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(assemble.torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(assemble.torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(assemble, "is_flash_attn_2_available", lambda: installed)
    training_args = parse(SHORT)[2]
    training_args.use_cpu, training_args.bf16 = False, half
    obstacle = assemble.flash_attention_obstacle(training_args)
    assert obstacle is None if reason is None else obstacle is not None and reason in obstacle


def test_deepspeed_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    training_args = parse(SHORT)[2]
    training_args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match="needs a launcher"):
        start_engine(training_args)
