"""Captions as the metrics read them: words of the Penn Treebank's tokenizer, lower case, without punctuation.

pycocoevalcap's own wrapper does the same, but writes its input beside the installed package, which may be read-only,
and loses track of which caption is whose where one holds a line break other than "\\n".
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.captions.java import JavaError

# What Java ends a line at, and what Python does: a caption is one line.
_LINE_BREAKS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Captions of each image as words with single spaces in between; a caption without words becomes empty.

    Raises:
        JavaError: the tokenizer failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = [_LINE_BREAKS.sub(" ", caption) for texts in captions.values() for caption in texts]
    if not lines:
        return {image: [] for image in captions}
    text = "".join(f"{line}\n" for line in lines)
    # Halves of characters, which JSON can spell, are no text that a process could be handed.
    done = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True, check=False)
    tokenized = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(tokenized) != len(lines):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise JavaError(f"tokenizer: found {len(tokenized)} lines, expected {len(lines)}; Java said {said[-1]!r}")
    words = iter(" ".join(w for w in line.split(" ") if w not in ptbtokenizer.PUNCTUATIONS) for line in tokenized)
    return {image: [next(words) for _ in texts] for image, texts in captions.items()}
