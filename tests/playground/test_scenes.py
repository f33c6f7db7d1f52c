"""Composition: deterministic, splits apart, masks exact."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from playground.mini.backgrounds import SETTINGS, SURFACES, Background, paint_setting
from playground.mini.scenes import (
    LEAST_BACKGROUND,
    MOST_HIDDEN,
    BackgroundRegion,
    Placement,
    Scene,
    SceneObject,
    assemble,
    compose_scene,
    scene_rng,
    tight_box,
)
from playground.mini.sprites import TINTS, load_sprites
from playground.mini.wording import cell_of_nine

SCENES = 25


@pytest.fixture(scope="module", params=["simple", "full"])
def scenes(request: pytest.FixtureRequest) -> list[Scene]:
    return [compose_scene(3, "train", request.param, index)[0] for index in range(SCENES)]


def regions_of(scene: Scene) -> list[SceneObject | BackgroundRegion]:
    return [*scene.objects, *scene.background]


def test_a_scene_is_a_function_of_seed_split_style_and_index() -> None:
    for style in ("simple", "full"):
        first, again = (compose_scene(3, "train", style, 7)[0] for _ in range(2))
        assert np.array_equal(first.picture, again.picture)
        assert [item.sprite for item in first.objects] == [item.sprite for item in again.objects]


def test_seeds_splits_and_indices_draw_from_different_streams() -> None:
    pictures = [
        compose_scene(seed, split, "simple", index)[0].picture.tobytes()
        for seed in (0, 1)
        for split in ("train", "heldout")
        for index in range(3)
    ]
    assert len(set(pictures)) == len(pictures)


def test_no_pixel_belongs_to_two_regions(scenes: list[Scene]) -> None:
    for scene in scenes:
        masks = [region.mask for region in regions_of(scene)]
        assert np.sum(masks, axis=0).max() <= 1


def test_full_scenes_leave_no_more_pixels_unlabelled_than_small_bands_have() -> None:
    for index in range(SCENES):
        scene, _ = compose_scene(3, "train", "full", index)
        covered = np.any([region.mask for region in regions_of(scene)], axis=0)
        bands_left_out = len(scene.setting.bands) - len(scene.background)
        assert 1 - covered.mean() <= LEAST_BACKGROUND * bands_left_out


def test_boxes_are_tight(scenes: list[Scene]) -> None:
    for scene in scenes:
        for region in regions_of(scene):
            left, top, right, bottom = region.box_xyxy_px
            inside = region.mask[top:bottom, left:right]
            assert inside.sum() == region.mask.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_nothing_in_the_picture_is_hidden_beyond_the_limit(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.objects
        assert all(-1e-9 <= item.hidden <= MOST_HIDDEN for item in scene.objects)


def test_full_scenes_contain_hidden_parts_and_repeated_things() -> None:
    scenes = [compose_scene(3, "train", "full", index)[0] for index in range(SCENES)]
    assert any(item.hidden > 0.2 for scene in scenes for item in scene.objects)
    assert any(len({item.sprite for item in scene.objects}) < len(scene.objects) for scene in scenes)
    assert len({scene.size_wh for scene in scenes}) > 3


def test_simple_scenes_show_two_to_four_whole_things_of_the_simple_set_on_one_labelled_surface() -> None:
    simple = set(load_sprites(simple_only=True))
    counts, repeats, labels = set(), set(), set()
    for index in range(100):
        scene, _ = compose_scene(3, "train", "simple", index)
        names = [item.sprite for item in scene.objects]
        assert set(names) <= simple
        assert all(item.hidden == pytest.approx(0) for item in scene.objects)
        [region] = scene.background
        assert np.array_equal(region.mask, ~np.any([item.mask for item in scene.objects], axis=0))
        assert scene.size_wh == (224, 224)
        counts.add(len(names))
        repeats |= {names.count(name) for name in names}
        labels.add(region.label)
    assert counts == {2, 3, 4} and repeats == {1, 2, 3, 4}
    assert labels == {setting.name for setting in SURFACES}


def test_a_colour_does_not_follow_from_the_name_and_is_the_same_for_all_of_a_name() -> None:
    """All tints are as frequent, and names that occur tinted several times have several tints."""
    tints = defaultdict(list)
    natural = 0
    for index in range(400):
        colours = defaultdict(set)
        for item in compose_scene(3, "train", "simple", index)[0].objects:
            colours[item.sprite.name].add(item.colour)
        for name, [colour] in colours.items():
            tints[name] += [colour] if colour else []
            natural += colour is None
    counts = Counter(tint for seen in tints.values() for tint in seen)
    expected = counts.total() / len(TINTS)
    assert set(counts) == set(TINTS)
    assert all(abs(count - expected) < 3.5 * expected**0.5 for count in counts.values())
    assert abs(natural - counts.total()) < 3.5 * (natural + counts.total()) ** 0.5
    same = sum(first == second for seen in tints.values() for first, second in pairwise(seen))
    pairs = sum(max(0, len(seen) - 1) for seen in tints.values())
    assert abs(same / pairs - 1 / len(TINTS)) < 3.5 * (1 / len(TINTS) / pairs) ** 0.5


def test_objects_lie_in_each_third_about_equally_often() -> None:
    thirds = np.zeros((2, 3))
    for index in range(400):
        scene, _ = compose_scene(3, "train", "simple", index)
        for item in scene.objects:
            for axis, third in enumerate(cell_of_nine(scene, item)):
                thirds[axis, third] += 1
    assert np.abs(thirds / thirds.sum(axis=1, keepdims=True) - 1 / 3).max() < 0.06


def test_masks_lie_where_the_picture_departs_from_its_background() -> None:
    for index in range(10):
        scene, _ = compose_scene(3, "train", "simple", index)
        background = paint_setting(scene_rng(3, "train", "simple", index), scene.picture.shape[:2], SURFACES)
        changed = (scene.picture != background.picture).any(axis=-1)
        masks = np.any([item.mask for item in scene.objects], axis=0)
        # A sprite's pixel may by chance have the background's colour.
        assert (masks & changed).sum() >= 0.99 * masks.sum()
        near = np.zeros_like(changed)
        for left, top, right, bottom in (item.box_xyxy_px for item in scene.objects):
            near[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = True  # 3 px: antialiased fringe
        assert not (changed & ~near).any()


def test_a_pixel_belongs_to_the_topmost_opaque_sprite() -> None:
    rng = np.random.default_rng(0)
    shape = (20, 30)
    sprites = load_sprites()[:3]
    placements = []
    for sprite, (left, top) in zip(sprites, [(2, 3), (8, 5), (25, -2)], strict=True):
        rgba = rng.integers(0, 256, (12, 14, 4), dtype=np.uint8)
        placements.append(Placement(sprite, Image.fromarray(rgba), left, top))
    black, everywhere = np.zeros((*shape, 3), dtype=np.uint8), np.ones(shape, dtype=bool)
    background = Background(black, SETTINGS[0], {"floor": everywhere}, 0)
    _, objects, regions = assemble(background, placements, shadows=False)

    owner = np.full(shape, -1)
    for number, placement in enumerate(placements):
        alpha = np.asarray(placement.picture)[..., 3]
        for y in range(12):
            for x in range(14):
                row, col = placement.top + y, placement.left + x
                if 0 <= row < shape[0] and 0 <= col < shape[1] and alpha[y, x] >= 128:
                    owner[row, col] = number
    for item in objects:
        assert np.array_equal(item.mask, owner == sprites.index(item.sprite))
    assert np.array_equal(regions[0].mask, owner == -1)


def test_tight_box_uses_pixel_edges() -> None:
    mask = np.zeros((5, 7), dtype=bool)
    mask[1:3, 2:6] = True
    assert tight_box(mask) == (2, 1, 6, 3)
