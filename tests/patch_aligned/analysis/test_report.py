"""The report: it says what the analysis found, with every rule; it is one file, safe, and names all its pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models, token_maps, write_report
from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.analysis.names import NameSettings
from patch_aligned.analysis.regions import METRICS, SCORES_BY_NAME
from patch_aligned.analysis.report import (
    MOST_BROKEN_IMAGES,
    ON_PAGE,
    differences_table,
    entropy_table,
    headline_table,
    health_table,
    metrics_table,
    names_table,
    provenance_of,
    report_markdown,
)
from patch_aligned.analysis.run import Analysis
from patch_aligned.analysis.words import PursuitSettings
from patch_aligned.intervals import Resampling
from patch_aligned.tables import Cell, number
from tests.patch_aligned.analysis.conftest import REGIONS, rectangle, write_images

GOLDENS = Path(__file__).parents[2] / "goldens" / "llava"
SPECIFICATIONS = ("random=random:1", f"start={GOLDENS}/train_init/mm_projector.bin")
PLACES = (str(GOLDENS / "tiny-vicuna"), str(GOLDENS / "tiny-clip"))


def run(pad: Path, *specifications: str, seeds: tuple[int, ...] = (0, 1), **settings: object) -> Analysis:
    models = load_models(specifications or SPECIFICATIONS, *PLACES)
    measure = MeasureSettings(pad, pad.parent / "pictures", **settings)  # type: ignore[arg-type]
    return analyse(models, AnalysisSettings(measure, Resampling(30), seeds))


def page(analysis: Analysis, pad: Path, folder: Path) -> str:
    models = load_models(SPECIFICATIONS, *PLACES)
    images = [(row.image_id, pad.parent / "pictures" / row.image_id) for row in analysis.picture[:1]]
    maps = token_maps(models, images, PursuitSettings(rounds=2), "none")
    written = write_report(analysis, folder, maps, provenance_of(models))
    assert all(path.is_file() for path in written)
    return written[0].read_text()


@pytest.fixture
def write_pad(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_images, tmp_path)


@pytest.fixture(scope="module")
def analysis_and_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Analysis, str]:
    """What most tests look at: two projectors and two untrained ones, and the page with two pictures."""
    folder = tmp_path_factory.mktemp("report")
    pad = write_images(folder, *REGIONS)
    analysis = run(pad, threshold_rule="otsu", picture_rows=2)
    return analysis, page(analysis, pad, folder / "out")


@pytest.fixture
def analysis(analysis_and_page: tuple[Analysis, str]) -> Analysis:
    return analysis_and_page[0]


@pytest.fixture
def text(analysis_and_page: tuple[Analysis, str]) -> str:
    return analysis_and_page[1].replace("<wbr>", "").replace("&#39;", "'")


# --- tables -------------------------------------------------------------------------------------------------------


def test_tables_hold_the_analysis_numbers(analysis: Analysis):
    start = analysis.models["start"]
    head = dict(zip(headline_table(analysis).columns, headline_table(analysis).rows[1], strict=True))
    align = start.metrics.loc["align_px"]
    assert head["Align(V, W)"] == Cell(number(align["value"]), f"{number(align['low'])} … {number(align['high'])}")
    assert head["ΔH"].text == number(start.entropy_drop_nats)
    entropies = dict(zip(entropy_table(analysis).columns, entropy_table(analysis).rows[1], strict=True))
    assert entropies["effective rank after"] == Cell(number(start.entropy_after.effective_rank, 1), "of 64")
    (pair,) = differences_table(analysis).rows
    assert pair[0].text == "start − random"
    assert pair[1].text == number(analysis.comparisons[0].metrics.loc["align_px", "value"])


def test_projectors_of_one_shape_share_a_row_of_untrained_ones(analysis: Analysis, pad: Path):
    names = [row[0] for row in headline_table(analysis).rows]
    assert names == [Cell("random"), Cell("start"), Cell("untrained", "± sd, 2 seeds")]
    untrained = analysis.models["start"].untrained
    assert untrained is not None
    assert headline_table(analysis).rows[2][4].text == number(untrained.metrics.loc["align_px", "mean"])
    assert len(headline_table(run(pad, seeds=())).rows) == 2


def test_every_metric_on_the_page_stands_beside_its_rule(analysis: Analysis):
    shown = {row[0].text: row[0].aside for row in metrics_table(analysis).rows}
    assert "otsu" in shown["align_px"]
    assert shown == {name: analysis.rules[name] for name in ON_PAGE if name not in SCORES_BY_NAME}  # no LLM was run
    left_out = METRICS.keys() - set(ON_PAGE)  # the JSON has them
    assert left_out == {f"align_px_{rule}" for rule in THRESHOLD_RULES}


def test_names_that_the_llm_reads_have_a_table_of_their_own(pad: Path, tmp_path: Path):
    assert names_table(run(pad, seeds=())) is None
    models = load_models(SPECIFICATIONS, *PLACES)
    measure = MeasureSettings(pad, pad.parent / "pictures", picture_rows=1)
    asked = NameSettings(stems=("A <picture> of a",), max_new_tokens=2)
    analysis = analyse(models, AnalysisSettings(measure, Resampling(30), (), asked))
    table = names_table(analysis)
    assert table is not None
    start = analysis.models["start"]
    assert table.rows[1][1].text == number(start.metrics.loc["name_bound", "value"], 2)
    assert start.names is not None
    assert table.rows[1][5].text == number(start.names.captions.loc["recall", "value"], 2)
    shown = page(analysis, pad, tmp_path / "out").replace("<wbr>", "")
    assert "A &lt;picture&gt; of a" in shown.replace("\\u003c", "&lt;").replace("\\u003e", "&gt;")
    assert table.markdown() in report_markdown(analysis)


def test_the_floor_and_the_controls_stand_beside_the_headline(analysis: Analysis):
    start = analysis.models["start"]
    row = dict(zip(health_table(analysis).columns, health_table(analysis).rows[1], strict=True))
    assert row["contrast"].text == number(start.metrics.loc["contrast", "value"], 2)
    assert row["Align, other label"].text == number(start.metrics.loc["shuffled_align_px", "value"])
    assert row["floor"].text == number(start.cosine_floor, 2)
    assert health_table(analysis).markdown() in report_markdown(analysis)


def test_the_markdown_has_the_papers_table_below(write_pad: Callable):
    pad = write_pad([rectangle(12, 0, 40, 28, "dog"), rectangle(26, 14, 29, 17, "cup")])  # one covers no token
    text = report_markdown(run(pad, seeds=()))
    assert "1 images, 2 regions: 1 cover no token" in text
    assert "| patch-aligned | 4.835 | 1.000 | 3.835 | 0.279 | 0.56 |" in text
    assert "7B scale" in text


def test_models_that_count_other_regions_are_told_apart(pad: Path, tmp_path: Path):
    analysis = run(pad, picture_rows=1, seeds=())
    assert "different regions" not in page(analysis, pad, tmp_path / "same")
    start = analysis.models["start"]
    other = replace(start, counts=start.counts | {"regions_outside": 0})
    analysis = replace(analysis, models=analysis.models | {"start": other})
    assert "different regions" in page(analysis, pad, tmp_path / "other")
    assert "(of random; the page has the counts of all)" in report_markdown(analysis)


def test_the_json_is_strict_and_says_where_numbers_come_from(analysis: Analysis, tmp_path: Path):
    write_report(analysis, tmp_path / "out", provenance={"device": "cpu", "broken": float("nan")})
    again = json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert again["provenance"] == {"device": "cpu", "broken": None}
    assert again["models"]["start"]["figures"].keys() == METRICS.keys()
    assert again["paper_table_3_at_7b_scale"]["patch-aligned"]["align_px"] == 0.279


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing(text: str):
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("default-src 'none'") == 1


def test_every_picture_says_what_it_shows_and_every_table_scrolls(text: str):
    pictures = re.findall(r"<img [^>]*>", text)
    words = [picture for picture in pictures if re.search(r'alt="[^"]+, word \d', picture)]
    assert len(words) == 2 * 2  # projectors, rounds
    assert len(pictures) - len(words) == 2 * (1 + 2 * 2)  # truth, and a pair for each projector
    assert all(re.search(r'alt="[^"]+"', picture) for picture in pictures)
    assert text.count("<table>") == len(re.findall(r'<div class="scroll[^>]*><table>', text)) == 10


@pytest.mark.parametrize("variant", ["orthogonal", "absolute"])
def test_only_the_papers_pursuit_is_called_the_papers(pad: Path, tmp_path: Path, variant: str):
    analysis, models = run(pad, picture_rows=0, seeds=()), load_models(SPECIFICATIONS, *PLACES)
    images = [("0.png", pad.parent / "pictures" / "0.png")]
    for settings, named in ((PursuitSettings(1), True), (PursuitSettings(1, **{variant: True}), False)):
        text = write_report(analysis, tmp_path / "out", token_maps(models, images, settings, "none"))[0].read_text()
        assert ("Algorithm 1" in text) == named
        assert settings.described() in text


def test_every_rule_and_hash_is_on_the_page(analysis: Analysis, text: str):
    for name in set(ON_PAGE) - set(SCORES_BY_NAME):  # no LLM was run
        assert analysis.rules[name] in text
    provenance = provenance_of(load_models(SPECIFICATIONS, *PLACES))
    assert len(provenance["sha256"]) == 3
    assert all(digest[:16] in text for digest in provenance["sha256"].values())


def test_hostile_labels_and_names_are_text(write_pad: Callable, tmp_path: Path):
    hostile = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"
    pad = write_pad([rectangle(12, 0, 40, 28, hostile), rectangle(40, 28, 68, 56, "dog")])
    pad = pad.rename(pad.with_name("<script>alert(2)<").with_suffix(".jsonl"))
    (pad.parent / "pictures" / "0.png").rename(pad.parent / "pictures" / "<script>alert(3).png")
    pad.write_text(pad.read_text().replace("0.png", "<script>alert(3).png"))
    models = load_models(["<script>alert(4)=random:1"], *PLACES)
    settings = AnalysisSettings(MeasureSettings(pad, pad.parent / "pictures", picture_rows=1), Resampling(30))
    analysis = analyse(models, settings)
    assert analysis.picture[0].label == hostile
    text = page(analysis, pad, tmp_path / "out")
    assert "<script" not in text
    assert "<img src=x" not in text
    shown = text.replace("<wbr>", "")
    assert "<h3>&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x" in shown  # the region's label
    for name in (2, 3, 4):  # names of the file, of an image, and of a model
        assert f"&lt;script&gt;alert({name})" in shown


def test_names_and_labels_are_drawn_as_they_are_written(
    write_pad: Callable, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    label = "a $\\frac{1$ bill \U000e0100的 that hangs on a wall in a house far away from here"
    pad = write_pad([rectangle(12, 0, 40, 28, label)])
    analysis = run(pad, "_a$\\frac{=random", picture_rows=1, seeds=())
    write_report(analysis, tmp_path / "out")
    drawn = (tmp_path / "out" / "spectra.svg").read_text()
    assert "<!-- _a$\\frac{: effective rank" in drawn
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]


def test_regions_left_out_are_counted_by_reason(text: str):
    assert "All annotations of the file are regions." in text
    row = re.search(r'<th scope="row">start</th>((?:<td>[\d,]+</td>)+)', text)
    assert row is not None
    assert re.findall(r"<td>(\d+)</td>", row.group(1)) == ["3", "0", "7", "1", "1"]


def test_images_left_out_are_counted_and_named_with_their_reasons(pad: Path, tmp_path: Path):
    (pad.parent / "pictures" / "0.png").write_text("no image")
    analysis = run(pad, picture_rows=1, seeds=(), on_error="skip")
    text = page(analysis, pad, tmp_path / "out").replace("<wbr>", "")
    assert "3 images (1 more were left out)" in text
    assert re.search(r"<h3>1 images that cannot be measured</h3><dl><dt>0\.png</dt><dd>[^<]+expected an image", text)
    assert "1 more images were left out" in report_markdown(analysis)
    document = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(document["broken_images"]) == ["0.png"]

    many = replace(analysis, broken_images={f"{number}.png": "gone" for number in range(MOST_BROKEN_IMAGES + 1)})
    text = page(many, pad, tmp_path / "many")
    assert (text.count("<dd>gone</dd>"), text.count("analysis.json has all")) == (MOST_BROKEN_IMAGES, 1)


def test_the_spectra_are_one_drawing_the_same_each_time(pad: Path, tmp_path: Path):
    analysis = run(pad, picture_rows=0, seeds=())
    first, second = (write_report(analysis, tmp_path / name) for name in ("a", "b"))
    drawings = [next(path for path in paths if path.suffix == ".svg") for paths in (first, second)]
    assert drawings[0].read_bytes() == drawings[1].read_bytes()
    assert ElementTree.parse(drawings[0]).getroot().tag.endswith("svg")
    assert "localisation.png" not in [path.name for path in first]


def test_a_report_without_matplotlib_says_what_to_install(pad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    analysis = run(pad, picture_rows=0, seeds=())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'patch-aligned-llava\[analysis\]'"):
        write_report(analysis, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["images"] == analysis.images  # is not lost
