"""Lists of English words that are installed, to tell words from fragments in a token map.

The paper colours the tokens that NLTK recognises. Its corpus `words` is a dictionary of 1934 that knows no `bananas`;
the list of pyspellchecker, which comes with the extra `analysis`, has inflected forms too. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

_LONE_LETTERS = frozenset({"a", "i"})


@dataclass(frozen=True)
class WordList:
    """English words, in lower case.

    Attributes:
        name: where they come from, for captions.
        words: the words.
    """

    name: str
    words: frozenset[str]

    def __contains__(self, text: str) -> bool:
        """Whether the text is an English word, whatever its case. Of single letters only `a` and `I` are."""
        lower = text.lower()
        return lower in self.words and (len(lower) > 1 or lower in _LONE_LETTERS)


def _pyspellchecker() -> WordList | None:
    if importlib.util.find_spec("spellchecker") is None:
        return None
    from spellchecker import SpellChecker

    words = SpellChecker(language="en").word_frequency.words()
    return WordList(f"pyspellchecker {version('pyspellchecker')}", frozenset(words))


def _nltk() -> WordList | None:
    if importlib.util.find_spec("nltk") is None:
        return None
    from nltk.corpus import words

    try:
        return WordList("NLTK's corpus words", frozenset(word.lower() for word in words.words()))
    except LookupError:  # the package is there, the corpus is not
        return None


_SOURCES: dict[str, tuple[Callable[[], WordList | None], str]] = {
    "pyspellchecker": (_pyspellchecker, "pip install 'patch-aligned-llava[analysis]'"),
    "nltk": (_nltk, "pip install nltk && python -m nltk.downloader words"),
}
WORD_LISTS = ("auto", *_SOURCES, "none")
"""Names of the lists: `auto` takes the first of the others that is installed, `none` takes none."""


def english_words(name: str = "auto") -> WordList | None:
    """The list of this name, or None where `auto` finds none.

    Args:
        name: one of `WORD_LISTS`.

    Raises:
        ValueError: there is no list of this name.
        ImportError: the list is not installed.
    """
    if name not in WORD_LISTS:
        raise ValueError(f"Unknown word list {name!r}; the lists are {', '.join(WORD_LISTS)}.")
    if name == "none":
        return None
    if name == "auto":
        return next((found for load, _ in _SOURCES.values() if (found := load()) is not None), None)
    load, command = _SOURCES[name]
    found = load()
    if found is None:
        raise ImportError(f"The word list {name!r} is not installed: {command}")
    return found
