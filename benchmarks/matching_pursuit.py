"""Speed of matching pursuit for all visual tokens of an image at once, relative to the paper's loop over the tokens.

    python benchmarks/matching_pursuit.py

The loop is Algorithm 1 to the letter: for each token and round one product with the whole table of word embeddings,
which is already scaled to unit length. Both take the same threads, and their words and coefficients are compared in the
same run. Seconds are those of the fastest run, and of the loop's fastest token, so that other work on the machine
counts little; the ratio of processor time stands beside that of the clock.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from functools import partial

import torch
from measuring import command_line, fastest
from torch import Tensor

from patch_aligned.analysis.matching_pursuit import Pursuit, WordDictionary, matching_pursuit

TARGET = 8.0
TOKENS, WORDS, ROUNDS, CHUNK, LOOP_TOKENS = 576, 32000, 5, 2048, 48


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


def largest_difference(found: Pursuit, ids: Tensor, coefficients: Tensor) -> tuple[int, float]:
    """How many tokens got other words, and the largest difference of a coefficient of the others."""
    same = (found.ids[: len(ids)] == ids).all(dim=1)
    gap = (found.coefficients[: len(ids)] - coefficients)[same].abs()
    return int((~same).sum()), float(gap.max()) if len(gap) else 0.0


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def tokens_of_words(width: int, words: int, count: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Tokens `[S, D]` that are made of words, as the hypothesis of the paper has it, and noise; the words `[M, D]`."""
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(words, width, generator=generator)
    units /= units.norm(dim=1, keepdim=True)
    made_of = torch.randint(words, (count, rounds), generator=generator)
    weights = torch.rand(count, rounds, 1, generator=generator) + 0.2
    tokens = (weights * units[made_of]).sum(dim=1) + torch.randn(count, width, generator=generator) / width
    return tokens, units


def measure(width: int, repeats: int) -> tuple[float, int]:
    """Prints a row of the table for one width; returns the ratio and the number of tokens with other words."""
    tokens, units = tokens_of_words(width, WORDS, TOKENS, ROUNDS)
    run = partial(matching_pursuit, tokens, WordDictionary(units, chunk=CHUNK), ROUNDS)

    before = peak_mib()
    seconds, processor_seconds = fastest(run, repeats)
    extra = peak_mib() - before
    rows: list[tuple[Tensor, Tensor]] = []
    of_token = iter(tokens)
    one_token = fastest(lambda: rows.append(literal_loop(next(of_token), units, ROUNDS)), LOOP_TOKENS)
    ids, coefficients = (torch.stack(part) for part in zip(*rows, strict=True))

    differing, gap = largest_difference(run(), ids, coefficients)
    loop, processor_loop = (least * TOKENS for least in one_token)
    ratio = loop / seconds
    table = units.numel() * units.element_size() / 2**20
    print(
        f"| {width} | {seconds:.2f} | {loop:.1f} | {ratio:.1f}x | {processor_loop / processor_seconds:.1f}x "
        f"| {table:.0f} | {extra:.0f} | {differing} of {LOOP_TOKENS} | {gap:.0e} |",
        flush=True,
    )
    return ratio, differing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit status is 1 if a ratio is below the target or a token gets other words."""
    parser = command_line(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096], help="default 1024 4096")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the fast way (default 3)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    print(
        f"{TOKENS} tokens, {WORDS} words, {ROUNDS} rounds, chunks of {CHUNK}, {options.threads} threads "
        f"(target {TARGET:.0f}x)"
    )
    print(
        "| width | together, s | loop, s | ratio | processor's | table, MiB | further memory, MiB | other words "
        "| largest gap |"
    )
    print("|--:" * 9 + "|")
    results = [measure(width, options.repeats) for width in options.widths]
    return int(any(ratio < TARGET or differing for ratio, differing in results))


if __name__ == "__main__":
    sys.exit(main())
