"""The command's options: their defaults stand twice, as `--help` may not load what they configure."""

from __future__ import annotations

from dataclasses import asdict, fields

import typer.main

from patch_aligned.annotate.pipeline import Workload
from patch_aligned.annotate.regions import CandidateThresholds, Selection
from patch_aligned.annotate.run import ModelRecipe
from patch_aligned.cli import app


def test_the_options_defaults_are_those_of_the_classes() -> None:
    command = typer.main.get_command(app).commands["annotate"]  # type: ignore[attr-defined]
    options = {option.name: option.default for option in command.params}
    of_recipe = {field.name: field.default for field in fields(ModelRecipe) if field.name in options}
    for name in ("ram", "ram_tag_list", "ram_thresholds", "detector", "sam", "detector_revision", "sam_revision"):
        del of_recipe[name]  # without a default, or pinned on the hub
    expected = {
        **asdict(Selection()),
        **asdict(Workload()),
        **{f"candidate_{name}_threshold": value for name, value in CandidateThresholds()._asdict().items()},
        **of_recipe,
    }
    assert {name: options[name] for name in expected} == expected
    assert set(of_recipe) == {"resample", "prompt_join", "segment_candidates", "dtype"}
