"""SPICE, where the user has what it needs: pycocoevalcap ships its code, not the CoreNLP 3.6.0 that it parses with.

Java is started from here and not by pycocoevalcap, which downloads CoreNLP without asking and writes beside the
installed package. Its cache of parsed references is left out: the library that it is written with does not work on
today's Java.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from eval.captions.java import JavaError, java_version

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
JARS_VARIABLE = "SPICE_JARS"
JAVA_VARIABLE = "SPICE_JAVA"
HEAP = "8G"
# SPICE writes its result by way of the JavaScript that Java had up to 14, and that nashorn-core brings back.
LAST_JAVA_WITH_JAVASCRIPT = 14
JAVASCRIPT_JAR = "nashorn-core-*.jar"
_OPENED = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.io", "java.nio")
_FIRST_JAVA_WITH_MODULES = 9


@dataclass(frozen=True)
class SpiceSetup:
    """What SPICE is run with.

    Attributes:
        jars: folder of the user's jars, all of which are seen.
        java: the program.
        java_version: its major version.
    """

    jars: Path
    java: str
    java_version: int


def find_spice(jars: Path | None, java: str | None) -> SpiceSetup | str:
    """What SPICE needs, by option or by environment (`SPICE_JARS`, `SPICE_JAVA`).

    Returns:
        The set-up, or why SPICE is not available where nobody asked for it.

    Raises:
        JavaError: it was asked for, and cannot run; the message says what is missing.
    """
    given = jars or os.environ.get(JARS_VARIABLE)
    if not given:
        return f"needs {JARS[0]} and {JARS[1]}: give their folder by --spice-jars or {JARS_VARIABLE}"
    folder = Path(given)
    if missing := [name for name in JARS if not (folder / name).is_file()]:
        raise JavaError(
            f"--spice-jars: found no {' and no '.join(missing)} in {folder}; they are in "
            "stanford-corenlp-full-2015-12-09.zip of CoreNLP 3.6.0"
        )
    program = java or os.environ.get(JAVA_VARIABLE) or "java"
    version = java_version(program)
    if version > LAST_JAVA_WITH_JAVASCRIPT and not any(folder.glob(JAVASCRIPT_JAR)):
        raise JavaError(
            f"--spice-jars: found Java {version}, and SPICE writes its result by the JavaScript that Java has up to "
            f"{LAST_JAVA_WITH_JAVASCRIPT}; next: --spice-java PATH of a Java 8 or 11, or put {JAVASCRIPT_JAR} with its "
            f"asm jars into {folder}"
        )
    return SpiceSetup(folder, program, version)


def score_spice(
    expected: Mapping[str, list[str]], found: Mapping[str, list[str]], setup: SpiceSetup
) -> list[float] | str:
    """The F-score of each image's tuples, in the order of `expected`, or why there is none.

    Args:
        expected: reference captions of each image, tokenized.
        found: one caption of each, tokenized.
        setup: of `find_spice`.
    """
    rows = [
        {"image_id": number, "test": found[image][0], "refs": captions}
        for number, (image, captions) in enumerate(expected.items())
    ]
    with tempfile.TemporaryDirectory(prefix="spice-") as name:
        folder = Path(name)
        (folder / "in.json").write_text(json.dumps(rows), encoding="utf-8")
        done = subprocess.run(_command(setup, folder), cwd=folder, capture_output=True, text=True, check=False)
        try:
            result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"its Java process ended with status {done.returncode} and no result: {_last_words(done.stderr)}"
    f_scores = {row["image_id"]: row["scores"]["All"]["f"] for row in result}
    numbers = [f_scores.get(number) for number in range(len(rows))]
    undefined = sum(number is None or not math.isfinite(number) for number in numbers)
    if undefined:
        return f"gave no number for {undefined} of {len(rows)} images"
    return [float(number) for number in numbers if number is not None]


def _command(setup: SpiceSetup, folder: Path) -> list[str]:
    spec = find_spec("pycocoevalcap.spice")
    assert spec is not None and spec.origin is not None
    jar = Path(spec.origin).with_name("spice-1.0.jar")
    opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED]
    return [
        setup.java,
        *(opened if setup.java_version >= _FIRST_JAVA_WITH_MODULES else ()),
        f"-Xmx{HEAP}",
        f"-Djava.io.tmpdir={folder}",
        "-cp",
        os.pathsep.join([str(jar), str(setup.jars.resolve() / "*")]),
        "edu.anu.spice.SpiceScorer",
        str(folder / "in.json"),
        *("-out", str(folder / "out.json"), "-subset", "-silent"),
    ]


def _last_words(stderr: str) -> str:
    """What an exception says: its own line rather than the places it came through."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.strip().startswith("at ")]
    return next((line for line in lines if "Exception" in line or "Error" in line), lines[-1] if lines else "")
