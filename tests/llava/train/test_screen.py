"""What a training shows: a line a step with what is logged, and at the end what was written and the next command."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from llava.train.screen import STEP_LINE, TOTAL_GROWS, StepLines
from tests.training import logged

PATCH_LOG = {
    "loss": 4.3, "loss/caption": 2.171, "loss/patch": 0.424, "patch/cosine": 0.591, "patch/contrast": -0.214,
    "patch/beta": 5.0, "learning_rate": 1e-3, "patch/regions": 19.0,
}  # fmt: skip


def lines_of(
    capsys: pytest.CaptureFixture[str], *logs: dict[str, Any], step: int = 1, is_first: bool = True
) -> list[str]:
    lines, state = StepLines(), SimpleNamespace(global_step=step - 1, max_steps=12345, is_world_process_zero=is_first)
    lines.on_train_begin(None, state, None)
    for number, log in enumerate(logs):
        state.global_step = step + number
        lines.on_log(None, state, None, log)
    return capsys.readouterr().out.splitlines()


def test_a_step_with_the_patch_loss_is_one_line_and_the_growing_total_is_explained_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explained, first, second = lines_of(capsys, PATCH_LOG, PATCH_LOG, step=12344)
    assert explained == TOTAL_GROWS
    shown = "  caption 2.17  patch 0.42  cos 0.59  contrast -0.21  beta 5.0  0.0 s  0:00:00 left"
    assert (first, second) == (f"step 12344/12345{shown}", f"step 12345/12345{shown}")
    assert len(first) <= 100 and STEP_LINE.match(first)


def test_without_the_patch_loss_caption_and_rate_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = lines_of(capsys, {"loss": 2.5, "learning_rate": 2e-5})
    assert line.startswith("step     1/12345  caption 2.50  rate 2e-05  ")


def test_what_is_logged_apart_is_shown_and_the_closing_dictionary_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = lines_of(capsys, {"reads": 0.25, "epoch": 1.0}, {"train_runtime": 3.0})
    assert line == "step     1/12345  reads 0.25"


def test_after_ten_steps_a_line_comes_at_most_every_second_and_the_last_one_always(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.train.screen.time", SimpleNamespace(monotonic=lambda: 0.0))
    lines = lines_of(capsys, *[{"loss": 2.5, "learning_rate": 2e-5}] * 13, step=12333)
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [*range(12333, 12343), 12345]


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert not lines_of(capsys, PATCH_LOG, is_first=False)


def test_a_run_shows_its_steps_and_ends_with_what_it_wrote_and_the_next_command(
    run_stage_1: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run_stage_1("run", "--max_steps 3 --disable_tqdm False")
    out, err = capsys.readouterr()
    shown = re.findall(r"^step (\d)/3  caption (\S+)  rate ", out, re.MULTILINE)
    assert shown == [(str(step), f"{loss:.2f}") for step, loss in enumerate(logged(trainer, "loss/caption"), start=1)]
    assert "{" not in out and "3/3 [" not in err
    assert "Wrote run: config.json, mm_projector.bin, run.json, trainer_state.json." in caplog.text
    assert "--model-path run --model-base tiny-vicuna --image-file IMAGE" in caplog.text
