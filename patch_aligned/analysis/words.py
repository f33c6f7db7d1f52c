"""Token maps: the words on the patches of an image, as the paper's Figures 5 and 6 show them.

Letters: S visual tokens of an image, D width of the LLM, K rounds of matching pursuit.
"""

from __future__ import annotations

import colorsys
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.mm_utils import load_rgb_image
from patch_aligned.analysis.matching_pursuit import Pursuit, WordDictionary, matching_pursuit
from patch_aligned.cells import TokenGrid
from patch_aligned.models.base import VisionLanguageModel, WordEmbeddings, tokens_of_image
from patch_aligned.models.load import sources_of

# Single tokens of an LLM's vocabulary as text that can be shown: one token, on its own, made visible.

REPLACEMENT = "\ufffd"
_WORD_MARKS = ("\u2581", "\u0120")  # of SentencePiece and of byte-level BPE: a space comes before the token
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class TokenText:
    """A token as it is shown, without the space in front of a word.

    White space and control characters are visible signs, bytes that are only part of a character are `<0xE2>`.
    """

    text: str
    starts_word: bool  # whether a space comes before it; False for tokenizers that do not mark it
    special: bool  # such as `</s>`, or added to the vocabulary
    english: bool | None = None  # None if no word list is installed


class VocabularyText:
    """Texts of an LLM's single tokens, by id. Without a list of English words none says whether it is one."""

    def __init__(self, tokenizer: Any, english: WordList | None = None):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer, self._english = tokenizer, english
        self._known: dict[int, TokenText] = {}
        self._special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def __getitem__(self, token_id: int) -> TokenText:
        if token_id not in self._known:
            raw, special = self._tokenizer.convert_ids_to_tokens(token_id), token_id in self._special
            text, starts_word = (raw, False) if special else self._shown(token_id, raw)
            english = None if self._english is None else not special and text in self._english
            self._known[token_id] = TokenText(text, starts_word, special, english)
        return self._known[token_id]

    def _shown(self, token_id: int, raw: str) -> tuple[str, bool]:
        """The text of a token that is not special, and whether it starts a word."""
        text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if REPLACEMENT in text and REPLACEMENT not in raw:
            return self._bytes(raw), False
        if not text.strip():  # nothing but white space, of which SentencePiece drops the first sign when it decodes
            text = raw.replace(_WORD_MARKS[0], " ") if _WORD_MARKS[0] in raw else text or raw
            return _visible(text), False
        return _visible(text.removeprefix(" ")), raw.startswith(_WORD_MARKS)

    def _bytes(self, raw: str) -> str:
        """SentencePiece writes a lone byte as `<0xE2>` itself; byte-level BPE has a character for each byte."""
        if re.fullmatch(r"<0x[0-9A-F]{2}>", raw) or not set(raw) <= set(self._byte_of):
            return raw
        return "".join(f"<0x{self._byte_of[character]:02X}>" for character in raw)


def _visible(text: str) -> str:
    return "".join(_VISIBLE.get(character) or _sign(character) for character in text)


def _sign(character: str) -> str:
    if character.isspace():
        return "␣"
    return character if character.isprintable() else f"<U+{ord(character):04X}>"


# Lists of English words that are installed, to tell words from fragments in a token map.
#
# The paper colours the tokens that NLTK recognises. Its corpus `words` is a dictionary of 1934 that knows no `bananas`;
# the list of pyspellchecker, which comes with the extra `analysis`, has inflected forms too. Nothing is downloaded.

_LONE_LETTERS = frozenset({"a", "i"})


@dataclass(frozen=True)
class WordList:
    """English words in lower case, and where they come from, for captions."""

    name: str
    words: frozenset[str]

    def __contains__(self, text: str) -> bool:
        """Whether the text is an English word, whatever its case. Of single letters only `a` and `I` are."""
        lower = text.lower()
        return lower in self.words and (len(lower) > 1 or lower in _LONE_LETTERS)


def _pyspellchecker() -> WordList:
    from spellchecker import SpellChecker

    words = SpellChecker(language="en").word_frequency.words()
    return WordList(f"pyspellchecker {version('pyspellchecker')}", frozenset(words))


def _nltk() -> WordList:
    from nltk.corpus import words

    return WordList("NLTK's corpus words", frozenset(map(str.lower, words.words())))


_SOURCES: dict[str, tuple[Callable[[], WordList], str]] = {
    "pyspellchecker": (_pyspellchecker, "pip install 'patch-aligned-llava[analysis]'"),
    "nltk": (_nltk, "pip install nltk && python -m nltk.downloader words"),
}
WORD_LISTS = ("auto", *_SOURCES, "none")
"""Names of the lists: `auto` takes the first of the others that is installed, `none` takes none."""


def english_words(name: str = "auto") -> WordList | None:
    """Return the list of this name, one of `WORD_LISTS`; None where `auto` finds none.

    Raises `ValueError` if there is no list of this name, and `ImportError` if it is not installed.
    """
    if name not in WORD_LISTS:
        raise ValueError(f"Unknown word list {name!r}; the lists are {', '.join(WORD_LISTS)}.")
    wanted = {"auto": tuple(_SOURCES), "none": ()}.get(name, (name,))
    for load, command in map(_SOURCES.__getitem__, wanted):
        try:
            return load()
        except (ImportError, LookupError) as error:  # LookupError: NLTK is there, its corpus is not
            if name != "auto":
                raise ImportError(f"The word list {name!r} is not installed: {command}") from error
    return None


_FIRST_HUE, _GOLDEN_ANGLE = 0.6, 0.381966  # shares of the colour circle
_SATURATION = 0.9
_LUMINANCE, _MOST_LUMINANCE = (0.2126, 0.7152, 0.0722), 0.11  # of red, green and blue; 0 is black and 1 is white


@dataclass(frozen=True)
class PursuitSettings:
    """How tokens are decomposed, see `matching_pursuit`."""

    rounds: int = 5
    absolute: bool = False
    orthogonal: bool = False
    unit_length: bool = True

    @property
    def as_in_the_paper(self) -> bool:
        """Whether words are chosen and taken away as in Algorithm 1, scaled or not: the paper leaves that open."""
        return not self.absolute and not self.orthogonal

    def described(self) -> str:
        """The settings in words, for captions."""
        kind = "orthogonal matching pursuit" if self.orthogonal else "matching pursuit"
        choice = "the largest magnitude" if self.absolute else "the largest signed product"
        scale = "words of unit length" if self.unit_length else "words as they are, not scaled"
        return f"{kind}, {choice}, {scale}"


@dataclass(frozen=True)
class TokenMap:
    """What one model makes of one image."""

    grid: TokenGrid
    pursuit: Pursuit  # the words of each cell, row by row, [S, K], on the CPU
    words: dict[int, TokenText]  # by each id that occurs

    def caption(self, round_index: int) -> str:
        """The round, its mean cosine, and the share of English words if there is a word list."""
        cosine = f"{float(self.pursuit.cosines[:, round_index].mean()):.2f}".replace("-", "−")
        english = [self.words[word].english for word in self.pursuit.ids[:, round_index].tolist()]
        share = "" if None in english else f" · {sum(map(bool, english)) / len(english):.0%} English"
        return f"word {round_index + 1} · mean cosine {cosine}{share}"


@dataclass(frozen=True)
class MappedImage:
    """An image with the maps of every model, by its name."""

    image_id: str
    image: np.ndarray  # uint8 [height, width, 3], the image file
    maps: dict[str, TokenMap]

    @property
    def top_cosine(self) -> float:
        """The largest cosine of all maps and rounds: what the sizes of words are relative to."""
        return max(float(token_map.pursuit.cosines.max()) for token_map in self.maps.values())


@dataclass(frozen=True)
class TokenMaps:
    """Token maps of several images, and what they depend on."""

    images: list[MappedImage]
    sources: dict[str, str]  # where each projector and its words come from, by name
    settings: PursuitSettings
    word_list: WordList | None  # None where no list is installed


def dictionary_of(words: WordEmbeddings, device: str, unit_length: bool = True) -> WordDictionary:
    """The words that an LLM can read, on a device: what its tokenizer knows, but for the token that images replace."""
    excluded = [] if words.placeholder is None else [words.placeholder]
    return WordDictionary(words.table.to(device), size=len(words.tokenizer), unit_length=unit_length, excluded=excluded)


class TokenMapper:
    """Decompose visual tokens into the words of an LLM, on a device, where its table is kept; its models share it."""

    def __init__(
        self,
        words: WordEmbeddings,
        settings: PursuitSettings | None = None,
        english: WordList | None = None,
        device: str = "cpu",
    ):
        self.settings = settings or PursuitSettings()
        self.texts = VocabularyText(words.tokenizer, english)
        self.dictionary = dictionary_of(words, device, self.settings.unit_length)

    def map(self, visual_tokens: Tensor, grid: TokenGrid, rounds: int | None = None) -> TokenMap:
        """Decompose one image's visual tokens `[T, D]`, of which the grid names one a cell; None: rounds as set."""
        found = matching_pursuit(
            visual_tokens[torch.from_numpy(grid.tokens).flatten()],  # [T, D] -> [S, D]
            self.dictionary,
            rounds or self.settings.rounds,
            absolute=self.settings.absolute,
            orthogonal=self.settings.orthogonal,
        )
        pursuit = Pursuit(*(part.cpu() for part in vars(found).values()))
        return TokenMap(grid, pursuit, {word: self.texts[word] for word in pursuit.ids.unique().tolist()})


def mappers_of(
    models: Sequence[VisionLanguageModel], settings: PursuitSettings, english: WordList | None
) -> dict[str, TokenMapper]:
    """A mapper for each model, by its name; models of one LLM share theirs, on the device of the first."""
    shared: dict[str, TokenMapper] = {}
    for model in models:
        if model.words.source not in shared:
            shared[model.words.source] = TokenMapper(model.words, settings, english, model.encoder.device)
    return {model.name: shared[model.words.source] for model in models}


def token_maps(
    models: Sequence[VisionLanguageModel],
    images: Sequence[tuple[str, Path]],
    settings: PursuitSettings | None = None,
    english: str = "auto",
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> TokenMaps:
    """The words on the patches of images, by matching pursuit.

    Args:
        models: each makes a map of an image; those of one tower share its features, those of one LLM its words.
        images: id and file of each.
        settings: how tokens are decomposed.
        english: which list tells English words, see `english_words`.
        on_images: told how many images are done, and of how many.

    Raises:
        OSError: an image is missing or broken.
        ValueError: a table of word embeddings is broken.
        ImportError: the list of English words is not installed.
    """
    settings, word_list = settings or PursuitSettings(), english_words(english)
    mappers, mapped = mappers_of(models, settings, word_list), []
    for image_id, path in images:
        image = load_rgb_image(path)
        seen = tokens_of_image(models, image)
        maps = {model.name: mappers[model.name].map(tokens, grid) for model, tokens, grid in seen}
        mapped.append(MappedImage(image_id, np.asarray(image), maps))
        on_images(len(mapped), len(images))
    return TokenMaps(mapped, sources_of(models), settings, word_list)


def colours_of_words(image: MappedImage) -> dict[str, str]:
    """A colour for each English word of an image's maps, by its text in lower case, as `#rrggbb`.

    A word has one colour in all rounds and projectors, and the frequent ones have hues far apart, so that regions show.
    """
    counts = Counter(
        token_map.words[word].text.lower()
        for token_map in image.maps.values()
        for word in token_map.pursuit.ids.flatten().tolist()
        if token_map.words[word].english
    )
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: _dark_colour((_FIRST_HUE + i * _GOLDEN_ANGLE) % 1) for i, word in enumerate(by_frequency)}


def _dark_colour(hue: float) -> str:
    """The lightest colour of a hue that can be read on a light picture: yellow and green must be darker than blue."""
    lightness = 0.5
    while True:
        rgb = colorsys.hls_to_rgb(hue, lightness, _SATURATION)
        luminance = sum(share * value**2.2 for share, value in zip(_LUMINANCE, rgb, strict=True))
        if luminance <= _MOST_LUMINANCE:
            return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
        lightness -= 0.01
