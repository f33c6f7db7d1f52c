"""Joining by image: captions come from the conversation, and what has no partner is counted and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.join import join
from patch_aligned.pad import read_annotations
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]


def sample(image: Any, *answers: str, **changed: Any) -> dict[str, Any]:
    turns = [turn for text in answers for turn in ({"from": "human", "value": "?"}, {"from": "gpt", "value": text})]
    return {"id": f"id of {image}", "image": image, "conversations": turns} | changed


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.json"
    text_alone = {"id": "text", "conversations": sample("", "hello")["conversations"]}
    records = [
        sample("c.png", " a cat ", "on a mat"),
        sample("other.png", "elsewhere"),
        sample("a.png", "a dog"),
        sample("a.png", "again"),
        sample(["a.png", "c.png"], "both"),
        text_alone,
    ]
    path.write_text(json.dumps(records))
    return path


def test_captions_and_ids_come_from_the_first_sample(write_pad: Make, samples: Path):
    region = label(0, 0, 9, 9, score=0.5)
    pad = write_pad(record("a.png", region, split="x"), record("b.png"), record("c.png"))
    output = pad.with_name("joined.parquet")
    joined = join(pad, samples, output)
    records = [image.to_record() for image in read_annotations(output)]
    assert records == [
        record("a.png", region, split="x", caption="a dog", id="id of a.png"),
        record("b.png"),
        record("c.png", caption="a cat", id="id of c.png"),
    ]
    assert (joined.matched, joined.pad_only, joined.samples_only) == (2, 1, 1)
    assert (joined.further_samples, joined.without_image, joined.written) == (1, 2, 3)
    unmatched = [json.loads(line) for line in joined.unmatched.read_text().splitlines()]
    assert unmatched == [{"only_in": str(pad), "image": "b.png"}, {"only_in": str(samples), "image": "other.png"}]


@pytest.mark.parametrize("place", ["pad", "samples"])
def test_an_input_is_never_the_output(write_pad: Make, samples: Path, place: str):
    pad = write_pad(record("a.png"))
    output = {"pad": pad, "samples": samples}[place]
    before = output.read_bytes()
    with pytest.raises(ValueError, match=output.name):
        join(pad, samples, output.parent / ".." / output.parent.name / output.name)
    assert output.read_bytes() == before


def test_records_without_a_sample_may_be_left_out(write_pad: Make, samples: Path):
    pad = write_pad(record("a.png"), record("b.png"))
    output = pad.with_name("joined.jsonl")
    result = CliRunner().invoke(app, ["join", str(pad), str(samples), "--output", str(output), "--only-matched"])
    assert result.exit_code == 0, result.output
    assert [image.image_id for image in read_annotations(output)] == ["a.png"]


def test_paths_are_compared_as_annotation_writes_them(write_pad: Make, samples: Path):
    samples.write_text(json.dumps([sample("./a.png", "a dog"), sample("x//b.png", "a cat"), sample("a.png", "again")]))
    pad = write_pad(record("a.png"), record("x/b.png"))
    joined = join(pad, samples, output := pad.with_name("joined.jsonl"))
    assert [(image.image_id, image.caption) for image in read_annotations(output)] == [
        ("a.png", "a dog"), ("x/b.png", "a cat"),
    ]  # fmt: skip
    assert (joined.matched, joined.samples_only, joined.further_samples) == (2, 0, 1)


def test_files_without_a_common_image_are_refused_with_an_id_of_each(write_pad: Make, samples: Path):
    pad = write_pad(record("images/a.png"))
    output = pad.with_name("joined.json")
    with pytest.raises(ValueError, match=r"'images/a\.png'.*'c\.png'.*strip or add"):
        join(pad, samples, output)
    assert not output.exists()


def test_a_second_file_without_images_is_named_before_the_first_is_read(write_pad: Make, samples: Path):
    """Such as a PAD file in the place of LLaVA's JSON."""
    pad = write_pad(record("a.png"))
    with pytest.raises(ValueError, match=r"pad\.json: found no sample with one image"):
        join(pad.with_name("not_there.json"), pad, pad.with_name("joined.json"))


@pytest.mark.parametrize("turns", [None, [], [{"from": "human", "value": "?"}], [{"from": "gpt", "value": 3}]])
def test_a_sample_without_an_answer_is_named(write_pad: Make, samples: Path, turns: Any):
    samples.write_text(json.dumps([sample("c.png", "x"), sample("a.png", conversations=turns)]))
    pad = write_pad(record("a.png"))
    with pytest.raises(ValueError, match=r"record 1 \(image 'a.png'\), field 'conversations'"):
        join(pad, samples, pad.with_name("joined.json"))
