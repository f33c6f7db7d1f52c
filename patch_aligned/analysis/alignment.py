"""Align(V, W) and the cosine of regions with their labels: does a projector speak the LLM's words, place by place?

For each region the cosine between its label and every visual token makes a map over the image. Tokens above a threshold
that adapts to the map are the prediction; its intersection over union with the region's mask is the region's score, and
the mean over regions is Align(V, W) (the paper's equations 3 and 4). The paper leaves the threshold open, so it is a
named rule here, and results carry the name.

Areas are counted in the frame of the model's image. A predicted token is drawn as its full cell; the truth is the
region's mask after the same geometry as the image, by exact area: a pixel covered by half counts as half. All areas are
measured in cells, so the coverage of the cells is enough and nothing is ever drawn.

Letters: R regions of an image, S visual tokens of an image (row-major over the grid), D width of the LLM.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_maps(labels: Tensor, visual_tokens: Tensor) -> Tensor:
    """Cosine of each label with each visual token.

    Args:
        labels: `[R, D]`, label embeddings.
        visual_tokens: `[S, D]`.

    Returns:
        `[R, S]`. A vector of norm zero has cosine 0 with everything.
    """
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
    return maps.mean(dim=1) + maps.std(dim=1, correction=0)


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


def predicted_tokens(maps: Tensor, rule: str, truth_cells: Tensor | None = None) -> Tensor:
    """Tokens whose cosine lies strictly above the rule's threshold (equation 3).

    Args:
        maps: `[R, S]`, cosine maps.
        rule: name of a rule in `THRESHOLD_RULES`.
        truth_cells: `[R]`, the regions' areas in cells; only `top_area` needs them.

    Returns:
        `[R, S]`, bool. A constant map says nothing about the place, so it predicts no token, whatever the rule.

    Raises:
        ValueError: unknown rule, or `top_area` without areas.
    """
    if rule not in THRESHOLD_RULES:
        raise ValueError(f"Unknown threshold rule {rule!r}; the rules are {', '.join(THRESHOLD_RULES)}.")
    if truth_cells is None:
        if rule == "top_area":
            raise ValueError("The rule 'top_area' needs the regions' areas in cells (truth_cells).")
        truth_cells = maps.new_zeros(len(maps))
    informative = (maps.amax(dim=1) > maps.amin(dim=1)).unsqueeze(1)  # [R, 1]
    return (maps > THRESHOLD_RULES[rule](maps, truth_cells).unsqueeze(1)) & informative


@dataclass(frozen=True)
class RegionScores:
    """Scores of an image's regions, `[R]` each, float64; NaN where a score is undefined.

    Attributes:
        iou_px: intersection over union by area; NaN for a region that lies outside the model's image.
        iou_tokens: the same over whole tokens; NaN for a region that covers no token.
        cosine: cosine of the mean of the covered tokens with the label; NaN for a region that covers no token.
        shuffled_cosine: the same with another region's label; NaN also where none was given.
    """

    iou_px: Tensor
    iou_tokens: Tensor
    cosine: Tensor
    shuffled_cosine: Tensor


@torch.no_grad()
def score_regions(
    visual_tokens: Tensor,
    labels: Tensor,
    coverage: Tensor,
    *,
    rule: str = "mid_range",
    min_coverage: float = 0.5,
    shuffled_labels: Tensor | None = None,
) -> RegionScores:
    """Scores all regions of one image.

    Args:
        visual_tokens: `[S, D]`, projector output.
        labels: `[R, D]`, each region's label embedding.
        coverage: `[R, S]` or `[R, rows, cols]`, share of each token's cell that the region's mask covers (0..1).
        rule: name of the threshold rule.
        min_coverage: from this share on, inclusive, a token counts as covered.
        shuffled_labels: `[R, D]`, labels of other regions, as a control; rows of NaN where there is none.

    Raises:
        ValueError: the shapes do not fit, or the rule is unknown.
    """
    coverage = coverage.flatten(1).double()  # [R, rows, cols] -> [R, S]
    if visual_tokens.shape[-1] != labels.shape[-1] or coverage.shape != (len(labels), len(visual_tokens)):
        raise ValueError(
            f"Visual tokens {list(visual_tokens.shape)}, labels {list(labels.shape)} and coverage "
            f"{list(coverage.shape)} do not fit: expected [S, D], [R, D] and [R, S]."
        )
    truth_cells = coverage.sum(dim=1)  # [R]
    predicted = predicted_tokens(cosine_maps(labels, visual_tokens), rule, truth_cells)  # [R, S]

    intersection = (coverage * predicted).sum(dim=1)
    union = predicted.sum(dim=1) + truth_cells - intersection
    iou_px = (intersection / union).where(truth_cells > 0, torch.nan)

    covered = coverage >= min_coverage  # [R, S]
    covers_token = covered.any(dim=1)  # [R]
    iou_tokens = (covered & predicted).sum(dim=1) / (covered | predicted).sum(dim=1).double()
    regions = covered.double() @ visual_tokens.double() / covered.sum(dim=1, keepdim=True)  # [R, D]
    cosine = F.cosine_similarity(regions, labels.double(), dim=-1)
    if shuffled_labels is None:
        shuffled_labels = torch.full_like(labels, torch.nan)
    shuffled_cosine = F.cosine_similarity(regions, shuffled_labels.double(), dim=-1)
    return RegionScores(
        iou_px=iou_px,
        iou_tokens=iou_tokens.where(covers_token, torch.nan),
        cosine=cosine.where(covers_token, torch.nan),
        shuffled_cosine=shuffled_cosine.where(covers_token, torch.nan),
    )


@dataclass(frozen=True)
class AlignmentResult:
    """Align(V, W) and cosine over a set of images. A mean over nothing is NaN.

    Attributes:
        align_px: Align(V, W): mean over regions of the intersection over union by area.
        align_px_per_image: mean over images of each image's mean.
        align_tokens: as `align_px`, over whole tokens.
        align_tokens_per_image: as `align_px_per_image`, over whole tokens.
        cosine: mean over regions of the cosine with their own label.
        cosine_per_image: mean over images of each image's mean.
        shuffled_cosine: mean over regions of the cosine with another region's label.
        images: images that had at least one region.
        regions: regions seen.
        regions_px: regions that the scores by area count.
        regions_tokens: regions that the scores by token and the cosines count.
        regions_outside: regions outside the model's image; no score counts them.
        regions_without_token: regions inside that cover no token; only the scores by area count them.
        regions_shuffled: regions that the shuffled cosine counts.
    """

    align_px: float
    align_px_per_image: float
    align_tokens: float
    align_tokens_per_image: float
    cosine: float
    cosine_per_image: float
    shuffled_cosine: float
    images: int
    regions: int
    regions_px: int
    regions_tokens: int
    regions_outside: int
    regions_without_token: int
    regions_shuffled: int


class _Mean:
    """Running means of one score, over regions and over images."""

    def __init__(self) -> None:
        self.total, self.regions, self.image_total, self.images = 0.0, 0, 0.0, 0

    def update(self, scores: Tensor) -> None:
        defined = scores[~scores.isnan()]
        if len(defined):
            self.total += float(defined.sum())
            self.regions += len(defined)
            self.image_total += float(defined.mean())
            self.images += 1

    @property
    def over_regions(self) -> float:
        return self.total / self.regions if self.regions else float("nan")

    @property
    def over_images(self) -> float:
        return self.image_total / self.images if self.images else float("nan")


class AlignmentAccumulator:
    """Means of region scores over a stream of images, in constant memory."""

    def __init__(self) -> None:
        self._iou_px, self._iou_tokens, self._cosine, self._shuffled = _Mean(), _Mean(), _Mean(), _Mean()
        self._images = self._regions = 0

    def update(self, scores: RegionScores) -> None:
        """Adds the scores of one image."""
        self._images += bool(len(scores.iou_px))
        self._regions += len(scores.iou_px)
        self._iou_px.update(scores.iou_px)
        self._iou_tokens.update(scores.iou_tokens)
        self._cosine.update(scores.cosine)
        self._shuffled.update(scores.shuffled_cosine)

    def result(self) -> AlignmentResult:
        """The means so far."""
        return AlignmentResult(
            align_px=self._iou_px.over_regions,
            align_px_per_image=self._iou_px.over_images,
            align_tokens=self._iou_tokens.over_regions,
            align_tokens_per_image=self._iou_tokens.over_images,
            cosine=self._cosine.over_regions,
            cosine_per_image=self._cosine.over_images,
            shuffled_cosine=self._shuffled.over_regions,
            images=self._images,
            regions=self._regions,
            regions_px=self._iou_px.regions,
            regions_tokens=self._iou_tokens.regions,
            regions_outside=self._regions - self._iou_px.regions,
            regions_without_token=self._iou_px.regions - self._iou_tokens.regions,
            regions_shuffled=self._shuffled.regions,
        )


def permute_labels(labels: Sequence[Hashable], seed: int) -> list[int | None]:
    """Permutes labels among regions so that each region gets a label that is not its own.

    Against this control a cosine can be judged: a projector that sends everything to one direction near all words has a
    high cosine with the right label, and the same with a wrong one.

    Args:
        labels: one label a region, over the whole set.
        seed: seed of the permutation.

    Returns:
        For each region the index of the region whose label it gets, each index at most once. `None` where the
        permutation must end: more than half of the regions share one label, so some can only get their own.
    """
    order = list(range(len(labels)))
    generator = random.Random(seed)
    # Groups of equal labels lie together, the groups and the regions within each in random order.
    generator.shuffle(order)
    rank = {label: generator.random() for label in dict.fromkeys(labels)}
    counts = Counter(labels)
    largest = max(counts.values(), default=0)
    order.sort(key=lambda index: rank[labels[index]])
    # A turn by the size of the largest group leads every region out of its own group, unless that group is more than
    # half of all; then those that come back to it have nowhere to go.
    chosen: list[int | None] = [None] * len(labels)
    for position, index in enumerate(order):
        source = order[(position + largest) % len(order)]
        if labels[source] != labels[index]:
            chosen[index] = source
    return chosen
