"""Options that a command takes from dataclasses: each is given to its class, or only those that were given."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.testing import CliRunner

from patch_aligned.annotate.options import Selection, Workload, with_options


def command(
    context: typer.Context, workload: Workload, changes: Annotated[dict[str, Any], Selection], name: str = "a"
) -> None:
    typer.echo(f"{name} {workload.tag_batch} {workload.on_error} {workload.chunk} {changes}")


def said(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(with_options(command))
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_fields_of_dataclasses_are_options_with_their_defaults_and_bounds() -> None:
    assert said() == (0, "a 64 skip 256 {}\n")
    assert said("--tag-batch", "3", "--on-error", "fail", "--name", "b") == (0, "b 3 fail 256 {}\n")
    assert said("--tag-batch", "0")[0] == said("--on-error", "stop")[0] == 2


def test_of_changes_only_those_that_are_given_are_there() -> None:
    given = ("--nms-iou", "0", "--label-mode", "best_tag")
    assert said(*given) == (0, "a 64 skip 256 {'nms_iou': 0.0, 'label_mode': 'best_tag'}\n")
