"""The command `analyze`: what it writes and prints, how it fails, and that help and the package cost nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.analysis.cli import analyze
from patch_aligned.analysis.words import WORD_LISTS
from patch_aligned.annotated_sets import FORMATS
from patch_aligned.cli import app
from tests.patch_aligned.analysis.conftest import rectangle


def invoke(pad: Path, output: Path, **changed: str | None):
    options: dict[str, str | None] = {
        "--projector": "start=train_init/mm_projector.bin",
        "--base": "tiny-vicuna",
        "--vision-tower": "tiny-clip",
        "--data": str(pad),
        "--image-folder": str(pad.parent / "pictures"),
        "--output": str(output),
        "--english": "none",
        "--resamples": "20",
    }
    options |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    return CliRunner().invoke(app, ["analyze", "--projector", "random=random:3", *words])


def test_a_report_its_numbers_and_pictures_are_written(pad: Path, tmp_path: Path):
    output = tmp_path / "out"
    result = invoke(pad, output, threshold_rule="otsu", picture_rows="2", token_maps="1", rounds="2", random_init="2")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == [
        "analysis.json", "localisation.png", "report.html", "report.md", "run.json", "spectra.svg", "token_map.html",
        "token_map.json", "token_map_001_0.png",
    ]  # fmt: skip
    document = json.loads((output / "analysis.json").read_text())
    assert list(document["models"]) == ["random", "start"]
    assert document["settings"]["measure"]["threshold_rule"] == "otsu"
    assert document["models"]["start"]["untrained"]["seeds"] == [0, 1]
    assert len(document["picture"]) == 2
    provenance = document["provenance"]
    assert provenance["image_aspect_ratio"] == "square"
    assert provenance["sha256"].keys() == {"tiny-clip", "tiny-vicuna", "train_init/mm_projector.bin"}
    record = json.loads((output / "run.json").read_text())
    assert record["sha256"] == {"data": hashlib.sha256(pad.read_bytes()).hexdigest(), **provenance["sha256"]}
    assert record["flags"]["threshold_rule"] == "otsu" and record["sittings"][0]["ended"]
    (mapped,) = json.loads((output / "token_map.json").read_text())["images"]
    assert len(mapped["maps"][0]["captions"]) == 2
    assert "start" in result.output


def test_without_pictures_none_is_written_and_an_earlier_reports_are_removed(pad: Path, tmp_path: Path):
    output = tmp_path / "out [/b]"  # no markup of the terminal's
    assert invoke(pad, output).exit_code == 0
    (output / "notes.txt").touch()
    result = invoke(pad, output, picture_rows="0")
    assert result.exit_code == 0
    assert str(output / "report.html") in result.output
    assert sorted(path.name for path in output.iterdir()) == [
        "analysis.json", "notes.txt", "report.html", "report.md", "run.json", "spectra.svg",
    ]  # fmt: skip


def test_an_output_that_cannot_be_written_or_a_word_list_that_is_missing_shows_before_the_images_are_read(
    pad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("patch_aligned.models.load.load_models", lambda *_: pytest.fail("too late"))
    assert_refused(invoke(pad, pad), f"found a file at {pad}; expected a folder", tmp_path)
    assert_refused(invoke(pad, pad / "out"), f"found a file at {pad}; expected a folder", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)
        assert_refused(invoke(pad, tmp_path / "out" / "in"), f"{tmp_path} may not be written to", tmp_path)
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert_refused(invoke(pad, tmp_path / "out", english="nltk"), "'nltk' is not installed", tmp_path)


def test_broken_images_stop_the_command_unless_they_are_to_be_skipped(pad: Path, tmp_path: Path):
    (pad.parent / "pictures" / "0.png").write_text("no image")
    assert_refused(invoke(pad, tmp_path / "out"), "leave images like it out with --on_error skip", tmp_path)
    result = invoke(pad, tmp_path / "out", on_error="skip")
    assert result.exit_code == 0, result.output
    assert "Left out: 1 images" in result.output


def test_a_limit_chooses_by_seed_unless_the_first_are_asked_for(pad: Path, tmp_path: Path):
    def shown(**changed: str) -> list[str]:
        assert invoke(pad, tmp_path / "out", limit="2", token_maps="0", **changed).exit_code == 0
        document = json.loads((tmp_path / "out" / "analysis.json").read_text())
        return [row["image_id"] for row in document["picture"]]

    assert shown(subset="first") == ["0.png"]  # the second image has no regions
    assert len({tuple(shown(seed=str(seed))) for seed in range(6)}) > 1


def test_names_of_a_file_are_asked_of_the_llm(pad: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("dog, hounds\n\nred car\nzebra\n")
    options = {"names": "names.txt", "name_stem": "A picture of a", "token_maps": "0", "random_init": "0"}
    result = invoke(pad, tmp_path / "out", **options)
    assert result.exit_code == 0, result.output
    assert "bound" in result.output
    document = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert document["settings"]["names"]["names"] == {"dog": ["hounds"], "red car": [], "zebra": []}
    assert document["models"]["start"]["figures"]["name_bound"]["regions"] == 3
    assert len(document["models"]["start"]["names"]["caption_of"]) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projector": "start=nowhere"}, "there is no nowhere"),
        ({"projector": "train_init"}, "expected NAME=PATH"),
        ({"projector": "start=tiny-vicuna", "vision_tower": None}, "tiny-vicuna holds no projector"),
        ({"vision_tower": None}, "pass --vision-tower PATH"),
        ({"base": None}, "--base is missing"),
        ({"base": "images"}, "No weights at images: expected model.safetensors"),
        ({"data": "missing.json"}, "--data missing.json: there is no such file"),
        ({"image_folder": "missing"}, "--image-folder missing: there is no such folder"),
        ({"region_kind": "object", "limit": "1", "subset": "first"}, "no regions of kind 'object'"),
        ({"names": "missing.txt"}, "--names missing.txt: there is no such file"),
        ({"names": "images/empty.txt"}, "--names images/empty.txt: found no name"),
        ({"name_stem": "A"}, "--name-stem: found it without --names"),
        ({"device": "cuda:9"}, "--device cuda:9: torch sees no CUDA device here"),
        ({"device": "gpu"}, "--device gpu: unknown device"),
    ],
)
def test_wrong_input_ends_with_a_sentence_and_code_2(
    pad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("images/empty.txt").touch()
    assert_refused(invoke(pad, tmp_path / "out", **changed), message, tmp_path)


@pytest.mark.parametrize("content", ['{"mm_projector_type":', "[]"])
@pytest.mark.parametrize("place", ["train_init", "train_init/mm_projector.bin"])
def test_a_broken_config_beside_a_projector_is_named(pad: Path, tmp_path: Path, content: str, place: str):
    Path("train_init/config.json").write_text(content)
    result = invoke(pad, tmp_path / "out", projector=f"start={place}")
    assert_refused(result, "config.json", tmp_path)
    assert "a checkpoint's config" in result.output


def test_sets_without_regions_or_without_covered_tokens_are_refused(write_pad: Callable, tmp_path: Path):
    result = invoke(write_pad([], []), tmp_path / "out")
    assert_refused(result, "no regions in 2 images", tmp_path)
    result = invoke(write_pad([rectangle(26, 14, 29, 17, "cup")]), tmp_path / "out")
    assert_refused(result, "none of the 1 regions covers a token", tmp_path)


def test_a_table_smaller_than_its_tokenizer_is_refused(pad: Path, tmp_path: Path):
    weights = load_file("tiny-vicuna/model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:900].clone()
    save_file(weights, "tiny-vicuna/model.safetensors", metadata={"format": "pt"})
    assert_refused(invoke(pad, tmp_path / "out"), "ids up to 999, but its table", tmp_path)


def assert_refused(result, message: str, tmp_path: Path) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_comes_from(pad: Path, tmp_path: Path):
    words = ["--debug", "analyze", "--projector", "a=nowhere", "--base", "b", "--data", str(pad)]
    result = CliRunner().invoke(app, [*words, "--image-folder", str(tmp_path), "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, FileNotFoundError)


def test_the_choices_of_the_command_are_those_there_are():
    hints = get_type_hints(analyze)
    assert get_args(hints["threshold_rule"]) == tuple(THRESHOLD_RULES)
    assert get_args(hints["data_format"]) == FORMATS
    assert get_args(hints["english"]) == WORD_LISTS


def test_help_and_the_package_import_no_torch():
    code = (
        "import sys; import patch_aligned.analysis as a; assert 'analyse' in a.__all__; "
        "from typer.testing import CliRunner; from patch_aligned.cli import app; "
        "assert 'analyze' in CliRunner().invoke(app, ['--help']).output; sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_package_offers_what_it_lists():
    import patch_aligned.analysis as package
    import patch_aligned.analysis.localisation
    import patch_aligned.analysis.run  # noqa: F401  # a module of a function's name would hide it once it is imported

    assert all(callable(getattr(package, name)) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'measure_everything'"):
        package.measure_everything  # noqa: B018
