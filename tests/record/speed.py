"""Time and peak memory of the benchmarks of two checkouts, side by side.

    python tests/record/speed.py BASE TREE [--runs 3] [--parts mask_tokens,analysis] [--out FILE]

The two take turns, so that whatever else the machine does meets both. Of the runs the one with the least processor
time counts; the exit status is 1 if TREE takes over 10% more time or memory than BASE. What a benchmark prints is kept
in FILE. All but mask_tokens and pad_start need `bash scripts/prepare_mini.sh` in both checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from product import Product

BENCHMARKS = {
    "stage1_step": ("--repeats", "5"),
    "mask_tokens": ("--repeats", "40"),
    "pad_start": ("--images", "20000", "--batches", "100", "--workers", "1", "--dir", "{scratch}"),
    "analysis": ("--images", "200"),
    "answering": ("--questions", "16", "--batch-sizes", "4"),
}
TOLERANCE = 1.10


def main() -> int:
    """Prints a row a benchmark; the exit status is 1 if one is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parts", default=",".join(BENCHMARKS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    worse = False
    print(f"{'benchmark':12} {'CPU s':>8} {'CPU s':>8} {'ratio':>6} {'MB':>8} {'MB':>8} {'ratio':>6}")
    for name in options.parts.split(","):
        runs: dict[str, list[dict[str, Any]]] = {"base": [], "tree": []}
        for _ in range(options.runs):
            for side, checkout in (("base", options.base), ("tree", options.tree)):
                runs[side].append(measure(checkout.resolve(), name))
        best = {side: {key: min(run[key] for run in runs[side]) for key in ("cpu_s", "peak_mb")} for side in runs}
        ratio = {key: best["tree"][key] / best["base"][key] for key in ("cpu_s", "peak_mb")}
        worse |= max(ratio.values()) > TOLERANCE
        found[name] = {"runs": runs, "least": best, "ratio": ratio}
        columns = [f"{best['base'][key]:8.1f} {best['tree'][key]:8.1f} {ratio[key]:6.3f}" for key in ratio]
        print(f"{name:12} {' '.join(columns)}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(worse)


def measure(checkout: Path, name: str) -> dict[str, Any]:
    """One run of a benchmark: processor time of it and its workers, peak memory of the largest, what it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        product = Product(checkout, Path(scratch), Path(scratch))
        flags = [flag.format(scratch=scratch) for flag in BENCHMARKS[name]]
        command = [sys.executable, f"benchmarks/{name}.py", *flags]
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env=product.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not printed:
        raise SystemExit(f"{name}: exit code {process.returncode}; next: bash scripts/prepare_mini.sh in {checkout}")
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "status": process.returncode,
        "printed": printed.splitlines(),
    }


if __name__ == "__main__":
    sys.exit(main())
