"""The scripts that annotate: what they start parses, and the demonstration runs as it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from patch_aligned.pad import parse_annotation, write_annotations
from tests.scripts.shell import ROOT, options_of, printed, run_script


def test_annotate_pad_starts_a_process_a_gpu_and_merges_to_where_training_looks() -> None:
    annotate, merge, verify = printed("annotate_pad.sh", "--dtype", "float16", NUM_GPUS="4", MODELS="m")
    assert annotate[: annotate.index("patch-aligned")] == [
        "torchrun",
        "--nproc_per_node",
        "4",
        "--standalone",
        "--no_python",
    ]
    options = options_of(annotate)
    assert (options["engine"], options["dtype"], options["ram"]) == (
        "torchrun",
        "float16",
        Path("m/ram_swin_large_14m.pth"),
    )
    assert options["chunk"] == 1024
    assert options_of(verify)["fail_on"] == "broken_file"
    assert options_of(merge)["run"] == options["output"]
    assert options_of(merge)["output"] == options_of(verify)["pad"]
    pretrain = (ROOT / "scripts" / "v1_5" / "pretrain_patchaligned.sh").read_text()
    assert f'"${{PAD_PATH:=$DATA/{"/".join(options_of(merge)["output"].parts[-2:])}}}"' in pretrain


def test_several_machines_share_and_leave_merging_to_a_call_when_all_are_done() -> None:
    environment = {"NNODES": "2", "MASTER_ADDR": "host", "NUM_GPUS": "8", "RAM": "ram_plus"}
    commands = printed("annotate_pad.sh", **environment, NODE_RANK="1")
    assert len(commands) == 1
    assert commands[0][3:7] == ["--nnodes", "2", "--node_rank", "1"]
    assert any(word.endswith("ram_plus_swin_large_14m.pth") for word in commands[0])
    assert len(printed("annotate_pad.sh", **environment, NODE_RANK="0")) == 1
    assert [words[1] for words in printed("annotate_pad.sh")[1:]] == ["merge", "verify"]


def test_a_slurm_task_is_one_process_and_does_not_merge() -> None:
    stray = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "5"}  # of what started the shell that submits, perhaps
    (words,) = printed("slurm/annotate_pad.sbatch", "--ram_tag_list", "other.txt", SLURM_ARRAY_TASK_ID="3", **stray)
    assert words[:5] == ["env", "RANK=3", "WORLD_SIZE=8", "LOCAL_RANK=0", "patch-aligned"]
    assert options_of(words)["ram_tag_list"] == Path("other.txt")
    (words,) = printed("slurm/annotate_pad.sbatch", SLURM_ARRAY_TASK_ID="31", TASKS="32")
    assert words[:4] == ["env", "RANK=31", "WORLD_SIZE=32", "LOCAL_RANK=0"]
    assert "#SBATCH --array=0-7" in (ROOT / "scripts" / "slurm" / "annotate_pad.sbatch").read_text()


def test_other_taggers_and_sam_3_are_started_by_variables() -> None:
    launched = {"NUM_GPUS": "2", "SEGMENTER": "sam3"}
    annotate, *_ = printed("annotate_pad.sh", TAGGER="file", PHRASES="p.jsonl", SAM3="s", **launched)
    options = options_of(annotate)
    assert (options["segmenter"], options["sam3"]) == ("sam3", "s")
    assert (options["tagger"], options["phrases"], options["ram"]) == ("file", Path("p.jsonl"), None)
    server = "http://localhost:8000/v1"
    (words,) = printed(
        "slurm/annotate_pad.sbatch", TAGGER="vlm", VLM="m", VLM_URL=server, SLURM_ARRAY_TASK_ID="3", **launched
    )
    options = options_of(words)
    assert (options["tagger"], options["vlm"], options["vlm_url"]) == ("vlm", "m", server)
    assert options["sam3"] == "facebook/sam3"
    annotate, *_ = printed("annotate_pad.sh", TAGGER="captions", NUM_GPUS="2")
    options = options_of(annotate)
    assert (options["tagger"], options["segmenter"]) == ("captions", "gdino+sam")


def test_a_rank_of_elsewhere_makes_no_task() -> None:
    commands = printed("annotate_pad.sh", RANK="0", WORLD_SIZE="1", SLURM_ARRAY_TASK_ID="4", NUM_GPUS="2")
    assert commands[0][:3] == ["torchrun", "--nproc_per_node", "2"]
    assert len(commands) == 3


def test_missing_weights_are_named_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    result = run_script("annotate_pad.sh", DRY_RUN="", MODELS=str(tmp_path))
    assert result.returncode == 1
    assert f"no file {tmp_path}/ram_swin_large_14m.pth; next: patch-aligned models fetch" in result.stderr


def test_the_benchmark_runs_as_the_documentation_calls_it(run_python: Any) -> None:
    (command,) = re.findall(r"^python (.*benchmarks.*)$", (ROOT / "docs" / "annotation.md").read_text(), re.MULTILINE)
    result = run_python(*shlex.split(command), "--limit", "6")
    assert result.returncode == 0, result.stderr
    assert re.search(r"batched over one at a time, images/s: \d+\.\d\d\n6 images on ", result.stdout)


@pytest.fixture
def truth(tmp_path: Path) -> list[dict[str, Any]]:
    full = "0`0"  # run lengths 0 and 16: all of 4 x 4 pixels
    label = {"tag": "dog", "bbox": [0.0, 0.0, 4.0, 4.0], "rle_mask": full}
    records = [{"image_id": "a.jpg", "size": [4, 4], "caption": "", "labels": [label]}]
    write_annotations(map(parse_annotation, records), tmp_path / "truth.json")
    return records


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "0 differences"),
        (("tag", "cat"), "labels[0]: found 'cat' at [0.0, 0.0, 4.0, 4.0], expected 'dog'"),
        (("rle_mask", "88"), "IoU of masks: mean 0.5000, lowest 0.5000"),
        (("image_id", "b.jpg"), "b.jpg: only in"),
    ],
    ids=["equal", "tag", "mask", "image"],
)
def test_compare_pad_finds_what_differs(
    truth: list[dict[str, Any]], tmp_path: Path, run_python: Any, change: tuple[str, str] | None, said: str
) -> None:
    if change:
        (truth[0] if change[0] == "image_id" else truth[0]["labels"][0])[change[0]] = change[1]
    (tmp_path / "found.json").write_text(json.dumps(truth))
    files = [str(tmp_path / name) for name in ("found.json", "truth.json")]
    result = run_python(str(ROOT / "scripts" / "compare_pad.py"), *files)
    assert said in result.stdout
    assert result.returncode == (1 if change else 0), result.stderr


@pytest.mark.slow
def test_the_demonstration_runs_from_pictures_to_a_checked_data_set(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image is part of the extra `demo`")
    result = run_script(
        "annotate_demo.sh", **os.environ | {"DRY_RUN": "", "RUN": str(tmp_path), "SCENES": "40", "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Killed by SIGKILL" in result.stdout
    assert ", 0 shards are left" not in result.stdout
    assert "The shards are equal, byte for byte." in result.stdout
    assert "0 differences in ids, captions, tags and boxes" in result.stdout
    assert "IoU of masks: mean 1.0000, lowest 1.0000" in result.stdout
    assert (tmp_path / "view.html").is_file()
