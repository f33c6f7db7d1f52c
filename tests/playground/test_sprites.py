"""The sprite sheet: enough names, each with a picture and the words that captions need."""

from __future__ import annotations

import numpy as np

from playground.mini.backgrounds import BACKGROUND_LABELS
from playground.mini.sprites import SHEET, load_sprites, sprite_picture


def test_there_are_enough_names_and_83_simple_ones() -> None:
    assert len(load_sprites()) >= 150
    assert len(load_sprites(simple_only=True)) == 83


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
