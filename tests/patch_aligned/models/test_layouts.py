"""Layouts agree with the models themselves: number, order and place of the visual tokens of every family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import Qwen2VLImageProcessor

from patch_aligned import layouts_of
from patch_aligned.cells import Layout, TokenGrid
from patch_aligned.masks import PatchMaskError, tokens_of_mask
from patch_aligned.models.impulse import impulse_test
from patch_aligned.models.layout_rules import NO_PLACE, RULES
from patch_aligned.models.tiny import tiny_copy
from patch_aligned.models.tokens import PROJECTORS, VisualTokenHook, image_inputs, image_token_id, visual_tokens
from tests.patch_aligned.models.families import FAMILIES, PUBLISHED, SIZES, checked, tokenizer


@cache
def built(name: str) -> tuple[Any, Any]:
    """Processor and tiny model of a family."""
    family = FAMILIES[name]
    if not family.is_installed:
        pytest.skip(f"needs transformers >= {family.since}")
    return family.make_processor(), tiny_copy(family.make_config())


def noise(size_wh: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_count_the_tokens_that_the_llm_reads_in_a_padded_batch(name: str):
    """Two samples, of two images and of one: the hook's rows are the model's own features, in the layouts' numbers."""
    processor, model = built(name)
    samples = [[(300, 200), (97, 60)], [(201, 333)]]
    inputs = image_inputs(processor, [[noise(size) for size in sizes] for sizes in samples])
    expected = [sum(layout.length for layout in layouts_of(processor, sizes)) for sizes in samples]
    ids = inputs["input_ids"]
    assert (ids == image_token_id(model.config)).sum(dim=1).tolist() == expected
    inputs["pixel_values"] = inputs["pixel_values"].float()  # Llama 4's are bfloat16
    # Llama 4's forward ends so in transformers 5.24, after its LLM has read the tokens.
    ends_badly = name.startswith("llama4") and transformers.__version__.startswith("5.24.")
    ending: Any = pytest.raises(AttributeError, match="image_outputs") if ends_badly else nullcontext()
    with VisualTokenHook(model) as hook, torch.no_grad(), ending:
        model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    assert hook.tokens is not None
    torch.testing.assert_close(hook.tokens, visual_tokens(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_change_where_the_image_does(name: str):
    if not FAMILIES[name].is_installed:
        pytest.skip(checked(FAMILIES[name]))
    assert checked(FAMILIES[name]) == "passed"


def shifted(edges: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(edge + (edges[1] - edges[0]) / 2 for edge in edges)


def scaled(edges: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(1.05 * edge for edge in edges)


def with_tiles_exchanged(grid: TokenGrid) -> TokenGrid:
    """The first tile's tokens at the place of the last one's, and the reverse."""
    tokens = grid.tokens.copy()
    rows = 1 + int(np.argmax(np.diff(tokens[:, 0], append=-1) != np.diff(tokens[:2, 0])))
    cols = 1 + int(np.argmax(np.diff(tokens[0], append=-1) != 1))
    first, last = tokens[:rows, :cols].copy(), tokens[-rows:, -cols:].copy()
    tokens[:rows, :cols], tokens[-rows:, -cols:] = last, first
    return replace(grid, tokens=tokens)


MUTATIONS: dict[str, Callable[[TokenGrid], TokenGrid]] = {
    "reversed": lambda grid: replace(grid, tokens=grid.tokens[::-1, ::-1]),
    "transposed": lambda grid: replace(grid, tokens=np.sort(grid.tokens, axis=None).reshape(grid.shape[::-1]).T),
    "half a cell to the right": lambda grid: replace(grid, x_edges=shifted(grid.x_edges)),
    "half a cell down": lambda grid: replace(grid, y_edges=shifted(grid.y_edges)),
    "five percent larger": lambda grid: replace(grid, x_edges=scaled(grid.x_edges), y_edges=scaled(grid.y_edges)),
    "two tiles exchanged": with_tiles_exchanged,
}


def mutated(layout: Layout, change: Callable[[TokenGrid], TokenGrid]) -> Layout:
    return replace(layout, grids=tuple(change(grid) for grid in layout.grids))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "," not in name])
def test_a_wrong_layout_fails(name: str):
    (processor, model), family = built(name), FAMILIES[name]
    [layout] = layouts_of(processor, [(640, 480)])
    for mutation, change in MUTATIONS.items():
        if mutation == "two tiles exchanged" and (layout.grids[0].kind == "whole" or "LlavaNext" in family.images):
            continue  # it has no tiles, or joins them to one
        if mutation == "five percent larger" and family.blur > 3:
            continue  # less than what the filters of this family blur
        wrong = mutated(layout, change)
        assert not impulse_test(model, processor, wrong, family.cell, family.blur, rectangles=4).passed, mutation


def test_the_table_in_the_docs_has_every_family_as_passed():
    page = (Path(__file__).parents[3] / "docs" / "vlm.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0][2:] for line in page.splitlines() if line.endswith("| passed |")] == list(FAMILIES)


def test_every_rule_is_tested():
    tested = {family.images for family in FAMILIES.values()}
    assert tested | {"BitImageProcessor"} == set(RULES)  # DINOv2's crops as CLIP's does


@pytest.mark.parametrize("name", FAMILIES)
def test_the_backend_of_the_image_processor_changes_no_layout(name: str):
    family = FAMILIES[name]
    if not (family.is_installed and hasattr(transformers, f"{family.images}Pil")):
        pytest.skip(f"{family.images} exists for torchvision alone")
    on_pil = family.make_processor(family.image_processor("Pil"))
    for size in SIZES:
        [expected], [found] = layouts_of(family.make_processor(), [size]), layouts_of(on_pil, [size])
        assert found is not expected
        assert found.length == expected.length
        for ours, theirs in zip(found.grids, expected.grids, strict=True):
            assert (ours.x_edges, ours.y_edges, ours.kind) == (theirs.x_edges, theirs.y_edges, theirs.kind)
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize(("name", "published", "source", "grids"), PUBLISHED, ids=[entry[0] for entry in PUBLISHED])
def test_grids_of_published_settings(name: str, published: dict[str, Any], source: str, grids: tuple[str, str]):
    """Grids as known, and as many tokens as the processor itself puts into the text."""
    if not FAMILIES[name].is_installed:
        pytest.skip(f"needs transformers >= {FAMILIES[name].since}")
    processor = replace(FAMILIES[name], **published).make_processor()
    token = tokenizer().convert_tokens_to_ids(FAMILIES[name].token)
    for size, expected in zip([(640, 480), (1280, 960)], grids, strict=True):
        [layout] = layouts_of(processor, [size])
        assert ", ".join(f"{grid.rows}x{grid.cols}" for grid in layout.grids) == expected
        assert int((image_inputs(processor, [[noise(size)]])["input_ids"] == token).sum()) == layout.length


def test_equal_settings_share_a_layout_and_changed_ones_do_not():
    family = FAMILIES["qwen2_vl"]
    processor = family.make_processor()
    [first], [again] = layouts_of(processor, [(640, 480)]), layouts_of(family.make_processor(), [noise((640, 480))])
    assert first is again
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 20}
    [smaller] = layouts_of(processor, [(640, 480)])
    assert smaller.length <= 20 < first.length


def test_what_has_no_layout_is_refused_by_name():
    for name in NO_PLACE:
        with pytest.raises(ValueError, match=name):
            layouts_of(type(name, (), {})(), [(640, 480)])
    unknown = SimpleNamespace(image_processor=SimpleNamespace())
    with pytest.raises(
        ValueError, match=r"class SimpleNamespace, expected one of Qwen2VLImageProcessor.*RULES in patch"
    ):
        layouts_of(unknown, [(640, 480)])
    with pytest.raises(ValueError, match="Qwen2VLImageProcessor: found no image_processor"):
        layouts_of(Qwen2VLImageProcessor(), [(640, 480)])
    with pytest.raises(ValueError, match=r"found \(640, 0\)"):
        layouts_of(FAMILIES["qwen2_vl"].make_processor(), [(640, 0)])
    fixed = FAMILIES["qwen2_vl"].make_processor()
    fixed.image_processor.do_resize = False
    with pytest.raises(ValueError, match="Qwen2VLImageProcessor: found do_resize=False"):
        layouts_of(fixed, [(640, 480)])


def test_masks_and_heat_maps_follow_the_cells():
    """A mask of the left half covers the tokens of the left half, and they are painted there."""
    [layout] = layouts_of(built("internvl")[0], [(640, 480)])
    mask = np.zeros((480, 640), dtype=bool)
    mask[:, :320] = True
    covered = tokens_of_mask(mask, layout)
    assert covered.shape == (layout.length,)
    for grid in layout.grids:
        np.testing.assert_array_equal(covered[grid.tokens], np.tile(np.array(grid.x_edges[1:]) <= 320, (grid.rows, 1)))
    np.testing.assert_array_equal(layout.heat_map(covered), mask)
    np.testing.assert_array_equal(layout.heat_map(covered, "whole"), mask)
    with pytest.raises(ValueError, match="kind: found 'crop'"):
        layout.heat_map(covered, "crop")
    with pytest.raises(ValueError, match=r"found shape \(3,\)"):
        layout.heat_map([1, 2, 3])
    with pytest.raises(PatchMaskError, match=r"found \[480, 640\], expected \[640, 480\]"):
        tokens_of_mask(mask.T, layout)


def test_pixels_that_no_token_sees_have_no_heat():
    """LLaVA crops the centre of a wide image."""
    [layout] = layouts_of(built("llava")[0], [(300, 200)])
    seen = ~np.isnan(layout.heat_map(np.ones(layout.length)))
    assert seen[:, 50:250].all()
    assert not seen[:, :49].any()
    assert not seen[:, 251:].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projectors_modules_are_in_the_model(name: str):
    _, model = built(name)
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    assert set(PROJECTORS[model.config.model_type]) <= names
