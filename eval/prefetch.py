"""Fetch the data of benchmarks, for machines without a network, and write down which commits they are of.

    python -m eval.prefetch --benchmarks vqa,mme

Downloads only the files of the splits that are asked, into the hub's cache (HF_HOME), checks their SHA-256 and counts
their rows. Then take HF_HOME and the lock file along, and set HF_HUB_OFFLINE=1 there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.benchmarks import ALL, GROUPS, Benchmark, HubData, choose
from eval.hub import LOCK, DataError, Lock, count_rows, fetch, find_data, verify


def argument_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.prefetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--benchmarks", default=ALL, help=f"names, with commas, or {', '.join(GROUPS)}, {ALL}; default: %(default)s"
    )
    parser.add_argument(
        "--lock", type=Path, default=LOCK, help="commits; those that it holds are fetched. Default: eval/revisions.json"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
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
    """Fetches and checks one benchmark; returns a line that says what is there.

    Raises:
        DataError: it cannot be had, or a file is damaged.
    """
    if not isinstance(benchmark.data, HubData):
        return f"{benchmark.name}: {find_data(benchmark, lock).source}, made on this machine"
    files = fetch(benchmark.data, lock, benchmark.name)
    verify(files)
    if benchmark.pictures is not None:
        verify(fetch(benchmark.pictures, lock, benchmark.name))
    rows = count_rows(files)
    line = f"{benchmark.name}: {benchmark.data.repository} at {files.revision[:12]}, {rows} rows"
    if benchmark.rows not in (None, rows):
        line += f"; {benchmark.rows} were published: look at what changed before you compare"
    return line


if __name__ == "__main__":
    sys.exit(main())
