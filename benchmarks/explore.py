"""Speed of `patch-aligned explore`: how soon a picture and its words are there, and a word for each of 576 tokens.

    python benchmarks/explore.py                                   # tokens of random numbers alone
    python benchmarks/explore.py --image PICTURE ours=runs/patch --base models/llm       # an upload and clicks too

An upload is timed from the bytes of its file to the answer of the page's session, without the browser. The page asks
for one word a token over the whole image, and for five words of the token that is clicked. Seconds are those of the
fastest run; beside them is the time of all processors, since other work on the machine counts in the clock alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import torch
from measuring import command_line, fastest

from patch_aligned.analysis.matching_pursuit import WordDictionary, matching_pursuit
from patch_aligned.explore.session import Session
from patch_aligned.models.load import load_models

TOKENS, WORDS, WIDTHS = 576, 32000, (576, 1024, 4096)


def measure(name: str, run: Callable[[], object], repeats: int) -> None:
    """Prints the fastest run's time, and its processor time."""
    seconds, processor_seconds = fastest(run, repeats)
    print(f"| {name} | {seconds:.2f} | {processor_seconds:.2f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table."""
    parser = command_line(__doc__)
    parser.add_argument("models", nargs="*", metavar="NAME=PATH", help="as analyze takes them")
    parser.add_argument("--base", help="language model of LLaVA's projectors")
    parser.add_argument("--image", type=Path, help="picture that is uploaded")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    options = parser.parse_args(arguments)
    if bool(options.models) != (options.image is not None):
        parser.error("found one of models and --image; expected both, or neither")
    torch.set_num_threads(options.threads)
    print("| what | seconds | of processors |\n|---|--:|--:|")
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(TOKENS, width, generator=generator)
        dictionary = WordDictionary(torch.randn(WORDS, width, generator=generator))
        sizes = f"over {WORDS:,} words of width {width}"
        measure(f"a word of {TOKENS} tokens {sizes}", partial(matching_pursuit, tokens, dictionary, 1), options.repeats)
        measure(f"five words of a token {sizes}", partial(matching_pursuit, tokens[:1], dictionary, 5), options.repeats)
    if options.models:
        session, content = Session(load_models(options.models, options.base), None, Path()), options.image.read_bytes()
        number = count()

        def upload() -> str:
            return session.upload(content + str(next(number)).encode())["image"]  # another key, the same picture

        upload_name = f"an upload, {len(options.models)} models"
        measure(f"picture after {upload_name}", upload, options.repeats)
        measure(f"picture and words after {upload_name}", lambda: session.words(upload()), options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
