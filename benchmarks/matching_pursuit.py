"""Speed of matching pursuit for all visual tokens of an image at once, relative to the paper's loop over the tokens.

    python benchmarks/matching_pursuit.py

The loop is Algorithm 1 to the letter: for each token and round one product with the whole table of word embeddings,
which is already scaled to unit length. Both take the same threads, and their words and coefficients are compared in the
same run. Seconds are those of the fastest run, and of the loop's fastest token, so that other work on the machine
counts little; the ratio of processor time stands beside that of the clock.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_aligned.analysis.matching_pursuit import Pursuit, WordDictionary, matching_pursuit

TARGET = 8.0


def literal_loop(token: Tensor, units: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 for one token: ids and coefficients, `[K]` each."""
    ids, coefficients = torch.zeros(rounds, dtype=torch.long), torch.zeros(rounds)
    residual = token.clone()
    for turn in range(rounds):
        products = units @ residual  # [M]
        best = int(products.argmax())
        ids[turn], coefficients[turn] = best, products[best]
        residual -= products[best] * units[best]
    return ids, coefficients


@dataclass
class Fastest:
    """The least time of several runs, by the clock and by the processor."""

    seconds: float = math.inf
    processor_seconds: float = math.inf

    @contextmanager
    def run(self) -> Iterator[None]:
        """Times what happens inside."""
        clock, processor = time.perf_counter(), time.process_time()
        yield
        self.seconds = min(self.seconds, time.perf_counter() - clock)
        self.processor_seconds = min(self.processor_seconds, time.process_time() - processor)


def largest_difference(found: Pursuit, ids: Tensor, coefficients: Tensor) -> tuple[int, float]:
    """How many tokens got other words, and the largest difference of a coefficient of the others."""
    same = (found.ids[: len(ids)] == ids).all(dim=1)
    gap = (found.coefficients[: len(ids)] - coefficients)[same].abs()
    return int((~same).sum()), float(gap.max()) if len(gap) else 0.0


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def tokens_of_words(width: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens `[S, D]` that are made of words, as the hypothesis of the paper has it, and noise; the words `[M, D]`."""
    generator = torch.Generator().manual_seed(options.seed)
    units = torch.randn(options.words, width, generator=generator)
    units /= units.norm(dim=1, keepdim=True)
    made_of = torch.randint(options.words, (options.tokens, options.rounds), generator=generator)
    weights = torch.rand(options.tokens, options.rounds, 1, generator=generator) + 0.2
    tokens = (weights * units[made_of]).sum(dim=1) + torch.randn(options.tokens, width, generator=generator) / width
    return tokens, units


def measure(width: int, options: argparse.Namespace) -> tuple[float, int]:
    """Prints a row of the table for one width; returns the ratio and the number of tokens with other words."""
    tokens, units = tokens_of_words(width, options)
    dictionary = WordDictionary(units, chunk=options.chunk)

    before = peak_mib()
    together, one_token = Fastest(), Fastest()
    for _ in range(options.repeats):
        with together.run():
            found = matching_pursuit(tokens, dictionary, options.rounds)
    extra = peak_mib() - before
    looped = min(options.loop_tokens, options.tokens)
    rows = []
    for token in tokens[:looped]:
        with one_token.run():
            rows.append(literal_loop(token, units, options.rounds))
    ids, coefficients = (torch.stack(part) for part in zip(*rows, strict=True))

    differing, gap = largest_difference(found, ids, coefficients)
    loop = one_token.seconds * options.tokens
    ratio = loop / together.seconds
    processor_ratio = one_token.processor_seconds * options.tokens / together.processor_seconds
    table = units.numel() * units.element_size() / 2**20
    print(
        f"| {width} | {together.seconds:.2f} | {loop:.1f} | {ratio:.1f}x | {processor_ratio:.1f}x | {table:.0f} "
        f"| {extra:.0f} | {differing} of {looped} | {gap:.0e} |",
        flush=True,
    )
    return ratio, differing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit status is 1 if a ratio is below the target or a token gets other words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens of the image (default 576)")
    parser.add_argument("--words", type=int, default=32000, help="words of the table (default 32000)")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096], help="default 1024 4096")
    parser.add_argument("--rounds", type=int, default=5, help="words a token (default 5)")
    parser.add_argument("--chunk", type=int, default=2048, help="words compared at a time (default 2048)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the fast way (default 3)")
    parser.add_argument("--loop_tokens", type=int, default=48, help="tokens that the loop takes (default 48)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    print(
        f"{options.tokens} tokens, {options.words} words, {options.rounds} rounds, chunks of {options.chunk}, "
        f"{options.threads} threads (target {TARGET:.0f}x)"
    )
    print(
        "| width | together, s | loop, s | ratio | processor's | table, MiB | further memory, MiB | other words "
        "| largest gap |"
    )
    print("|--:" * 9 + "|")
    results = [measure(width, options) for width in options.widths]
    return int(any(ratio < TARGET or differing for ratio, differing in results))


if __name__ == "__main__":
    sys.exit(main())
