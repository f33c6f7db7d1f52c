"""Align(V, W) and cosine against closed forms and against a reference that draws every pixel."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_aligned.analysis.alignment import (
    THRESHOLD_RULES,
    average_precision,
    compare_with_labels,
    cosine_maps,
    pointing_hits,
    predicted_tokens,
    score_regions,
)
from patch_aligned.analysis.regions import permute_labels


def of_own(regions: int) -> torch.Tensor:
    """Every region has a label of its own."""
    return torch.arange(regions)


def maps(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- the reference: loops over pixels and tokens, nothing shared with the package --------------------------------


def reference_threshold(values: list[float], rule: str, truth_cells: float) -> float:
    if rule == "mid_range":
        return (min(values) + max(values)) / 2
    if rule == "mean_std":
        mean = sum(values) / len(values)
        return mean + math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    if rule == "top_area":
        chosen = max(1, min(len(values), round(truth_cells)))
        return [*sorted(values, reverse=True), -math.inf][chosen]
    best, threshold = -1.0, math.nan
    for candidate in sorted(set(values))[:-1]:
        low = [value for value in values if value <= candidate]
        high = [value for value in values if value > candidate]
        between = len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2
        if between > best * (1 + 1e-12):
            best, threshold = between, candidate
    return threshold


def reference_iou_px(values: list[float], threshold: float, mask: np.ndarray, grid: int) -> float:
    """Draws the predicted cells and counts pixels, one by one."""
    side = mask.shape[0]
    cell = side // grid
    intersection = union = 0
    for y in range(side):
        for x in range(side):
            predicted = values[(y // cell) * grid + x // cell] > threshold
            intersection += predicted and mask[y, x] == 1
            union += predicted or mask[y, x] == 1
    return intersection / union


# --- closed forms ------------------------------------------------------------------------------------------------


def test_a_perfect_map_aligns_fully():
    labels = torch.eye(2, 3, dtype=torch.float64)
    coverage = maps([1, 1, 0, 0], [0, 0, 0, 1])
    tokens = torch.tensor([[2.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 5, 0]], dtype=torch.float64)
    for rule in ("mid_range", "otsu", "top_area"):
        scores = score_regions(tokens, labels, of_own(2), coverage, rule=rule)
        assert scores["iou_px"].tolist() == [1, 1]
        assert scores["iou_tokens"].tolist() == [1, 1]
        assert scores["cosine"].tolist() == pytest.approx([1, 1])
        assert scores["average_precision_px"].tolist() == [1, 1]
        assert scores["pointing"].tolist() == scores["top1"].tolist() == [1, 1]
        assert scores["contrast"].tolist() == pytest.approx([1, 1])  # the other label is orthogonal


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_a_constant_map_predicts_nothing(rule: str):
    constant = torch.full((1, 49), 0.1)
    assert not predicted_tokens(constant, rule, torch.tensor([7.0])).any()
    scores = score_regions(torch.ones(4, 2), torch.ones(1, 2), of_own(1), maps([1, 0.25, 0, 0]), rule=rule)
    assert scores["iou_px"].item() == 0
    assert scores["average_precision_px"].item() == pytest.approx(1.25 / 4)  # the region's share of the image
    assert scores["pointing"].item() == 1 / 4  # the share of covered tokens


def test_half_covered_cells_count_by_their_area():
    """Predicted: cells 0 and 1. Truth: cell 0 whole, cell 1 half, cell 2 a quarter. 1.5 of 2 + 1.75 - 1.5."""
    tokens = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    scores = score_regions(tokens, torch.tensor([[1.0, 0]]), of_own(1), maps([1, 0.5, 0.25, 0]))
    assert scores["iou_px"].item() == pytest.approx(1.5 / 2.25)
    assert scores["iou_tokens"].item() == 1  # exactly half covered is covered


def test_cosine_is_that_of_the_mean_token():
    tokens = torch.tensor([[1.0, 0], [0, 3], [9, 9]])
    labels = torch.tensor([[1.0, 0], [0, 1]])
    scores = score_regions(tokens, labels, torch.tensor([0]), maps([1, 1, 0]), shuffled=torch.tensor([1]))
    assert scores["cosine"].item() == pytest.approx(1 / math.sqrt(10))
    assert scores["shuffled_cosine"].item() == pytest.approx(3 / math.sqrt(10))
    assert scores["other_cosine"].item() == pytest.approx(3 / math.sqrt(10))
    assert scores["contrast"].item() == pytest.approx(-2 / math.sqrt(10))


def test_threshold_rules_on_a_map_worked_by_hand():
    one = maps([0.0, 0.1, 0.2, 0.9])
    expected = {"mid_range": 0.45, "otsu": 0.2, "mean_std": 0.3 + math.sqrt(0.125), "top_area": 0.1}
    for rule, threshold in expected.items():
        assert THRESHOLD_RULES[rule](one, torch.tensor([2.2])).item() == pytest.approx(threshold)


def test_a_token_at_the_threshold_is_not_predicted():
    assert predicted_tokens(maps([0, 0.5, 1]), "mid_range").tolist() == [[False, False, True]]


def test_zero_vectors_have_cosine_zero():
    assert cosine_maps(torch.ones(1, 2), torch.zeros(3, 2)).tolist() == [[0, 0, 0]]


# --- against the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_scores_equal_a_drawing_reference(rule: str, seed: int):
    generator = np.random.default_rng(seed)
    grid, cell, width, regions = 4, 3, 5, 3
    side = grid * cell
    masks = (generator.random((regions, side, side)) < generator.random((regions, 1, 1))).astype(float)
    masks[:, 0, 0] = 1
    tokens = torch.from_numpy(generator.standard_normal((grid * grid, width)))
    labels = torch.from_numpy(generator.standard_normal((regions, width)))
    coverage = torch.from_numpy(masks.reshape(regions, grid, cell, grid, cell).mean((2, 4)))  # [R, rows, cols]
    labels = labels / labels.norm(dim=1, keepdim=True)
    scores = score_regions(tokens, labels, of_own(regions), coverage, rule=rule)
    whatever_is_chosen = score_regions(tokens, labels, of_own(regions), coverage)
    assert torch.equal(whatever_is_chosen[f"iou_px_{rule}"], scores["iou_px"])

    for region, mask in enumerate(masks):
        label = labels[region].numpy()
        values = [float(t @ label / np.linalg.norm(t) / np.linalg.norm(label)) for t in tokens.numpy()]
        threshold = reference_threshold(values, rule, mask.sum() / cell**2)
        covered = {
            index
            for index in range(grid * grid)
            if mask[index // grid * cell :, index % grid * cell :][:cell, :cell].mean() >= 0.5
        }
        predicted = {index for index, value in enumerate(values) if value > threshold}
        assert scores["iou_px"][region].item() == pytest.approx(
            reference_iou_px(values, threshold, mask, grid), rel=1e-12
        )
        if covered:
            expected = len(covered & predicted) / len(covered | predicted)
            mean = tokens[sorted(covered)].numpy().mean(axis=0)
            cosine = mean @ label / np.linalg.norm(mean) / np.linalg.norm(label)
            assert scores["iou_tokens"][region].item() == pytest.approx(expected, rel=1e-12)
            assert scores["cosine"][region].item() == pytest.approx(cosine, rel=1e-9)
            assert scores["pointing"][region].item() == (int(np.argmax(values)) in covered)
            all_cosines = [mean @ other / np.linalg.norm(mean) for other in labels.numpy()]
            others = (sum(all_cosines) - all_cosines[region]) / (regions - 1)
            assert scores["other_cosine"][region].item() == pytest.approx(others, rel=1e-9)
            assert scores["contrast"][region].item() == pytest.approx(cosine - others, rel=1e-9)
            assert scores["top1"][region].item() == (max(all_cosines) == all_cosines[region])
            assert scores["top5"][region].item() == 1
        else:
            assert math.isnan(scores["iou_tokens"][region].item())
            assert math.isnan(scores["cosine"][region].item())


# --- without a threshold ------------------------------------------------------------------------------------------


def reference_average_precision(values: list[float], coverage: list[float]) -> float:
    """Goes down the thresholds, counting the area of the cells at or above each, and of the region within them."""
    score = recall = 0.0
    for threshold in sorted(set(values), reverse=True):
        chosen = [index for index, value in enumerate(values) if value >= threshold]
        found = sum(coverage[index] for index in chosen)
        score += (found / sum(coverage) - recall) * found / len(chosen)
        recall = found / sum(coverage)
    return score


@settings(max_examples=100)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 12))
def test_average_precision_and_pointing_equal_a_walk_down_the_thresholds(seed: int, levels: int):
    generator = np.random.default_rng(seed)
    values = generator.integers(0, levels, (3, 16)) / levels  # few levels, so many ties
    coverage = generator.choice([0, 0.25, 0.5, 1], (3, 16), p=[0.5, 0.1, 0.2, 0.2])
    coverage[:, 0] = 1
    found = average_precision(torch.from_numpy(values), torch.from_numpy(coverage))
    hits = pointing_hits(torch.from_numpy(values), torch.from_numpy(coverage >= 0.5))
    for region in range(3):
        expected = reference_average_precision(values[region].tolist(), coverage[region].tolist())
        assert found[region].item() == pytest.approx(expected, rel=1e-12)
        peaks = np.flatnonzero(values[region] == values[region].max())
        assert hits[region].item() == pytest.approx(np.mean([coverage[region][peak] >= 0.5 for peak in peaks]))


def test_a_region_without_area_has_no_average_precision():
    assert math.isnan(average_precision(maps([1, 2]), maps([0, 0])).item())


# --- against all labels -------------------------------------------------------------------------------------------


def test_retrieval_ranks_the_own_label_among_all():
    angles = torch.arange(8, dtype=torch.float64) / 10
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)  # [8, 2], falling cosines with the first axis
    regions = torch.tensor([[2.0, 0]], dtype=torch.float64).expand(8, 2)
    other_cosine, top1, top5 = compare_with_labels(regions, directions, of_own(8))
    assert top1.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert top5.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert other_cosine[0].item() == pytest.approx(float(angles[1:].cos().mean()), rel=1e-12)


def test_labels_that_tie_share_the_places():
    """A region without direction has the same cosine with all eight labels: chance."""
    _, top1, top5 = compare_with_labels(torch.zeros(1, 8), torch.eye(8), of_own(1))
    assert (top1.item(), top5.item()) == (1 / 8, 5 / 8)


def test_a_space_collapsed_onto_one_direction_has_cosine_but_no_contrast():
    generator = torch.Generator().manual_seed(0)
    labels = torch.nn.functional.normalize(torch.randn(6, 40, generator=generator).double() * 0.1 + 1, dim=1)
    collapsed = torch.ones(9, 40).double()
    scores = score_regions(collapsed, labels, of_own(6), torch.eye(6, 9))
    assert scores["cosine"].min() > 0.98
    assert abs(scores["contrast"].mean().item()) < 1e-9
    assert scores["top1"].sum().item() == pytest.approx(1)  # one label wins every region


def test_the_only_label_has_nothing_to_stand_out_from():
    other_cosine, top1, _ = compare_with_labels(torch.ones(1, 2), torch.ones(1, 2) / math.sqrt(2), of_own(1))
    assert math.isnan(other_cosine.item())
    assert top1.item() == 1


def test_the_control_of_align_is_another_labels_map_on_the_regions_own_mask():
    tokens, coverage = torch.eye(3), maps([1, 0.5, 0], [0, 0, 1], [0, 1, 0])
    shuffled = torch.tensor([1, 0, -1])
    scores = score_regions(tokens, torch.eye(3), of_own(3), coverage, shuffled=shuffled)
    swapped = score_regions(tokens, torch.eye(3), shuffled.clamp(min=0), coverage)["iou_px"]
    assert scores["shuffled_iou_px"].tolist()[:2] == swapped.tolist()[:2] == [0.5 / 2, 0]
    assert math.isnan(scores["shuffled_iou_px"][2])


def test_a_negative_threshold_can_be_raised_to_zero():
    [predicted] = predicted_tokens(maps([-3, -1, 0, 0.5]), "mid_range").tolist()
    [positive] = predicted_tokens(maps([-3, -1, 0, 0.5]), "mid_range", positive=True).tolist()
    assert (predicted, positive) == ([False, True, True, True], [False, False, False, True])
    above = maps([0, 1, 2, 4])
    assert torch.equal(predicted_tokens(above, "mid_range", positive=True), predicted_tokens(above, "mid_range"))


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_shapes_and_rules_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 2\].*\[1, 3\].*do not fit"):
        score_regions(torch.ones(4, 2), torch.ones(1, 3), of_own(1), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"'median'.*mid_range, otsu"):
        predicted_tokens(torch.ones(1, 4), "median")
    with pytest.raises(ValueError, match="truth_cells"):
        predicted_tokens(torch.ones(1, 4), "top_area")


# --- the control --------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(labels=st.lists(st.sampled_from("abcde"), max_size=30), seed=st.integers(0, 50))
def test_shuffled_labels_are_a_permutation_that_changes_every_label_it_can(labels: list[str], seed: int):
    chosen = permute_labels(labels, seed)
    used = [source for source in chosen if source is not None]
    assert len(set(used)) == len(used)
    assert all(labels[source] != labels[region] for region, source in enumerate(chosen) if source is not None)
    largest = max(Counter(labels).values(), default=0)
    assert len(chosen) - len(used) == max(0, 2 * largest - len(labels))


def test_shuffling_follows_the_seed():
    labels = [f"name {index % 7}" for index in range(60)]
    assert permute_labels(labels, 3) == permute_labels(labels, 3)
    assert permute_labels(labels, 3) != permute_labels(labels, 4)
