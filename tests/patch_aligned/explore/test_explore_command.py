"""The command: what it refuses before it loads anything, and what it prints and serves."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patch_aligned.cli import app

PROJECTORS = ["one=random:0", "train_init/mm_projector.bin", "--base", "tiny-vicuna", "--vision-tower", "tiny-clip"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What the command would serve: the application, and the socket's address."""
    found: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "uvicorn.Server.run", lambda server, sockets: found.append((server.config.app, sockets[0].getsockname()))
    )
    return found


def test_models_are_served_on_a_free_port_of_this_machine_alone(
    golden_world: Path, pad: Path, served: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
):
    from starlette.testclient import TestClient

    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", str(golden_world / "cache"))
    given = ["--data", str(pad), "--image-folder", str(pad.parent / "pictures"), "--port", "0", "--open"]
    result = CliRunner().invoke(app, ["explore", *PROJECTORS, *given])
    assert result.exit_code == 0, result.output
    ((application, (host, port)),) = served
    address = f"http://127.0.0.1:{port}/"
    assert host == "127.0.0.1" and port > 0 and opened == [address]
    assert f"Explore one, train_init: {address}" in result.output
    page = TestClient(application, address).get("/").text
    assert '"one":"random weights, seed 0' in page and '"images":4' in page


def test_wrong_input_is_one_sentence_before_anything_is_loaded(
    pad: Path, served: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
):
    def no_load(*args: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("patch_aligned.models.load.load_encoder", no_load)
    monkeypatch.setattr("patch_aligned.models.load.load_transformers", no_load)

    def refused(*words: str) -> str:
        result = CliRunner().invoke(app, ["explore", *words])
        assert result.exit_code == 2, result.output
        assert not served
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())

    assert "there is no nowhere" in refused("x=nowhere", "--base", "tiny-vicuna", "--port", "0")
    assert "nowhere" in refused("x=random", "--base", "nowhere", "--vision-tower", "tiny-clip", "--port", "0")
    assert "--base is missing" in refused("x=random", "--port", "0")
    assert "given twice" in refused("x=random", "x=random:1", "--base", "tiny-vicuna", "--port", "0")
    assert "expected both" in refused(*PROJECTORS, "--data", str(pad))
    assert "expected both" in refused(*PROJECTORS, "--image-folder", "images")
    assert "--data none.json" in refused(*PROJECTORS, "--data", "none.json", "--image-folder", "images")
    assert "--image-folder none" in refused(*PROJECTORS, "--data", str(pad), "--image-folder", "none")
    assert "--host 0.0.0.0" in refused(*PROJECTORS, "--host", "0.0.0.0")
    assert "--port" in refused(*PROJECTORS, "--port", "70000")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        assert f"--port {taken}: cannot listen there" in refused(*PROJECTORS, "--port", taken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "patch-aligned-llava[explore]" in refused(*PROJECTORS)


def test_a_link_keeps_what_is_shown():
    if shutil.which("node") is None:
        pytest.skip("node runs the page's script")
    script = str(resources.files("patch_aligned.explore").joinpath("explore.js"))
    code = f"""const page = require({script!r});
    const states = [
      {{ image: "a/b & c.png", word: "red car", at: [3, 4], region: null, less: ["one,x", "other"] }},
      {{ image: "upload:0", word: "", at: null, region: [0, 0, 10, 0, 10, 10], less: null }},
    ];
    for (const state of states)
      require("assert").deepStrictEqual(page.readState(page.writeState(state)), state);
    require("assert").equal(page.readState("at=1,x").at, null);
    require("assert").equal(page.colourAt([[0, 0, 0], [100, 0, 0], [200, 50, 0]], 0.75), "rgb(150 25 0)");"""
    subprocess.run(["node", "-e", code], check=True)
