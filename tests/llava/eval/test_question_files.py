"""Files of questions and answers: what is wrong is named by file, record and field."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llava.eval.vqa_files import chunk_of, read_answers, read_jsonl, require_all_answered, vqa_questions

GOOD = '{"question_id": 1, "image": "a.png", "text": "?"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1', "line 2: not JSON"),
        ("[1]", "line 2: found a list, expected an object"),
        ('{"question_id": 1, "text": "?"}', "record 2: no field `image` (there are question_id, text)"),
        ('{"question_id": 1, "image": "a.png"}', "record 2: no field `text`"),
        ('{"image": "a.png", "text": "?"}', "record 2: no field `question_id`"),
        ('{"question_id": 1, "image": 5, "text": "?"}', "field `image`: found 5, expected a text or null"),
        ('{"question_id": true, "image": "a.png", "text": "?"}', "field `question_id`: found True"),
        ('{"question_id": 1, "image": "../a.png", "text": "?"}', "../a.png leads out of --image-folder pictures"),
        ('{"question_id": 1, "image": "/a.png", "text": "?"}', "/a.png leads out of --image-folder pictures"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        vqa_questions(path, "pictures")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_without_a_folder_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "image": "/data/a.png", "text": "?"}\n', encoding="utf-8")
    assert vqa_questions(path, "")[0].images == (Path("/data/a.png"),)


def test_line_separators_inside_a_text_do_not_end_a_record(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_jsonl(path, "texts") == [{"text": "a\u2028b\x85c"}]


def test_files_of_windows_editors_are_read_and_others_than_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert read_jsonl(path, "texts") == [{"text": "a"}]
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl: not UTF-8 \(.+ at byte 13\); expected texts"):
        read_jsonl(path, "texts")


@pytest.mark.parametrize(("count", "chunks"), [(10, 3), (5, 4), (3, 8), (0, 2), (8, 8)])
def test_chunks_are_upstreams_and_the_missing_ones_are_empty(count: int, chunks: int) -> None:
    items = list(range(count))
    size = math.ceil(count / chunks)
    upstream = [items[start : start + size] for start in range(0, count, size)] if count else []
    assert [chunk_of(items, chunks, chunk) for chunk in range(chunks)] == upstream + [[]] * (chunks - len(upstream))


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        ([1, 2], "a.jsonl: 1 of 3 questions in q.jsonl have no answer, such as 3"),
        ([1, 2, 3, 3], "a.jsonl: 1 questions have more than one answer, such as 3"),
        ([1, 2, 3, 7], "a.jsonl: 1 answers are to questions that are not in q.jsonl, such as 7"),
    ],
)
def test_answers_that_do_not_fit_the_questions_are_refused(answered: list[int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        require_all_answered([1, 2, 3], answered, "a.jsonl", "q.jsonl")
    assert message in str(caught.value)


def test_empty_answers_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question_id": n, "text": t}) + "\n" for n, t in enumerate(["yes", "", " "])))
    assert len(read_answers(path)) == 3
    assert "2 of 3 answers are empty" in caplog.text


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="found no answers"):
        read_answers(tmp_path / "a.jsonl")
