"""Align(V, W) and the cosine of regions with their labels: does a projector speak the LLM's words, place by place?

For each region the cosine between its label and every visual token makes a map over the image. Tokens above a threshold
that adapts to the map are the prediction; its intersection over union with the region's mask is the region's score, and
the mean over regions is Align(V, W) (the paper's equations 3 and 4). The paper leaves the threshold open, so it is a
named rule here, and results carry the name.

Areas are counted in the frame of the model's image. A predicted token is drawn as its full cell; the truth is the
region's mask after the same geometry as the image, by exact area: a pixel covered by half counts as half. All areas are
measured in cells, so the coverage of the cells is enough and nothing is ever drawn.

Two figures need no threshold: how well the map ranks the tokens (average precision), and whether its peak lies on the
region (pointing). And since a space in which all words lie close together gives any label a high cosine, the region is
also compared with all other labels of the set.

Letters: R regions of an image, S visual tokens of an image (row-major over the grid), D width of the LLM, L different
labels of the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_maps(labels: Tensor, visual_tokens: Tensor) -> Tensor:
    """Cosine of each label `[R, D]` with each visual token `[S, D]`: `[R, S]`, 0 for vectors of norm zero."""
    return F.normalize(labels, dim=-1) @ F.normalize(visual_tokens, dim=-1).T


def _mid_range(maps: Tensor, truth_cells: Tensor) -> Tensor:
    return (maps.amin(dim=1) + maps.amax(dim=1)) / 2


def _otsu(maps: Tensor, truth_cells: Tensor) -> Tensor:
    # Exact, over all S - 1 ways to cut the sorted values, instead of over the bins of a histogram.
    ordered = maps.double().sort(dim=1).values  # [R, S]
    tokens = ordered.shape[1]
    below = torch.arange(1, tokens, device=maps.device, dtype=ordered.dtype)  # [S - 1]
    sum_below = ordered.cumsum(dim=1)[:, :-1]  # [R, S - 1]
    sum_above = ordered.sum(dim=1, keepdim=True) - sum_below
    gap = sum_above / (tokens - below) - sum_below / below
    cut = (below * (tokens - below) * gap.square()).argmax(dim=1, keepdim=True)  # [R, 1]
    return ordered.gather(1, cut).squeeze(1).to(maps.dtype)  # highest value of the lower class


def _mean_std(maps: Tensor, truth_cells: Tensor) -> Tensor:
    mean = maps.mean(dim=1, keepdim=True)
    return mean.squeeze(1) + (maps - mean).square().mean(dim=1).sqrt()  # `std` warns where there is no region


def _top_area(maps: Tensor, truth_cells: Tensor) -> Tensor:
    tokens = maps.shape[1]
    chosen = truth_cells.round().clamp(1, tokens).long().unsqueeze(1)  # [R, 1]
    ordered = maps.sort(dim=1, descending=True).values
    floor = torch.full_like(ordered[:, :1], -torch.inf)
    return torch.cat([ordered, floor], dim=1).gather(1, chosen).squeeze(1)  # first value that is not chosen


THRESHOLD_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mid_range": _mid_range,
    "otsu": _otsu,
    "mean_std": _mean_std,
    "top_area": _top_area,
}
"""Rules for the threshold: cosine maps `[R, S]` and the regions' areas in cells `[R]` -> thresholds `[R]`.

- `mid_range`: halfway between the map's lowest and highest value.
- `otsu`: the cut of the map's values into two classes with the largest variance between them.
- `mean_std`: the map's mean plus one standard deviation.
- `top_area`: the region's own number of tokens (its area in cells, rounded, at least one). It is told the region's size
  but not its place: it judges the ranking of the tokens alone, and must not be compared with the other rules.
"""


def predicted_tokens(maps: Tensor, rule: str, truth_cells: Tensor | None = None, positive: bool = False) -> Tensor:
    """Tokens whose cosine lies strictly above the rule's threshold (equation 3): maps `[R, S]` -> bool `[R, S]`.

    A constant map says nothing about the place, so it predicts no token, whatever the rule. Only `top_area` needs
    `truth_cells` `[R]`, the regions' areas in cells. `positive` raises a threshold below 0 to 0, as equation 3 has it
    (c > 0).
    """
    if rule not in THRESHOLD_RULES:
        raise ValueError(f"Unknown threshold rule {rule!r}; the rules are {', '.join(THRESHOLD_RULES)}.")
    if truth_cells is None:
        if rule == "top_area":
            raise ValueError("The rule 'top_area' needs the regions' areas in cells (truth_cells).")
        truth_cells = maps.new_zeros(len(maps))
    informative = (maps.amax(dim=1) > maps.amin(dim=1)).unsqueeze(1)  # [R, 1]
    thresholds = THRESHOLD_RULES[rule](maps, truth_cells).unsqueeze(1)  # [R, 1]
    return (maps > (thresholds.clamp(min=0) if positive else thresholds)) & informative


def iou_by_area(predicted: Tensor, coverage: Tensor) -> Tensor:
    """Intersection over union of predicted tokens `[R, S]`, drawn as full cells, with the regions' masks.

    Coverage `[R, S]` is the share of each cell that the region covers. Returns `[R]`, NaN for a region without area.
    """
    truth_cells = coverage.sum(dim=1)  # [R]
    intersection = (coverage * predicted).sum(dim=1)
    return (intersection / (predicted.sum(dim=1) + truth_cells - intersection)).where(truth_cells > 0, torch.nan)


def average_precision(maps: Tensor, coverage: Tensor) -> Tensor:
    """How well cosine maps rank the pixels of their regions first: the area under precision and recall, no threshold.

    Every pixel has the cosine of its cell, and precision is taken at each step of recall, without interpolation. Pixels
    of equal cosine are one step. A constant map therefore scores the region's share of the image. Takes and returns
    what `iou_by_area` does, with maps `[R, S]`.
    """
    order = maps.argsort(dim=1, descending=True)
    ranked, gained = maps.gather(1, order), coverage.gather(1, order)  # [R, S]
    cells = torch.arange(1, maps.shape[1] + 1, device=maps.device)  # [S]
    precision = gained.cumsum(dim=1) / cells
    # A tie is one step: all its cells take the precision at its last one.
    ends_tie = torch.ones_like(ranked, dtype=torch.bool)
    ends_tie[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    last_of_tie = torch.where(ends_tie, cells - 1, maps.shape[1]).flip(1).cummin(dim=1).values.flip(1)  # [R, S]
    return (gained * precision.gather(1, last_of_tie)).sum(dim=1) / coverage.sum(dim=1)


def pointing_hits(maps: Tensor, covered: Tensor) -> Tensor:
    """Whether the region covers the token of highest cosine: maps and bool `[R, S]` -> `[R]`, float64, 1 or 0.

    Where several tokens share the highest cosine, it is the share of them that is covered.
    """
    peaks = maps == maps.amax(dim=1, keepdim=True)  # [R, S]
    return (peaks & covered).sum(dim=1) / peaks.sum(dim=1).double()


def compare_with_labels(regions: Tensor, label_directions: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare regions with every label, all others counting alike: what random draws of other labels would estimate.

    Takes the mean token of each region `[R, D]`, all labels `[L, D]` scaled to length 1, and the index of each region's
    own label `[R]`. Returns `[R]` each, float64: mean cosine with the other labels (NaN if there is no other), 1 if the
    own label is the nearest of all, and 1 if it is among the five nearest. Where labels tie, the last two are the
    chance that it is.
    """
    cosines = (F.normalize(regions.to(label_directions), dim=-1) @ label_directions.T).double()  # [R, L]
    mine = cosines.gather(1, own.unsqueeze(1))  # [R, 1]
    nearer, tied = (cosines > mine).sum(dim=1), (cosines == mine).sum(dim=1)  # the label ties with itself
    others = cosines.shape[1] - 1
    top1, top5 = (((count - nearer) / tied.double()).clamp(0, 1) for count in (1, 5))
    return (cosines.sum(dim=1) - mine.squeeze(1)) / others, top1, top5


SCORES_BY_AREA = ("iou_px", *(f"iou_px_{rule}" for rule in THRESHOLD_RULES), "average_precision_px", "shuffled_iou_px")
"""Scores of regions that reach into the model's image: IoU under the chosen rule and under each, average precision, and
IoU of another region's label."""

SCORES_BY_TOKEN = (
    "iou_tokens", "pointing", "cosine", "shuffled_cosine", "other_cosine", "contrast", "top1", "top5",
    "best_word_cosine",
)  # fmt: skip
"""Scores of regions that cover a token.

- `iou_tokens`: intersection over union of whole tokens.
- `pointing`: see `pointing_hits`.
- `cosine`: of the mean of the covered tokens with the label; `shuffled_cosine` with another region's label.
- `other_cosine`, `top1`, `top5`: see `compare_with_labels`; `contrast` is `cosine` less `other_cosine`.
- `best_word_cosine`: of the mean of the covered tokens with the nearest word of the LLM's table.
"""

SCORES_BY_MEAN = SCORES_BY_TOKEN[2:]
"""Scores of the mean of the covered tokens; the others are of the cosine map."""


COVERAGE_SLACK = 1e-9
"""Rounding that a share of a cell may have and still count as `min_coverage`, as in `patch_aligned.masks`."""


@torch.no_grad()
def score_regions(
    visual_tokens: Tensor,
    label_directions: Tensor,
    own: Tensor,
    coverage: Tensor,
    *,
    rule: str = "mid_range",
    min_coverage: float = 0.5,
    shuffled: Tensor | None = None,
    positive_threshold: bool = False,
    best_word_cosine: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Score all regions of one image.

    Args:
        visual_tokens: `[S, D]`, projector output.
        label_directions: `[L, D]`, embeddings of all labels of the set, scaled to length 1.
        own: `[R]`, index of each region's label.
        coverage: `[R, S]` or `[R, rows, cols]`, share of each token's cell that the region's mask covers (0..1).
        rule: name of the threshold rule.
        min_coverage: from this share on, inclusive, a token counts as covered.
        shuffled: `[R]`, index of another region's label, as a control; -1 where there is none.
        positive_threshold: see `predicted_tokens`.
        best_word_cosine: `[R, D]` -> `[R]`, cosine of each vector with the nearest word; None leaves it undefined.

    Returns:
        By the names of `SCORES_BY_AREA` and `SCORES_BY_TOKEN`, `[R]` each, float64; NaN where a score is undefined.

    Raises:
        ValueError: the shapes do not fit, or the rule is unknown.
    """
    coverage = coverage.flatten(1).double()  # [R, rows, cols] -> [R, S]
    if visual_tokens.shape[-1] != label_directions.shape[-1] or coverage.shape != (len(own), len(visual_tokens)):
        raise ValueError(
            f"Visual tokens {list(visual_tokens.shape)}, labels {list(label_directions.shape)} of {len(own)} regions "
            f"and coverage {list(coverage.shape)} do not fit: expected [S, D], [L, D] and [R, S]."
        )
    if shuffled is None:
        shuffled = torch.full_like(own, -1)
    truth_cells = coverage.sum(dim=1)  # [R]

    def predict(of_labels: Tensor, rule: str) -> Tensor:
        return predicted_tokens(of_labels, rule, truth_cells, positive_threshold)

    maps, other_maps = (cosine_maps(label_directions[label], visual_tokens) for label in (own, shuffled))  # [R, S]
    predicted = predict(maps, rule)  # [R, S]
    iou_of_rules = {f"iou_px_{name}": iou_by_area(predict(maps, name), coverage) for name in THRESHOLD_RULES}
    by_area = {
        "iou_px": iou_of_rules[f"iou_px_{rule}"],
        **iou_of_rules,
        "average_precision_px": average_precision(maps, coverage),
        "shuffled_iou_px": iou_by_area(predict(other_maps, rule), coverage).where(shuffled >= 0, torch.nan),
    }

    covered = coverage >= min_coverage - COVERAGE_SLACK  # [R, S]
    regions = covered.double() @ visual_tokens.double() / covered.sum(dim=1, keepdim=True)  # [R, D]
    cosine = F.cosine_similarity(regions, label_directions[own].double(), dim=-1)
    shuffled_cosine = F.cosine_similarity(regions, label_directions[shuffled].double(), dim=-1)
    other_cosine, top1, top5 = compare_with_labels(regions, label_directions, own)
    by_token = {
        "iou_tokens": (covered & predicted).sum(dim=1) / (covered | predicted).sum(dim=1).double(),
        "pointing": pointing_hits(maps, covered),
        "cosine": cosine,
        "shuffled_cosine": shuffled_cosine.where(shuffled >= 0, torch.nan),
        "other_cosine": other_cosine,
        "contrast": cosine - other_cosine,
        "top1": top1,
        "top5": top5,
        "best_word_cosine": best_word_cosine(regions.nan_to_num()) if best_word_cosine else cosine * torch.nan,
    }
    covers_token = covered.any(dim=1)  # [R]
    return by_area | {name: scores.where(covers_token, torch.nan) for name, scores in by_token.items()}


def over_grids(scores: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the scores of an image's regions on several grids.

    Scores of the mean token are averaged over the grids in which a region covers a token; those of the cosine map are
    the first grid's.
    """
    means = {name: torch.stack([of_grid[name] for of_grid in scores]).nanmean(dim=0) for name in SCORES_BY_MEAN}
    return scores[0] | means
