"""Records a checkout, a process a part; see record.sh."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from product import BENCHMARKS, Product

HERE = Path(__file__).resolve().parent
# The longest first, so that two processes end together.
QUICK = (
    "training", "evaluation", "annotation", "across", "analysis", "flags", "reader", "convert", "tokens", "dry_run",
    "tables",
)  # fmt: skip
WHOLE = ("cases",)


def main() -> int:
    """Runs the parts; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--tree", type=Path, default=HERE.parents[1])
    parser.add_argument("--parts", help=f"default: {','.join(QUICK)}; with --whole also {','.join(WHOLE)}")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out, tree, inputs = options.out.resolve(), options.tree.resolve(), options.inputs.resolve()
    parts = options.parts.split(",") if options.parts else [*(WHOLE if options.whole else ()), *QUICK]
    out.mkdir(parents=True, exist_ok=True)
    if options.one:
        part = importlib.import_module(f"parts.{options.one}")
        facts = part.record(Product(tree, inputs, options.work, options.whole))
        text = json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False)
        (out / f"{options.one}.json").write_text(text + "\n", encoding="utf-8")
        return 0

    if {"evaluation", "across"} & set(parts):  # both checkouts answer the baseline's questions
        shutil.copytree(inputs / "mini/eval", tree / BENCHMARKS, dirs_exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="record-") as scratch, ThreadPoolExecutor(options.jobs) as pool:

        def run(part: str) -> int:
            began = time.monotonic()
            product = Product(tree, inputs, Path(scratch) / part, options.whole)
            product.work.mkdir()
            (out / f"{part}.json").unlink(missing_ok=True)
            words = [str(out), "--inputs", str(inputs), "--tree", str(tree), "--one", part, "--work", str(product.work)]
            command = [sys.executable, str(HERE / "record.py"), *words, *(["--whole"] if options.whole else [])]
            done = subprocess.run(
                command, cwd=tree, env=product.environment(), capture_output=True, text=True, check=False
            )
            shutil.rmtree(product.work, ignore_errors=True)
            print(f"{part:12} {time.monotonic() - began:4.0f} s", flush=True)
            if done.returncode:
                print(f"{part}: {done.stderr[-4000:]}", file=sys.stderr, flush=True)
            return done.returncode

        return int(any(pool.map(run, parts)))


if __name__ == "__main__":
    sys.exit(main())
