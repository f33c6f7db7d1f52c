"""What a training shows on the screen: a line a step, in place of a progress bar and of whole dictionaries."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from transformers import PrinterCallback, ProgressCallback

STEP_LINE = re.compile(r"step +\d+/\d+  ")
"""Begins each line of a step, for programs that watch a training."""

SHOWN = {
    "loss/caption": "caption {:.2f}",
    "loss/patch": "patch {:.2f}",
    "patch/cosine": "cos {:.2f}",
    "patch/contrast": "contrast {:.2f}",
    "patch/beta": "beta {:.1f}",
}
ALL_SHOWN = 10
"""Steps of a sitting that are all shown. After them comes at most one line a second: a patch warm-up has thousands."""
TOTAL_GROWS = "The total loss grows with beta: watch caption and patch."


def show_steps(trainer: Any) -> None:
    """Let a Trainer show its steps as lines. What it logs to files and trackers stays."""
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(StepLines)


class StepLines(PrinterCallback):
    """Prints a line for each step that is logged, but at most one a second, on the first rank."""

    total_is_explained = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begin = self._last = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line. The closing dictionary of a run is left out."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if "loss" in logs and self._is_too_soon(state):
            return
        if {"loss/caption", "loss/patch"} <= logs.keys() and not self.total_is_explained:
            print(TOTAL_GROWS)
            self.total_is_explained = True
        columns = [f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}", *shown(logs)]
        if "loss" in logs:
            columns += self._times(state.global_step, state.max_steps)
        print("  ".join(columns), flush=True)

    def _is_too_soon(self, state: Any) -> bool:
        is_among_first = state.global_step - self._begin[0] <= ALL_SHOWN
        return not (is_among_first or state.global_step == state.max_steps) and time.monotonic() < self._last[1] + 1

    def _times(self, step: int, max_steps: int) -> list[str]:
        """Return the seconds of a step since the last line, and the time left at the pace of this sitting."""
        now = time.monotonic()
        (first, begin), (before, last) = self._begin, self._last
        self._last = step, now
        left = timedelta(seconds=round((now - begin) / max(step - first, 1) * (max_steps - step)))
        return [f"{(now - last) / max(step - before, 1):.1f} s", f"{left} left"]


def shown(logs: Mapping[str, float]) -> list[str]:
    """Return what the line shows of a log: losses and alignment; without the patch loss the caption loss and the rate;
    all of what is logged without a loss.
    """
    if "loss" not in logs:
        return [f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch"]
    if "loss/patch" not in logs:
        caption = logs.get("loss/caption", logs["loss"])
        return [f"caption {caption:.2f}", f"rate {logs.get('learning_rate', 0):.2g}"]
    return [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]
