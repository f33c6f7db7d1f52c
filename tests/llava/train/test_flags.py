"""A wrong command line of training ends before torch is imported, and none that training takes does."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from llava.command import parse_known_flags
from llava.train.flags import DataArguments, ModelArguments, TrainingFlags, check_command_line
from patch_aligned.train.arguments import PatchArguments
from tests.llava.train.conftest import stage_1_flags

CLASSES = (ModelArguments, DataArguments, TrainingFlags)


def test_every_spelling_of_the_trainers_flags_is_known() -> None:
    spellings = [option for action in HfArgumentParser(TrainingArguments)._actions for option in action.option_strings]
    words = [word for word in spellings if word not in ("-h", "--help")]
    assert len(words) > len(dataclasses.fields(TrainingArguments)) > 50
    own = {field.name for kind in CLASSES for field in dataclasses.fields(kind)}
    theirs = [word for word in words if word[2:].replace("-", "_") not in own]
    parse_known_flags(CLASSES, theirs, transformers=["training_args.py"])


def test_flags_of_trl_are_known() -> None:
    trl = pytest.importorskip("trl", reason="trl is part of the extra `train`")
    sources = {"trl": ["trainer/sft_config.py", "trainer/base_config.py"], "transformers": ["training_args.py"]}
    parse_known_flags((), [f"--{field.name}=1" for field in dataclasses.fields(trl.SFTConfig)], **sources)


def test_help_and_wrong_flags_need_no_torch() -> None:
    code = """import runpy, sys
for module in ("llava.train.train", "llava.train.train_mem"):
    for flag in ("--help", "--data_pat"):
        sys.argv = [module, flag]
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            print("ended", end.code, "torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    wrong = "ended error: --data_pat: found no such flag"
    for line, start in zip(re.findall("^ended .*", said, re.MULTILINE), ["ended 0", wrong] * 2, strict=True):
        assert line.startswith(start) and line.endswith(" False")


def test_the_recorded_command_line_passes(golden_world: Path) -> None:
    check_command_line(PatchArguments, argv=[*stage_1_flags("run"), "--local_rank=0", "--no_double_quant"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rat 1", "--learning_rat: found no such flag of training. Did you mean --learning_rate?"),
        ("--data_path no.json", "--data_path no.json: found no such file"),
        ("--image_folder ./nowhere", "--image_folder ./nowhere: found no such"),
        ("--patch_data_path pad.json", "--patch_data_path pad.json: found no such"),
        ("--model_name_or_path ./nowhere", "No checkpoint at ./nowhere"),
        ("--model_name_or_path tiny-vicunia", "No checkpoint at tiny-vicunia: expected a folder with config.json, or a "
         "name on the hub. There is no such folder."),
        ("--vision_tower ./nowhere", "No checkpoint at ./nowhere"),
        ("--vision_tower tiny-clib", "No checkpoint at tiny-clib"),
        ("--model_name_or_path projector", "projector holds a projector alone"),
        ("--version v9", "--version v9: unknown conversation template"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(golden_world: Path, flags: str, message: str) -> None:
    Path("projector").mkdir()
    Path("projector/mm_projector.bin").touch()
    with pytest.raises(SystemExit, match=re.escape(message)):
        check_command_line(PatchArguments, argv=stage_1_flags("run", flags))


def test_other_processes_of_a_machine_leave_it_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_command_line(argv=["--nonsense"])
