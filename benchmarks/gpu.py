"""What a machine with one GPU measures in a few minutes; `bash benchmarks/gpu.sh` calls this.

A part is a function, run in a process of its own with its share of the time. It adds rows to `rows.jsonl` as it
measures, and the table is written again after each, so that a run that is cut off leaves what it has. `speedup` is a
row's rate over that of its baseline, a row of the same run. The parts are in gpu_parts.py.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpu_parts import PARTS
from measuring import ROOT, command_line, describe_machine, median_seconds

SECONDS = 520
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pycocotools", "flash-attn")
PRELOADED = ["torch", "transformers", "llava.model"]  # not what imports bitsandbytes, which touches the card
PEAK_TFLOPS = {  # dense bfloat16, as NVIDIA states it
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
}

Status = Literal["ok", "skipped", "missing", "out of memory", "failed", "cut off"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    name: str
    status: Status = "ok"  # `missing` names a package that is not installed; `cut off` ran out of its time
    seconds: float | None = None  # of one run, the median of several
    rate: float | None = None  # `unit` a second
    unit: str | None = None
    baseline: str | None = None  # name of the row that `speedup` compares with
    speedup: float | None = None  # rate over the baseline's
    peak_gib: float | None = None  # most memory that torch held on the card, weights included
    peak_share: float | None = None  # operations that the task needs, over what the card does at most in that time
    detail: str = ""


class Report:
    """Takes the rows of one part."""

    def __init__(self, part: str, out: Path, is_tiny: bool):
        self.part = part
        self.out = out
        self.is_tiny = is_tiny
        self.device = "cpu" if is_tiny else "cuda"

    def add(self, row: Row) -> Row:
        """Writes a row to all files."""
        with (self.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        write_tables(self.out)
        print(f"{row.part}: {row.name}: {row.status} {shown(row.seconds, '{:.4g} s')} {row.detail}", flush=True)
        return row

    def say(self, status: Status, name: str, detail: str = "", seconds: float | None = None) -> None:
        """Adds a row without a rate."""
        self.add(Row(self.part, name, status, seconds, detail=detail))

    def measured(self, name: str, seconds: float, count: int, unit: str, against: Row | None, **more: Any) -> Row:
        """Adds a row of `count` things in `seconds`, with the most memory held since the row before."""
        rate = count / seconds
        speedup = rate / against.rate if against and against.rate else None
        baseline = against.name if against else None
        return self.add(Row(self.part, name, "ok", seconds, rate, unit, baseline, speedup, self.peak_gib(), **more))

    def peak_gib(self) -> float | None:
        """Most memory that torch held on the card since the last call; None where it held none."""
        if self.device == "cpu":
            return None
        import torch

        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most / 2**30 or None

    def time(
        self,
        name: str,
        action: Callable[[], object],
        count: int,
        unit: str,
        against: Row | None = None,
        *,
        repeats: int = 3,
        flop: float | None = None,
        detail: str = "",
    ) -> Row | None:
        """Times an action that does `count` things and needs `flop`, and adds its row; None where it lacks memory."""
        import torch

        self.peak_gib()  # what came before does not count
        try:
            seconds = median_seconds(action, 1 if self.is_tiny else repeats, self.device)
        except torch.OutOfMemoryError as error:
            message = str(error).split(". ")[0]
        else:
            peak = PEAK_TFLOPS.get(torch.cuda.get_device_name()) if self.device == "cuda" else None
            share = flop / seconds / (peak * 1e12) if flop and peak else None
            return self.measured(name, seconds, count, unit, against, peak_share=share, detail=detail)
        gc.collect()  # outside the handler, whose traceback keeps tensors alive
        torch.cuda.empty_cache()
        self.say("out of memory", name, message)
        return None


def run_part(name: str, out: Path, is_tiny: bool) -> None:
    """Runs a part in this process; what goes wrong is a row."""
    os.setsid()  # so that what it starts ends with it
    report = Report(name, out, is_tiny)
    try:
        PARTS[name][0](report)
    except ImportError as error:
        report.say("missing", error.name or "a package", str(error))
    except Exception as error:
        traceback.print_exc()
        is_memory = type(error).__name__ == "OutOfMemoryError"
        report.say("out of memory" if is_memory else "failed", "the part", f"{type(error).__name__}: {error}"[:300])


def describe_card(is_tiny: bool) -> dict[str, Any]:
    """What the numbers are measured on."""
    import torch

    has_card = not is_tiny and not torch.cuda._is_in_bad_fork() and torch.cuda.is_available()
    card = torch.cuda.get_device_properties(0) if has_card else None
    return {
        "card": card.name if card else None,
        "card_gib": card.total_memory / 2**30 if card else None,
        "peak_tflops": PEAK_TFLOPS.get(card.name) if card else None,
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        **describe_machine(*PACKAGES),
        "tiny": is_tiny,
    }


def write_tables(out: Path) -> None:
    """Writes `report.json` and `table.md` from the machine's description and the rows so far."""
    machine = json.loads((out / "machine.json").read_text())
    rows = [Row(**json.loads(line)) for line in (out / "rows.jsonl").read_text().splitlines()]
    lines = [
        f"{machine['card'] or 'CPU, tiny sizes'}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}, {machine['date']}",
        "",
        "| part | what | seconds | rate | against plain | GiB | share of peak | notes |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        notes = "; ".join(filter(None, [row.status if row.status != "ok" else "", row.detail]))
        cells = [
            row.part,
            row.name,
            shown(row.seconds, "{:.4g}"),
            shown(row.rate, "{:.4g} " + (row.unit or "")),
            shown(row.speedup, "{:.2f}x"),
            shown(row.peak_gib, "{:.1f}"),
            shown(row.peak_share, "{:.1%}"),
            " ".join(notes.replace("|", "/").split()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    report = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
    for name, text in (("report.json", report), ("table.md", "\n".join(lines))):
        (out / f"{name}.new").write_text(text + "\n")
        (out / f"{name}.new").replace(out / name)


def shown(value: float | None, form: str) -> str:
    """A number as it stands in a table, or nothing."""
    return "" if value is None else form.format(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts one after the other; the exit status is 1 if one of them failed or was cut off."""
    parser = command_line(__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to see that all of it runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/gpu-CARD-DATE)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (default %(default)s)")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    names = [name.strip() for name in args.parts.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: found {', '.join(unknown)}, expected some of {', '.join(PARTS)}")

    # One process imports the packages, and each part is forked from it. Where one of them touches the card as it is
    # imported, parts have to import them themselves: no card can be used on both sides of a fork.
    for method in ("forkserver", "spawn"):
        processes: Any = multiprocessing.get_context(method)
        processes.set_forkserver_preload(PRELOADED)
        with processes.Pool(1) as pool:
            machine = pool.apply(describe_card, (args.tiny,))
        if args.tiny or machine["card"]:
            break
    else:
        parser.error("torch sees no CUDA device; --tiny runs all parts in tiny sizes on the CPU")
    card = re.sub(r"[^a-z0-9]+", "-", (machine["card"] or "tiny").lower())
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu-{card}-{machine['date']}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.json").write_text(json.dumps(machine))
    rows = out / "rows.jsonl"  # those of other parts, from an earlier run, stay
    lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
    rows.write_text("".join(line for line in lines if json.loads(line)["part"] not in names))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or a part would outlive a run that `timeout` ends
    for place, name in enumerate(names):
        left = max(0, end - time.monotonic())
        share = left * PARTS[name][1] / sum(PARTS[later][1] for later in names[place:])
        process = processes.Process(target=run_part, args=(name, out, args.tiny))
        process.start()
        try:
            process.join(share)
        finally:
            if is_cut := process.is_alive():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        if is_cut:
            Report(name, out, args.tiny).say("cut off", "the part", f"after its {share:.0f} s")
        elif process.exitcode:
            Report(name, out, args.tiny).say("failed", "the part", f"exit status {process.exitcode}")
    found = [row for row in json.loads((out / "report.json").read_text())["rows"] if row["part"] in names]
    print(f"\n{(out / 'table.md').read_text()}\nWritten: {out}")
    return int(any(row["status"] in ("failed", "cut off") for row in found))


if __name__ == "__main__":
    sys.exit(main())
