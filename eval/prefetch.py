"""Download the data of benchmarks for machines without a network, and record the commits.

    python -m eval.prefetch --benchmarks vqa,mme

Downloads only the files of the needed splits into the hub's cache (HF_HOME), checks their SHA-256 and counts their
rows. Then copy HF_HOME and the lock file to the other machine, and set HF_HUB_OFFLINE=1 there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.benchmarks import ALL, GROUPS, Benchmark, HubData, choose
from eval.hub import LOCK, DataError, Lock, count_rows, find_data, verify
from llava.command import command_parser


def argument_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command_parser("eval.prefetch", __doc__)
    parser.add_argument(
        "--benchmarks", default=ALL, help=f"names, with commas, or {', '.join(GROUPS)}, {ALL}; default: %(default)s"
    )
    parser.add_argument("--lock", type=Path, default=LOCK, help="commits to fetch. Default: eval/revisions.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = argument_parser().parse_args(argv)
    failed = 0
    try:
        lock = Lock(arguments.lock)
        benchmarks = choose(arguments.benchmarks.split(","))
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for benchmark in benchmarks:
        try:
            print(prefetch(benchmark, lock), flush=True)
        except DataError as error:
            print(f"Error: {error}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"Error: {failed} of {len(benchmarks)} benchmarks are not complete", file=sys.stderr)
    return 2 if failed else 0


def prefetch(benchmark: Benchmark, lock: Lock) -> str:
    """Fetch and check one benchmark; returns a line that describes it."""
    data = find_data(benchmark, lock)
    if not isinstance(benchmark.data, HubData):
        return f"{benchmark.name}: {data.source}, made on this machine"
    verify((*data.paths, *data.pictures))
    rows = count_rows(data.paths)
    line = f"{benchmark.name}: {data.source} at {data.revision[:12]}, {rows} rows"
    if benchmark.rows not in (None, rows):
        line += f"; {benchmark.rows} were published: look at what changed before you compare"
    return line


if __name__ == "__main__":
    sys.exit(main())
