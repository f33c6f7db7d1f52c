"""What builds the stages refuses at once what would end the run later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from patch_aligned.annotate.options import ModelOptions, Selection
from patch_aligned.annotate.stages import build_stages


def test_a_tag_that_makes_no_prompt_is_refused_before_any_image_has_it(models: ModelOptions, tmp_path: Path) -> None:
    tags = models.ram_tag_list.read_text().splitlines()
    tags[7] = "word " * 300
    (tmp_path / "tags.txt").write_text("\n".join(tags))
    with pytest.raises(ValueError, match=r"found 300 tokens, expected 1 to 253\. Correct the list of tags"):
        build_stages(replace(models, ram_tag_list=tmp_path / "tags.txt"), Selection(), "cpu")


def test_thresholds_below_the_candidates_are_refused_before_a_model_is_loaded(models: ModelOptions) -> None:
    with pytest.raises(ValueError, match=r"box_threshold: found 0.1, expected 0.15 or more"):
        build_stages(replace(models, sam="nowhere"), Selection(box_threshold=0.1), "cpu")
