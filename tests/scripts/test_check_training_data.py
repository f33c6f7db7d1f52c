"""The data check counts what is there, finds images that records name in vain, and says what to run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import check_training_data
from tests.scripts.shell import run_script


def write(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def line_of(lines: list[str], path: str) -> str:
    return next(line for line in lines if line.strip().startswith(path))


def test_empty_data_root_names_every_part_and_how_to_get_it(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    result = run_script("prepare_data.sh", "--check", PATH=path, DRY_RUN="", DATA=str(tmp_path))
    assert result.returncode == 1, result.stderr
    for part in ("blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json", "gqa/images", "vg/VG_100K_2", "PAD/"):
        assert part in result.stdout
    assert "558,128" in result.stdout
    assert "665,298" in result.stdout
    assert "hf download --repo-type dataset liuhaotian/LLaVA-Pretrain" in result.stdout
    assert f"DATA={tmp_path} bash scripts/annotate_pad.sh" in result.stdout
    assert str(tmp_path) in result.stdout


def test_images_that_records_name_in_vain_are_counted(tmp_path: Path) -> None:
    records = [{"id": str(i), "image": f"coco/train2017/{i}.jpg", "conversations": []} for i in range(3)]
    records.append({"id": "text", "conversations": []})
    write(tmp_path / "llava_v1_5_mix665k.json", json.dumps(records))
    write(tmp_path / "coco/train2017/0.jpg")
    write(tmp_path / "coco/train2017/readme.txt")
    lines, commands = check_training_data.check(tmp_path)
    assert line_of(lines, "llava_v1_5_mix665k.json").split()[-2:] == ["665,298", "4"]
    assert line_of(lines, "coco/train2017").split()[-2:] == ["118,287", "1"]
    assert "2 images named by llava_v1_5_mix665k.json are absent, such as 1.jpg" in "\n".join(lines)
    assert any("train2017.zip" in command for command in commands)


def test_stage_1_images_count_from_their_own_folder(tmp_path: Path) -> None:
    stage1 = tmp_path / "LLaVA-Pretrain"
    write(stage1 / "blip_laion_cc_sbu_558k.json", json.dumps([{"id": "a", "image": "0/a.jpg", "conversations": []}]))
    write(stage1 / "images/0/b.jpg")
    lines, commands = check_training_data.check(tmp_path)
    absent = "1 images named by LLaVA-Pretrain/blip_laion_cc_sbu_558k.json are absent, such as 0/a.jpg"
    assert absent in "\n".join(lines)
    assert any("images.zip -d" in command for command in commands)
    write(stage1 / "images/0/a.jpg")
    _, commands = check_training_data.check(tmp_path)
    assert not any("LLaVA-Pretrain/images.zip -d" in command for command in commands)


def test_everything_there_ends_with_status_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        title: [replace(part, expected=1) for part in parts] for title, parts in check_training_data.STAGES.items()
    }
    monkeypatch.setattr(check_training_data, "STAGES", small)
    for part in (part for parts in small.values() for part in parts):
        if part.images_of is None:
            write(tmp_path / part.path, '{"id": "a"}\n' if part.path.endswith(".jsonl") else '[{"id": "a"}]')
        else:
            write(tmp_path / part.path / "0.jpg")
    assert check_training_data.main(["--data", str(tmp_path)]) == 0
    assert "Everything is there." in capsys.readouterr().out
