"""SPICE runs where the user has its jars, with a stand-in for Java here; elsewhere it says why it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.captions.metrics import JARS, SpiceSetup, find_spice, java_version, require_metrics, score_spice

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is part of the extra `eval`")

EXPECTED = {"a": ["a dog", "one dog"], "b": ["two cats"], "c": ["a café"]}
FOUND = {"a": ["a dog"], "b": ["a cat"], "c": [""]}
SCORES_BACKWARDS = """
seen = os.environ["SEEN"]
rows = json.load(open([a for a in sys.argv if a.endswith("in.json")][0]))
json.dump({"arguments": sys.argv[1:], "rows": rows, "folder": os.getcwd()}, open(seen, "w"))
scores = [{"image_id": row["image_id"], "scores": {"All": {"pr": 1, "re": 1, "f": F_SCORES[row["image_id"]]},
           "Object": {"f": 9}}, "test_tuples": []} for row in rows]
json.dump(scores[::-1], open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.fixture
def jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what passes for CoreNLP."""
    monkeypatch.delenv("SPICE_JARS", raising=False)
    monkeypatch.delenv("SPICE_JAVA", raising=False)
    folder = tmp_path / "jars"
    folder.mkdir()
    for name in JARS:
        (folder / name).touch()
    return folder


@pytest.fixture
def run_spice(
    jars: Path, tmp_path: Path, fake_java: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Scores by a stand-in for Java, with these F scores by image; returns the result, and what Java was given."""

    def run(f_scores: str, version: str = "11.0.2") -> tuple[Any, Any]:
        fake_java(f"F_SCORES = {f_scores}" + SCORES_BACKWARDS, version=version)
        monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
        setup = find_spice(jars, None)
        assert isinstance(setup, SpiceSetup)
        return score_spice(EXPECTED, FOUND, setup), json.loads((tmp_path / "seen.json").read_text())

    return run


def test_scores_come_back_in_the_order_of_the_images(run_spice: Callable[..., Any]) -> None:
    scores, seen = run_spice("[0.5, 0.25, 0.0]")
    assert scores == [0.5, 0.25, 0.0]
    assert seen["rows"] == [
        {"image_id": 0, "test": "a dog", "refs": ["a dog", "one dog"]},
        {"image_id": 1, "test": "a cat", "refs": ["two cats"]},
        {"image_id": 2, "test": "", "refs": ["a café"]},
    ]


def test_java_gets_both_sets_of_jars_and_writes_to_a_folder_that_goes_again(
    jars: Path, run_spice: Callable[..., Any]
) -> None:
    _, seen = run_spice("[1, 1, 1]")
    arguments, folder = seen["arguments"], Path(seen["folder"])
    class_path = arguments[arguments.index("-cp") + 1].split(":")
    assert Path(class_path[0]).name == "spice-1.0.jar" and Path(class_path[0]).is_file()
    assert class_path[1] == f"{jars}/*"
    assert "--add-opens=java.base/java.lang=ALL-UNNAMED" in arguments and "-Xmx8G" in arguments
    assert arguments[arguments.index("edu.anu.spice.SpiceScorer") + 1] == str(folder / "in.json")
    assert f"-Djava.io.tmpdir={folder}" in arguments
    assert "-cache" not in arguments
    assert not folder.exists()


def test_java_8_knows_no_modules_to_open(run_spice: Callable[..., Any]) -> None:
    _, seen = run_spice("[1, 1, 1]", version="1.8.0_392")
    assert not [argument for argument in seen["arguments"] if argument.startswith("--add-opens")]


def test_an_image_without_a_number_leaves_a_reason_and_no_mean_over_the_rest(run_spice: Callable[..., Any]) -> None:
    assert run_spice("[1, None, float('nan')]")[0] == "gave no number for 2 of 3 images"


def test_a_run_that_fails_leaves_a_reason_and_no_zero(jars: Path, fake_java: Callable[..., Path]) -> None:
    trace = 'Exception in thread "main" java.lang.NoClassDefFoundError: edu/stanford/nlp\\n\\tat edu.anu.spice.Main'
    fake_java(f'print("Parsing", file=sys.stderr)\nprint("""{trace}""", file=sys.stderr)\nsys.exit(1)')
    setup = find_spice(jars, None)
    assert isinstance(setup, SpiceSetup)
    reason = score_spice(EXPECTED, FOUND, setup)
    assert reason == (
        "its Java process ended with status 1 and no result: "
        'Exception in thread "main" java.lang.NoClassDefFoundError: edu/stanford/nlp'
    )


def test_without_jars_spice_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPICE_JARS", raising=False)
    reason = find_spice(None, None)
    assert isinstance(reason, str)
    assert "stanford-corenlp-3.6.0-models.jar" in reason and "--spice-jars or SPICE_JARS" in reason


def test_jars_may_come_by_the_environment(
    jars: Path, fake_java: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_java()
    monkeypatch.setenv("SPICE_JARS", str(jars))
    monkeypatch.setenv("SPICE_JAVA", str(program))
    assert find_spice(None, None) == SpiceSetup(jars, str(program), 11)


def test_a_folder_that_lacks_a_jar_is_refused(jars: Path) -> None:
    (jars / JARS[1]).unlink()
    with pytest.raises(OSError, match=r"found no stanford-corenlp-3\.6\.0-models\.jar in "):
        find_spice(jars, None)


def test_a_java_without_javascript_is_refused_unless_there_is_a_jar_for_it(
    jars: Path, fake_java: Callable[..., Path]
) -> None:
    fake_java(version="17.0.15")
    with pytest.raises(OSError, match=r"found Java 17, .* next: --spice-java PATH of a Java 8 or 11"):
        find_spice(jars, None)
    (jars / "nashorn-core-15.4.jar").touch()
    assert find_spice(jars, None) == SpiceSetup(jars, "java", 17)


@pytest.mark.parametrize(("told", "version"), [("1.8.0_392", 8), ("11.0.2", 11), ("17.0.15", 17), ("21", 21)])
def test_versions_of_java_are_read(fake_java: Callable[..., Path], told: str, version: int) -> None:
    fake_java(version=told)
    assert java_version() == version


def test_a_missing_java_is_one_sentence_with_the_next_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"java: found no such program, .* next: apt-get install default-jre-headless"):
        require_metrics()


def test_a_java_that_does_not_start_is_no_java(tmp_path: Path) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match=r"found 'Unable to locate a Java Runtime\.', expected a version"):
        java_version(str(program))
