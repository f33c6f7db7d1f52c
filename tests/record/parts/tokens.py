"""Which visual tokens a region covers: 5,760 cases, masks with cells of which exactly half is covered among them."""

from __future__ import annotations

import json

import numpy as np
from product import Facts, Product, covered_tokens, sha256

VIEWS = [
    {"mode": mode, "side": side, "grid": [cells, cells], "processed_side": processed}
    for mode in ("crop", "pad", "squeeze")
    for side, cells, processed in ((336, 24, None), (224, 16, None), (378, 27, 384), (56, 4, None))
]
SHARES = (0.5, 0.02)


def record(product: Product) -> Facts:
    """By view and image: a hash of the covered tokens of its 40 masks at each share, and how many each mask covers."""
    facts: Facts = {}
    with (product.inputs / "masks.jsonl").open() as file:
        images = [json.loads(line) for line in file]
    for view in VIEWS:
        for image in images:
            size_wh = tuple(image["size_wh"])
            name = f"{view['mode']} {view['side']} {size_wh[0]}x{size_wh[1]}"
            covered = {share: covered_tokens(image["rle_masks"], size_wh, view, share) for share in SHARES}
            facts[name] = {
                "counts": covered[0.5].sum(axis=1).tolist(),
                "sha256": {str(share): sha256(np.packbits(mask).tobytes()) for share, mask in covered.items()},
            }
    assert sum(len(image["counts"]) for image in facts.values()) == 5760
    return facts
