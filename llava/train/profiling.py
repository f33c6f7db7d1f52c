"""Where the time of training steps goes (`--profile N`): a trace, and a table of the parts of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function, schedule
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

IN_FORWARD = ("tower", "projector", "plugin's losses", "LLM", "loss")
WARM_UP = 2
"""Steps before the profiled ones."""
OPERATORS = 15
"""Operators in the table, those that take the most time."""


class StepProfile(TrainerCallback):
    """Profiles `steps` steps after the first two, on the first rank.

    `OUTPUT_DIR/profile` gets `table.md` and `trace.json.gz`, which https://ui.perfetto.dev shows. Where there is a GPU,
    steps wait for it at the ends of each part, so that its work counts for the part that asked for it.
    """

    profiler: Any = None

    def __init__(self, trainer: Any, steps: int):
        self.trainer, self.steps = trainer, steps
        self.folder = Path(trainer.args.output_dir) / "profile"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the parts of a step, and start.

        Raises:
            ValueError: the run has too few steps.
        """
        left = state.max_steps - state.global_step
        if left < WARM_UP + self.steps:
            raise ValueError(
                f"--profile {self.steps}: found {left} steps to train, expected {WARM_UP} to warm up and {self.steps} "
                "to profile. Give a smaller number, or drop the flag."
            )
        if not state.is_world_process_zero:
            return
        trainer, decoder = self.trainer, self.trainer.model.get_model()
        model = trainer.model.get_model.__self__  # beneath LoRA's wrapper
        name_part(trainer, "get_batch_samples", "data")
        name_part(model, "forward", "forward")
        name_part(decoder, "forward", "LLM")
        name_part(model, "supervised_loss", "loss")
        if model.get_vision_tower() is not None:
            name_part(model.get_vision_tower(), "encode", "tower")
            name_part(decoder.mm_projector, "forward", "projector")
        if trainer.plugin is not None:
            name_part(trainer.plugin, "auxiliary_losses", "plugin's losses")
        name_part(trainer.accelerator, "backward", "backward")
        name_part(trainer.optimizer, "step", "optimizer")
        when = schedule(wait=0, warmup=WARM_UP, active=self.steps, repeat=1)
        self.profiler = profile(schedule=when, on_trace_ready=self.write)
        self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        if self.profiler is not None:
            self.profiler.step()

    def write(self, profiler: Any) -> None:
        """Write trace and table, and log the latter."""
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        events = profiler.key_averages()
        table = table_of_parts({event.key: event.cpu_time_total / 1e3 / self.steps for event in events})
        operators = events.table(sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=40)
        (self.folder / "table.md").write_text(f"{table}\n\n```\n{operators}\n```\n", encoding="utf-8")
        logger.info("Where the time of a step goes, beside a trace in %s:\n%s", self.folder, table)


def name_part(owner: Any, method: str, part: str) -> None:
    """Let the profiler see the calls of an object's method under a name."""
    inner: Callable[..., Any] = getattr(owner, method)

    @wraps(inner)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            result = inner(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

    setattr(owner, method, named)


def table_of_parts(milliseconds: dict[str, float]) -> str:
    """Return a Markdown table of the parts of a step, from the profiler's times by name."""
    step = sum(time for name, time in milliseconds.items() if name.startswith("ProfilerStep"))
    forward = {name: milliseconds[name] for name in IN_FORWARD if name in milliseconds}
    rest = {name: milliseconds[name] for name in ("data", "backward", "optimizer")}
    parts = {
        "data": rest["data"],
        **forward,
        "merge, rest of forward": milliseconds["forward"] - sum(forward.values()),
        "backward": rest["backward"],
        "optimizer": rest["optimizer"],
        "rest of the step": step - milliseconds["forward"] - sum(rest.values()),
    }
    rows = [f"| {name} | {time:,.1f} | {time / step:.1%} |" for name, time in parts.items()]
    return "\n".join(["| part | ms a step | share |", "|---|--:|--:|", *rows])
