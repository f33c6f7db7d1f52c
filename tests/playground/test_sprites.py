"""The sprite sheet: enough names, each with a picture and the words that captions need."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import ImageColor

from playground.mini.backgrounds import BACKGROUND_LABELS
from playground.mini.sprites import HELD_OUT, SHEET, TINTS, held_out_names, load_sprites, names_by_kind, sprite_picture


def test_there_are_enough_names_and_some_have_several_tokens() -> None:
    assert len(load_sprites()) >= 150
    tokens = Counter(sprite.tokens for sprite in load_sprites(simple_only=True))
    assert tokens.total() >= 80 and tokens[2] >= 10 and tokens[3] >= 3


def test_no_simple_name_is_a_word_of_another() -> None:
    """Else a text that mentions one would mention the other, which may be held out."""
    names = [sprite.name for sprite in load_sprites(simple_only=True)]
    assert not [name for name in names for other in names if name != other and name in other.split()]


def test_the_names_held_out_are_ten_and_ten_more_for_a_seed() -> None:
    """Each kind, category and number of tokens, holds two names or more of each block, or none: it can be deranged."""
    everything = frozenset(sprite.name for sprite in load_sprites(simple_only=True))
    for seed in range(20):
        held_out = held_out_names(seed)
        assert HELD_OUT < held_out < everything and (len(HELD_OUT), len(held_out)) == (10, 20)
        assert held_out == held_out_names(seed)
        for block in (HELD_OUT, held_out - HELD_OUT, everything - held_out):
            assert min(map(len, names_by_kind(block).values())) >= 2
            # Four names of one category, one of them in the picture, need three that are not.
            assert block == everything - held_out or min(map(len, names_by_kind(block).values())) >= 4
    assert held_out_names() == HELD_OUT
    assert len({held_out_names(seed) for seed in range(20)}) > 15


def test_a_tint_keeps_the_outline_and_gives_its_hue() -> None:
    for sprite in load_sprites(simple_only=True)[::10]:
        alpha = np.asarray(sprite_picture(sprite).getchannel("A"))
        for tint, code in TINTS.items():
            tinted = sprite_picture(sprite, tint)
            assert np.array_equal(np.asarray(tinted.getchannel("A")), alpha)
            mean = np.asarray(tinted)[alpha >= 128, :3].mean(axis=0)
            assert not np.ptp(mean - mean.mean()) or np.argmax(mean) == np.argmax(ImageColor.getrgb(code))


def test_names_plurals_and_background_labels_never_mean_two_things() -> None:
    names = [sprite.name for sprite in load_sprites()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(BACKGROUND_LABELS)
    owners: dict[str, str] = {}
    for sprite in load_sprites():
        for word in {sprite.name, sprite.plural}:
            assert owners.setdefault(word, sprite.name) == sprite.name


def test_articles_follow_the_sound_of_the_name() -> None:
    by_name = {sprite.name: sprite.article for sprite in load_sprites()}
    assert by_name["hourglass"] == "an" and by_name["unicorn"] == "a"
    for name, article in by_name.items():
        if name not in ("hourglass", "unicorn"):
            assert article == ("an" if name[0] in "aeiou" else "a"), name


def test_every_box_holds_a_picture_that_touches_its_edges() -> None:
    for sprite in load_sprites():
        alpha = np.asarray(sprite_picture(sprite).getchannel("A"))
        assert (alpha >= 128).mean() > 0.1, sprite.name
        # Cut tightly: some pixel of each border row and column belongs to the sprite (antialiased ones count).
        assert max(alpha.shape) == 96, sprite.name


def test_the_sheet_stays_small() -> None:
    assert SHEET.stat().st_size < 2 * 2**20
