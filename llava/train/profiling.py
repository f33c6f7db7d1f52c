"""Where the time of training steps goes (`--profile N`): a trace, and a table of the parts of a step."""

from __future__ import annotations

import logging
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function, schedule
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

IN_FORWARD = ("tower", "projector", "plugin's losses", "LLM", "loss")
WARM_UP, OPERATORS = 2, 15  # steps before those that are profiled, and operators in the table


class StepProfile(TrainerCallback):
    """Profiles `steps` steps after the first two, on the first rank.

    `OUTPUT_DIR/profile` gets `table.md` and `trace.json.gz`, which https://ui.perfetto.dev shows. Where there is a GPU,
    a step waits for it at the end of each part, so that its work counts for the part that asked for it.
    """

    profiler: Any = None

    def __init__(self, trainer: Any, steps: int):
        self.trainer, self.steps = trainer, steps
        self.folder = Path(trainer.args.output_dir) / "profile"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the parts of a step, and start. Raises `ValueError` if the run has too few steps."""
        left, needed = state.max_steps - state.global_step, WARM_UP + self.steps
        if left < needed:
            raise ValueError(f"--profile {self.steps}: found {left} steps to train, expected {needed}; profile fewer.")
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
        """Write trace and table, and log the table."""
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        events = profiler.key_averages()
        table = table_of_parts({event.key: event.cpu_time_total / 1e3 / self.steps for event in events})
        operators = events.table(sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=40)
        (self.folder / "table.md").write_text(f"{table}\n\n```\n{operators}\n```\n", encoding="utf-8")
        logger.info("Where the time of a step goes, beside a trace in %s:\n%s", self.folder, table)


def name_part(owner: Any, method: str, part: str) -> None:
    """Let the profiler see the calls of an object's method under a name."""
    inner = getattr(owner, method)

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
    parts = {
        name: milliseconds[name] for name in ("data", *IN_FORWARD, "backward", "optimizer") if name in milliseconds
    }
    rest = milliseconds["forward"] - sum(parts.get(name, 0) for name in IN_FORWARD)
    parts |= {"merge, rest of forward": rest, "rest of the step": step - sum(parts.values()) - rest}
    rows = [f"| {name} | {time:,.1f} | {time / step:.1%} |" for name, time in parts.items()]
    return "\n".join(["| part | ms a step | share |", "|---|--:|--:|", *rows])
