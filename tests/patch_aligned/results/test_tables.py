"""Which run fills which cell, and what the notes say about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from patch_aligned.analysis.report import PAPER_TABLE_3
from patch_aligned.results.paper import DASH, PAPER_TABLES
from patch_aligned.results.render import Block, Row
from patch_aligned.results.run import (
    IMAGE_FRAME,
    LEGACY_METRIC,
    PADDED_FRAME,
    ModelIdentity,
    RunFileError,
    Score,
    write_run,
)
from patch_aligned.results.tables import find_models, free_block, make_table
from tests.patch_aligned.results.conftest import SETTINGS, result_of, samples_of

Make = Callable[..., Path]
BOTH_FRAMES = {PADDED_FRAME: [1, 1, 1, 0], IMAGE_FRAME: [1, 0, 0, 0]}


def row_of(block: Block, label: str) -> Row:
    (row,) = [row for row in block.rows if row.label == label]
    return row


def cell_of(block: Block, label: str, heading: str) -> str:
    headings = [f"{group} {name}".strip() for group, name in block.columns]
    return str(row_of(block, label).cells[headings.index(heading)])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (5, ["+16.0%, ratio of means"]),
        (6, ["+4.3%, ratio of means"]),
        (7, ["+3.0%, mean of ratios", "MMB EN -1.3%", "MME C +7.4%", "MME C alone is 41% of it"]),
        (8, ["+2.8%, ratio of means", "+3.9%, ratio of means"]),
    ],
)
def test_the_papers_gains_are_said_with_what_they_are_made_of(
    make_run: Make, tmp_path: Path, number: int, said: list[str]
) -> None:
    column = PAPER_TABLES[number].columns[0].run_column
    make_run("out/run", {LEGACY_METRIC: [1, 0]}, tables=(number,), column=column)
    notes = " ".join(make_table(number, find_models([tmp_path / "out"]))[0].notes)
    assert all(words in notes for words in said), notes


def test_our_gain_is_taken_over_the_columns_that_both_have(make_run: Make, tmp_path: Path) -> None:
    for name, gqa, okvqa in (("a", [1, 0], [1, 0]), ("b", [1, 1], [1, 0])):
        make_run(f"{name}/gqa", {"exact_match": gqa}, tables=(6,), column="GQA", benchmark="gqa")
        make_run(f"{name}/okvqa", {"exact_match": okvqa}, tables=(6,), column="OKVQA", benchmark="okvqa")
    make_run("b/vizwiz", {"exact_match": [1]}, tables=(6,), column="VizWiz", benchmark="vizwiz")
    (block,) = make_table(6, find_models([tmp_path / "a", tmp_path / "b"], ["A", "B"]))
    assert "B over A: +50.0%, ratio of means (GQA +100.0%, OKVQA +0.0%)." in block.notes


def test_the_reports_table_3_is_the_tables() -> None:
    """`analyze` prints the paper's Table 3 too, and does not see this package."""
    cells = {row.model: (row.cells[0], row.cells[2], row.cells[4]) for row in PAPER_TABLES[3].rows}
    shown = [(f"{r['entropy_drop_nats']}", f"{r['align_px']}", f"{r['cosine']}") for r in PAPER_TABLE_3.values()]
    assert list(cells.values()) == shown


def test_every_row_of_the_paper_has_a_cell_a_column() -> None:
    for table in PAPER_TABLES.values():
        for row in table.rows:
            assert len(row.cells) == len(table.columns), (table.number, row.model)
            assert len(row.facts) == len(table.fact_columns), (table.number, row.model)
            assert all(re.fullmatch(rf"[\d.]+|{DASH}", cell) for cell in row.cells)


def test_legacy_runs_stand_beside_the_papers_rows_and_own_ones_apart(make_run: Make, tmp_path: Path) -> None:
    make_run("out/refcoco_val", BOTH_FRAMES)
    make_run(
        "out/legacy",
        {LEGACY_METRIC: [1, 0]},
        benchmark="legacy_refcoco_val",
        task="refcoco_bbox_rec_val",
        settings=replace(SETTINGS, box_frame="image"),
    )
    legacy, own = make_table(5, find_models([tmp_path / "out"]))
    assert "legacy protocol" in legacy.title
    assert cell_of(legacy, "LLaVA 1.5-7B (paper)", "RefCOCO test-A") == "64.43"
    assert cell_of(legacy, "plain", "RefCOCO val") == "50.00 ±1.00"
    assert cell_of(legacy, "plain", "RefCOCO test-A") == DASH
    assert "boxes read in the image's own frame" in " ".join(legacy.notes)
    assert [row.label for row in own.rows] == ["plain"]
    assert cell_of(own, "plain", "RefCOCO val") == "75.00 ±1.00"
    assert "boxes read in the padded square" in own.title
    assert own.notes[0].startswith("Another protocol than the paper's")


def test_without_legacy_runs_the_papers_rows_stand_alone(make_run: Make, tmp_path: Path) -> None:
    make_run("out/refcoco_val", BOTH_FRAMES)
    legacy, own = make_table(5, find_models([tmp_path / "out"]))
    assert all(row.label.endswith("(paper)") for row in legacy.rows)
    assert legacy.notes[0].startswith("No run of the legacy tasks")
    assert len(own.rows) == 1


def test_boxes_are_read_as_asked_or_as_the_run_says(make_run: Make, tmp_path: Path) -> None:
    make_run("square/refcoco_val", BOTH_FRAMES)
    make_run("image/refcoco_val", BOTH_FRAMES, settings=replace(SETTINGS, box_frame="image"))
    models = find_models([tmp_path / "square", tmp_path / "image"], ["a", "b"])
    own = make_table(5, models)[1]
    assert [cell_of(own, name, "RefCOCO val") for name in "ab"] == ["75.00 ±1.00", "25.00 ±1.00"]
    assert "boxes read in the padded square or the image" in own.title
    assert any("padded square and taken back to the image (a), boxes read in the image's own" in n for n in own.notes)
    asked = make_table(5, models, "image")[1]
    assert [cell_of(asked, name, "RefCOCO val") for name in "ab"] == ["25.00 ±1.00"] * 2


def test_table_8_has_sections_and_takes_runs_of_its_own(make_run: Make, tmp_path: Path) -> None:
    make_run("out/refcoco_val", {LEGACY_METRIC: [1, 0]}, tables=(5, 8))
    (block,) = make_table(8, find_models([tmp_path / "out"]))
    assert list(dict.fromkeys(row.section for row in block.rows)) == [
        "Another LLM: Vicuna 7B → Llama 3.1 8B", "Another projector: MLP → C-Abstractor", "Our runs",
    ]  # fmt: skip


def test_units_become_those_of_the_column(make_run: Make, tmp_path: Path) -> None:
    make_run("out/mmmu", {"mmmu_acc": [1, 0]}, tables=(7,), column="MMMU", benchmark="mmmu")
    make_run("out/mmvet", {"gpt": [31, 30]}, unit="points", tables=(7,), column="MMVet", benchmark="mmvet")
    make_run(
        "out/mme",
        {"mme_perception_score": [1500, 1501], "mme_cognition_score": [300, 301]},
        unit="sum",
        tables=(7,),
        column="MME",
        benchmark="mme",
    )
    (block,) = make_table(7, find_models([tmp_path / "out"]))
    shown = {name: str(cell) for (_, name), cell in zip(block.columns, row_of(block, "plain").cells, strict=True)}
    assert shown == {
        "MMMU": "50.00 ±1.00", "MMVet": "30.50 ±0.01", "CMMMU": DASH, "MMB EN": DASH,
        "MME C": "300.50 ±0.01", "MME P": "1500.50 ±0.01",
    }  # fmt: skip


def test_a_unit_that_does_not_fit_is_refused(make_run: Make, tmp_path: Path) -> None:
    make_run("out/mmmu", {"mmmu_acc": [1, 0]}, unit="sum", tables=(7,), column="MMMU", benchmark="mmmu")
    with pytest.raises(RunFileError, match=r"scores\.mmmu_acc\.unit': found 'sum', expected 'share' or 'points'"):
        make_table(7, find_models([tmp_path / "out"]))


def test_captions_fill_their_columns_by_metric_and_say_why_one_is_missing(make_run: Make, tmp_path: Path) -> None:
    scores = {"METEOR": [0.25, 0.25], "ROUGE_L": [0.5, 0.25]}
    fields = {"tables": (4,), "column": "captions", "not_available": {"SPICE": "no CoreNLP jars"}}
    make_run("one/coco", scores, benchmark="captions_coco", **fields)
    (block,) = make_table(4, find_models([tmp_path / "one"]))
    assert list(map(str, row_of(block, "plain").cells)) == ["0.2500 ±0.0100", "0.3750 ±0.0100", DASH]
    assert "SPICE of plain: no CoreNLP jars." in block.notes
    make_run("one/other", scores, benchmark="captions_other", **fields)
    (block,) = make_table(4, find_models([tmp_path / "one"]))
    assert [row.label for row in block.rows[2:]] == ["plain (captions_coco)", "plain (captions_other)"]


def test_the_miniature_prints_columns_of_its_own_without_the_papers_rows(make_run: Make, tmp_path: Path) -> None:
    for model, hits in (("a", [1, 0]), ("b", [1, 1])):
        make_run(f"{model}/mini_colour", {"exact_match": hits}, tables=(6,), column="Colour", benchmark="mini_colour")
    make_run("b/mini_counting", {"exact_match": [0, 0]}, tables=(6,), column="Counting", benchmark="mini_counting")
    (block,) = make_table(6, find_models([tmp_path / "a", tmp_path / "b"], ["a", "b"]))
    assert block.columns == (("", "Colour"), ("", "Counting"))
    assert [[str(cell) for cell in row.cells] for row in block.rows] == [
        ["50.00 ±1.00", DASH],
        ["100.00 ±1.00", "0.00 ±1.00"],
    ]
    assert block.notes[0].startswith("The miniature's scenes and models: not comparable")


def test_runs_as_they_are_have_a_column_a_benchmark(make_run: Make, tmp_path: Path) -> None:
    make_run("out/pope", {"pope_accuracy": [1, 1]}, tables=(), column="", benchmark="pope")
    make_run("out/mme", {"mme": [10, 20]}, unit="sum", tables=(7,), column="MME", benchmark="mme")
    block = free_block(find_models([tmp_path / "out"]), "All runs")
    assert block.columns == (("", "mme"), ("", "pope"))
    assert list(map(str, block.rows[0].cells)) == ["15.00 ±0.01", "100.00 ±1.00"]


def test_a_trial_with_a_limit_is_marked(make_run: Make, tmp_path: Path) -> None:
    limited = replace(SETTINGS, limit=2, box_frame=None)
    make_run("out/gqa", {"exact_match": [1, 0]}, tables=(6,), column="GQA", benchmark="gqa", settings=limited)
    (block,) = make_table(6, find_models([tmp_path / "out"]))
    assert cell_of(block, "plain", "GQA") == "50.00 ±1.00 †"
    assert any(note.startswith("† From a run with --limit") for note in block.notes)
    assert any("cut by --limit 2" in note for note in block.notes)


def test_a_server_scores_what_has_no_headline(make_run: Make, tmp_path: Path) -> None:
    samples = [replace(sample, scores={}) for sample in samples_of({"x": [0, 0]})]
    result = result_of(samples, {}, tables=(6,), column="VizWiz", benchmark="vizwiz_test", submission="answers.json")
    write_run(tmp_path / "out" / "vizwiz_test", result, samples)
    (block,) = make_table(6, find_models([tmp_path / "out"]))
    assert cell_of(block, "plain", "VizWiz") == DASH
    assert "VizWiz of plain: scored by a server, file answers.json." in block.notes


def test_conditions_that_all_share_are_said_once_and_others_by_column_and_model(make_run: Make, tmp_path: Path) -> None:
    of_gqa = {"tables": (6,), "column": "GQA", "benchmark": "gqa", "task": "gqa"}
    make_run("a/gqa", {"exact_match": [1, 0]}, **of_gqa)
    make_run("b/gqa", {"exact_match": [1, 0]}, first_id=7, **of_gqa, settings=replace(SETTINGS, batch_size=1))
    make_run("a/okvqa", {"exact_match": [1, 0, 1]}, tables=(6,), column="OKVQA", benchmark="okvqa", task="okvqa")
    (block,) = make_table(6, find_models([tmp_path / "a", tmp_path / "b"], ["a", "b"]))
    (shared,) = [note for note in block.notes if note.startswith("All columns: ")]
    assert "template vicuna_v1" in shared
    assert "no judge" in shared
    (gqa,) = [note for note in block.notes if note.startswith("GQA: ")]
    assert "task gqa; 2 rows of refs(unc).p, split val; " in gqa
    assert "float16, batch size 8 (a), float16, batch size 1 (b)" in gqa
    assert "the models were asked different rows" in gqa
    (okvqa,) = [note for note in block.notes if note.startswith("OKVQA: ")]
    assert "different rows" not in okvqa


def test_runs_of_two_checkpoints_in_one_folder_are_refused(make_run: Make, tmp_path: Path) -> None:
    make_run("out/a", BOTH_FRAMES)
    make_run("out/b", BOTH_FRAMES, model=ModelIdentity("plain", "runs/plain", "1" * 64))
    with pytest.raises(RunFileError, match=r"found runs of 2 checkpoints .*evaluate the older again"):
        find_models([tmp_path / "out"])


def test_runs_of_one_adapter_on_two_bases_are_refused(make_run: Make, tmp_path: Path) -> None:
    make_run("out/a", BOTH_FRAMES, benchmark="a", model=ModelIdentity("plain", "runs/lora", "0" * 64, "vicuna"))
    make_run("out/b", BOTH_FRAMES, benchmark="b", model=ModelIdentity("plain", "runs/lora", "0" * 64, "llama"))
    with pytest.raises(RunFileError, match=r"2 checkpoints \(a of 000000000000 on vicuna, b of 000000000000 on llama"):
        find_models([tmp_path / "out"])


def test_two_runs_of_one_benchmark_are_refused(make_run: Make, tmp_path: Path) -> None:
    make_run("out/pope", BOTH_FRAMES, benchmark="pope")
    make_run("out/pope_copy", BOTH_FRAMES, benchmark="pope")
    with pytest.raises(RunFileError, match=r"out/pope and .*out/pope_copy: found two runs of benchmark 'pope'"):
        find_models([tmp_path / "out"])


def test_notes_speak_of_standard_errors_where_there_are_some_and_keep_enough_of_a_files_hash(tmp_path: Path) -> None:
    samples = samples_of({"acc": [1, 0]})
    for name, stderr in (("with", 0.5), ("without", None)):
        result = result_of(samples, {"acc": Score(0.5, stderr, 2, "share")}, benchmark=name)
        data = replace(result.data, revision=f"sha256:{'ab12' * 16}")
        write_run(tmp_path / name / "run", replace(result, data=data), samples)
        notes = free_block(find_models([tmp_path / name]), "All runs").notes
        assert ("± is the standard error." in notes) == (name == "with")
        assert "refs(unc).p@sha256:ab12ab12ab12, split val" in notes[0]


def test_runs_that_have_no_place_are_named(make_run: Make, tmp_path: Path) -> None:
    make_run("out/gqa", {"exact_match": [1, 0]}, tables=(6,), column="GQA2", benchmark="gqa")
    with pytest.raises(RunFileError, match=r"gqa.*'column': found 'GQA2', expected one of Table 6: GQA, OKVQA, Sci"):
        make_table(6, find_models([tmp_path / "out"]))
    with pytest.raises(RunFileError, match="no run belongs to Table 7; found runs of gqa"):
        make_table(7, find_models([tmp_path / "out"]))
    make_run("two/a", {"exact_match": [1, 0]}, tables=(6,), column="GQA", benchmark="gqa")
    make_run("two/b", {"exact_match": [1, 0]}, tables=(6,), column="GQA", benchmark="gqa_other")
    with pytest.raises(RunFileError, match="found two runs of Table 6's column 'GQA'"):
        make_table(6, find_models([tmp_path / "two"]))


def test_models_of_one_name_are_told_apart_by_their_folder(make_run: Make, tmp_path: Path) -> None:
    make_run("one/refcoco_val", BOTH_FRAMES)
    make_run("two/refcoco_val", BOTH_FRAMES)
    models = find_models([tmp_path / "one", tmp_path / "two"])
    assert [entrant.name for entrant in models] == [f"plain ({tmp_path / name})" for name in ("one", "two")]
    with pytest.raises(RunFileError, match="--names: found 1, expected 2"):
        find_models([tmp_path / "one", tmp_path / "two"], ["a"])
