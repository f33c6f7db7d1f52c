"""The small annotated world of the analysis, and a page over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.load import load_models
from patch_aligned.pad import open_annotation_index
from tests.patch_aligned.analysis.conftest import pad, write_pad  # noqa: F401

ADDRESS = "http://127.0.0.1:8300"


@pytest.fixture(autouse=True)
def needs_the_extra() -> None:
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason="extra `explore`")


@pytest.fixture
def models(golden_world: Path) -> list[VisionLanguageModel]:
    return load_models(["random=random:1", "start=train_init/mm_projector.bin"], "tiny-vicuna", "tiny-clip")


@pytest.fixture
def page_over(tmp_path: Path) -> Callable:
    """Serves models with the images of a PAD file to a client that calls as the page itself does."""

    def serve(models: Sequence[VisionLanguageModel], pad: Path | None):  # noqa: F811
        from starlette.testclient import TestClient

        from patch_aligned.explore.app import create_app
        from patch_aligned.explore.session import Session

        index = None if pad is None else open_annotation_index(pad, tmp_path / "cache")
        session = Session(models, index, tmp_path / "pictures")
        return TestClient(create_app(session, ("127.0.0.1", "localhost")), ADDRESS, headers={"Origin": ADDRESS})

    return serve
