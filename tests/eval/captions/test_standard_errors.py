"""The standard error of a metric that is a mean over images. No Java is needed for it."""

from __future__ import annotations

import math

import pytest

from eval.captions.metrics import mean_and_stderr


def test_the_error_of_a_mean_falls_with_the_root_of_the_count() -> None:
    mean, stderr = mean_and_stderr([1.0, 0.0, 0.5, 0.5])  # their sample variance is 1 / 6
    assert (mean, stderr) == (0.5, pytest.approx(math.sqrt(1 / 6) / math.sqrt(4), rel=1e-12))
    assert mean_and_stderr([0.25]) == (0.25, None)
