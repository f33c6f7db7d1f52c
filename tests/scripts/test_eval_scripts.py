"""The evaluation scripts print commands that the real parsers read, with one process per GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from accelerate.commands.launch import launch_command_parser

from eval.benchmarks import choose
from eval.captions.__main__ import app
from eval.captions.references import CAPTION_SETS
from eval.run import argument_parser
from tests.scripts.shell import ROOT, printed, run_script

EVAL = "v1_5/eval"
SCRIPTS = ROOT / "scripts" / EVAL
OF_LMMS_EVAL = sorted(path.stem for path in SCRIPTS.glob("*.sh") if path.stem not in ("common", "captions"))


def parsed(words: list[str]) -> Any:
    """Flags of `python -m eval.run`, read by its parser."""
    assert words[words.index("-m") + 1] == "eval.run"
    return argument_parser().parse_args(words[words.index("-m") + 2 :])


@pytest.mark.parametrize("script", OF_LMMS_EVAL)
def test_each_script_asks_for_benchmarks_that_there_are(script: str) -> None:
    (words,) = printed(
        f"{EVAL}/{script}.sh", "ckpt", "--limit", "4", NUM_GPUS="1", BATCH_SIZE="16", OUTPUT="out", MODEL_BASE="llm"
    )
    assert words[:3] == ["python", "-m", "eval.run"]
    arguments = parsed(words)
    assert (arguments.model_path, arguments.model_base, arguments.output) == ("ckpt", "llm", Path("out"))
    assert (arguments.batch_size, arguments.limit) == (16, 4)
    chosen = choose(arguments.benchmarks.split(","))
    tables = {str(table) for benchmark in chosen for table in benchmark.tables}
    said = (SCRIPTS / f"{script}.sh").read_text().split("set -e")[0]
    assert tables <= set(re.findall(r"\d", said.partition("Table")[2])) or script == "all"


def test_several_gpus_are_one_process_each() -> None:
    """Read by accelerate's own parser."""
    parser = launch_command_parser()
    (words,) = printed(f"{EVAL}/gqa.sh", "ckpt", NUM_GPUS="4", MASTER_PORT="29501")
    assert words[:2] == ["accelerate", "launch"]
    launched = parser.parse_args(words[2:])
    assert (launched.multi_gpu, launched.num_machines, launched.num_processes) == (True, 1, 4)
    assert (launched.main_process_port, launched.mixed_precision, launched.dynamo_backend) == (29501, "no", "no")
    assert (launched.module, launched.training_script) == (True, "eval.run")
    assert parsed(words).benchmarks == "gqa"
    (counted,) = printed(f"{EVAL}/gqa.sh", "ckpt", CUDA_VISIBLE_DEVICES="0,3")
    assert parser.parse_args(counted[2:]).num_processes == 2


def test_the_miniature_runs_its_own_suite_in_one_process_without_gpu() -> None:
    commands = printed(f"{EVAL}/all.sh", "ckpt", PRESET="mini")
    modules = [words[words.index("-m") + 1] for words in commands]
    assert modules == ["playground.mini.make_scenes", "playground.mini.reference_captions", "eval.captions",
                       "playground.mini.evaluation_set", "eval.run"]  # fmt: skip
    assert commands[-1][:4] == ["env", "CUDA_VISIBLE_DEVICES=", "python", "-m"]
    assert parsed(commands[-1]).benchmarks == "mini"
    assert len(printed(f"{EVAL}/all.sh", "ckpt", PRESET="mini", SKIP_CAPTIONS="1")) == 2


@pytest.mark.parametrize("preset", ["full", "mini"])
def test_captions_are_asked_of_the_same_checkpoint(preset: str) -> None:
    *_, words = printed(f"{EVAL}/captions.sh", "ckpt", NUM_GPUS="1", PRESET=preset, MODEL_BASE="llm")
    assert words[words.index("-m") + 1] == "eval.captions"
    options = typer.main.get_command(app).make_context("captions", words[words.index("-m") + 2 :]).params
    assert (options["model_path"], options["model_base"]) == ("ckpt", "llm")
    assert options["benchmark"] in CAPTION_SETS


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ([], {}, "gqa.sh: expected a checkpoint first"),
        (["--limit", "4"], {}, "gqa.sh: expected a checkpoint first"),
        (["c"], {"PRESET": "tiny"}, "unknown PRESET=tiny; choose full or mini"),
        (["c"], {"PRESET": "mini"}, "next: PRESET=mini bash scripts/v1_5/eval/all.sh c"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], variables: dict[str, str], said: str) -> None:
    result = run_script(f"{EVAL}/gqa.sh", *flags, **variables)
    assert result.returncode == 1
    assert said in result.stderr
