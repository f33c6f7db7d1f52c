"""A control for cosines: every region with the label of another."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence


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
