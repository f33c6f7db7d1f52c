"""Token maps: the words on the patches of an image, as the paper's Figures 5 and 6 show them.

Letters: S visual tokens of an image, D width of the LLM, K rounds of matching pursuit.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava.mm_utils import load_rgb_image
from patch_aligned.analysis.analysed_models import AnalysedModel, sources_of
from patch_aligned.analysis.embeddings import WordEmbeddings
from patch_aligned.analysis.matching_pursuit import Pursuit, WordDictionary, matching_pursuit
from patch_aligned.analysis.token_text import TokenText, VocabularyText
from patch_aligned.analysis.word_list import WordList, english_words

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
class MappedToken:
    """A word of a map: its text, and whether it is English (None where no list is installed)."""

    token: TokenText
    english: bool | None


@dataclass(frozen=True)
class TokenMap:
    """What one projector makes of one image.

    Attributes:
        grid: rows and columns of visual tokens.
        pursuit: the words of each visual token, `[S, K]`, on the CPU.
        words: the text of each id that occurs.
    """

    grid: tuple[int, int]
    pursuit: Pursuit
    words: dict[int, MappedToken]

    def mean_cosine(self, round_index: int) -> float:
        """Mean over the tokens of the chosen word's cosine in one round."""
        return float(self.pursuit.cosines[:, round_index].mean())

    def english_share(self, round_index: int) -> float | None:
        """Share of the tokens whose word is English in one round; None where no list is installed."""
        flags = [self.words[word].english for word in self.pursuit.ids[:, round_index].tolist()]
        return None if None in flags else sum(map(bool, flags)) / len(flags)


@dataclass(frozen=True)
class MappedImage:
    """An image with the maps of every projector.

    Attributes:
        image_id: what it is called.
        pictures: by the projector's name, the image as its tower sees it, `[3, side, side]`, 0..1.
        maps: by the projector's name.
    """

    image_id: str
    pictures: dict[str, Tensor]
    maps: dict[str, TokenMap]

    @property
    def top_cosine(self) -> float:
        """The largest cosine of all maps and rounds: what the sizes of words are relative to."""
        return max(float(token_map.pursuit.cosines.max()) for token_map in self.maps.values())


@dataclass(frozen=True)
class TokenMaps:
    """Token maps of several images, with what they hang on.

    Attributes:
        images: each with the maps of every projector.
        sources: where each projector and its words come from, by name.
        settings: how tokens were decomposed.
        word_list: English words; None where no list is installed.
    """

    images: list[MappedImage]
    sources: dict[str, str]
    settings: PursuitSettings
    word_list: WordList | None


class TokenMapper:
    """Finds the words of visual tokens in one table of word embeddings; projectors of one LLM share it.

    Args:
        words: the LLM's word embeddings.
        settings: how tokens are decomposed.
        english: English words; None leaves the words' language open.
        device: where the pursuit runs. The table is kept there.

    Raises:
        ValueError: the table is broken.
    """

    def __init__(
        self,
        words: WordEmbeddings,
        settings: PursuitSettings | None = None,
        english: WordList | None = None,
        device: str = "cpu",
    ):
        self.settings, self.english = settings or PursuitSettings(), english
        self.texts = VocabularyText(words.tokenizer)
        self.dictionary = WordDictionary(
            words.table.to(device),
            size=len(self.texts),
            unit_length=self.settings.unit_length,
            excluded=[] if words.placeholder is None else [words.placeholder],
        )
        self._words: dict[int, MappedToken] = {}

    def map(self, visual_tokens: Tensor, grid: tuple[int, int]) -> TokenMap:
        """Token map of one image's visual tokens `[S, D]`, row by row over the grid."""
        found = matching_pursuit(
            visual_tokens,
            self.dictionary,
            self.settings.rounds,
            absolute=self.settings.absolute,
            orthogonal=self.settings.orthogonal,
        )
        pursuit = Pursuit(
            *(part.cpu() for part in (found.ids, found.coefficients, found.cosines, found.residual_norms))
        )
        return TokenMap(grid, pursuit, {word: self._word(word) for word in pursuit.ids.unique().tolist()})

    def _word(self, token_id: int) -> MappedToken:
        if token_id not in self._words:
            token = self.texts[token_id]
            english = None if self.english is None else not token.special and token.text in self.english
            self._words[token_id] = MappedToken(token, english)
        return self._words[token_id]


def token_maps(
    models: Sequence[AnalysedModel],
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
        english: which list tells English words, see `word_list.english_words`.
        on_images: told how many images are done, and of how many.

    Raises:
        OSError: an image is missing or broken.
        ValueError: a table of word embeddings is broken.
        ImportError: the list of English words is not installed.
    """
    settings, word_list = settings or PursuitSettings(), english_words(english)
    mappers: dict[str, TokenMapper] = {}
    for model in models:
        words = model.projector.words
        if words.source not in mappers:
            mappers[words.source] = TokenMapper(words, settings, word_list, model.tower.device)
    towers = {id(model.tower): model.tower for model in models}
    mapped = []
    for image_id, path in images:
        image = load_rgb_image(path)
        pixels = {key: tower.pixels(image) for key, tower in towers.items()}  # [3, side, side] each
        features = {key: tower.features(pixels[key][None]) for key, tower in towers.items()}  # [1, S, d] each
        shown = {key: tower.displayed(pixels[key]) for key, tower in towers.items()}
        pictures = {model.name: shown[id(model.tower)] for model in models}
        maps = {}
        for model in models:
            tokens, grid = model.projector.visual_tokens(features[id(model.tower)])  # [1, T, D]
            maps[model.name] = mappers[model.projector.words.source].map(tokens[0], grid)
        mapped.append(MappedImage(image_id, pictures, maps))
        on_images(len(mapped), len(images))
    return TokenMaps(mapped, sources_of(models), settings, word_list)


def map_caption(token_map: TokenMap, round_index: int) -> str:
    """What stands above a map: the round, its mean cosine, and the share of English words where it is known."""
    share = token_map.english_share(round_index)
    english = "" if share is None else f" · {share:.0%} English"
    cosine = f"{token_map.mean_cosine(round_index):.2f}".replace("-", "−")
    return f"word {round_index + 1} · mean cosine {cosine}{english}"


def colours_of_words(image: MappedImage) -> dict[str, str]:
    """A colour for each English word of an image's maps, by its text in lower case, as `#rrggbb`.

    A word has one colour in all rounds and projectors, and the frequent ones have hues far apart, so that regions show.
    """
    counts: Counter[str] = Counter()
    for token_map in image.maps.values():
        for word in token_map.pursuit.ids.flatten().tolist():
            if token_map.words[word].english:
                counts[token_map.words[word].token.text.lower()] += 1
    colours = {}
    for place, word in enumerate(sorted(counts, key=lambda word: (-counts[word], word))):
        colours[word] = _dark_colour((_FIRST_HUE + place * _GOLDEN_ANGLE) % 1)
    return colours


def _dark_colour(hue: float) -> str:
    """The lightest colour of a hue that can be read on a light picture: yellow and green must be darker than blue."""
    lightness = 0.5
    while True:
        rgb = colorsys.hls_to_rgb(hue, lightness, _SATURATION)
        luminance = sum(share * value**2.2 for share, value in zip(_LUMINANCE, rgb, strict=True))
        if luminance <= _MOST_LUMINANCE:
            return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
        lightness -= 0.01
