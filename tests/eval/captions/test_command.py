"""The commands, from a tiny checkpoint to the run's files. Scores are taken by a stand-in, which needs no Java."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from eval.captions import run as command
from eval.captions import score
from eval.captions.__main__ import app
from eval.captions.metrics import BLEU, METRICS, SPICE, CaptionScores, MetricScore
from eval.captions.run import METEOR_MEAN, CaptionLog
from llava.eval.answering import answer_questions
from patch_aligned.results.run import read_run, read_samples
from tests.training import run_in_two_processes

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is part of the extra `eval`")

ROOT = Path(__file__).parents[3]
TAKEN = tuple(name for name in METRICS if name != SPICE)
IMAGES = [f"im{number}.png" for number in range(5)]
FLAGS = ("--references", "captions.jsonl", "--image-folder", "images", "--benchmark", "captions_toy",
         "--max-new-tokens", "6", "--batch-size", "2")  # fmt: skip
STAGE_1 = ("--model-path", "ckpt_stage1", "--model-base", "tiny-vicuna")
STAGE_2 = ("--model-path", "tiny-llava", "--conversation", "vicuna_v1")
RUN = Path("out/captions_toy")


def lengths(references: Mapping[str, Sequence[str]], answers: Mapping[str, str], spice: Any) -> CaptionScores:
    """Gives each image the length of its answer, under all names."""
    assert references.keys() == answers.keys()
    of_image = {image: len(answer) / 100 for image, answer in answers.items()}
    value = sum(of_image.values()) / len(of_image)
    metrics = {name: MetricScore(value, None if name in BLEU else 0.5, of_image) for name in TAKEN}
    empty = tuple(image for image, answer in answers.items() if not answer)
    return CaptionScores(metrics, {SPICE: spice}, len(of_image), empty)


@pytest.fixture
def world(golden_world: Path, goldens: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny checkpoints and five images with captions; no Java is asked for."""
    (golden_world / "ckpt_stage1").symlink_to(goldens / "ckpt_stage1")
    lines = [json.dumps({"image": name, "captions": [f"Picture of {name}", "A picture"]}) for name in IMAGES]
    Path("captions.jsonl").write_text("\n".join(lines))
    monkeypatch.delenv("SPICE_JARS", raising=False)
    for module in (command, score):
        monkeypatch.setattr(module, "require_metrics", lambda: None)
        monkeypatch.setattr(module, "score_captions", lengths)
    return golden_world


def caption(*flags: str, output: str = "out") -> Result:
    return CliRunner().invoke(app, [*FLAGS, "--output", output, *flags])


def test_a_run_leaves_scores_rows_and_what_they_depend_on(world: Path) -> None:
    done = caption(*STAGE_2)
    assert done.exit_code == 0, done.output
    result, samples = read_run(RUN), read_samples(RUN)
    assert [sample.id for sample in samples] == IMAGES
    assert samples[2].target == ["Picture of im2.png", "A picture"]
    assert samples[2].scores == dict.fromkeys((*TAKEN, METEOR_MEAN), len(samples[2].answer) / 100)
    assert {name: score.unit for name, score in result.scores.items() if score.unit != "share"} == {"CIDEr": "sum"}
    assert result.not_available.keys() == {SPICE}
    assert (result.benchmark, result.tables, result.data.rows) == ("captions_toy", (4,), 5)
    assert (result.settings.max_new_tokens, result.settings.batch_size, result.settings.limit) == (6, 2, None)
    assert result.settings.prompt.endswith(
        "USER: <image>\nProvide a one-sentence caption for the provided image. ASSISTANT:"
    )
    assert "SPICE    not available: needs stanford-corenlp-3.6.0.jar" in done.output


def test_after_stage_1_a_caption_follows_its_image_alone(world: Path) -> None:
    done = caption(*STAGE_1)
    assert done.exit_code == 0, done.output
    assert "ckpt_stage1: 5 of 5 images to caption; template plain, float32, batch size 2\n" in done.output
    assert read_run(RUN).settings.conversation == "plain"  # which upstream's checkpoint does not say
    assert read_run(RUN).settings.prompt == "<image>"
    assert not [sample for sample in read_samples(RUN) if "\n" in sample.answer]


def test_the_name_in_tables_does_not_choose_the_template(world: Path) -> None:
    Path("tiny-llava").rename("llava-v1.5-tiny")  # published checkpoints record no template: it follows from the name
    assert caption("--model-path", "llava-v1.5-tiny", "--model-name", "Ours", "--limit", "1").exit_code == 0
    result = read_run(RUN)
    assert (result.model.name, result.settings.conversation) == ("Ours", "llava_v1")


def test_a_base_is_known_by_its_weights(world: Path) -> None:
    assert caption(*STAGE_1, "--limit", "1").exit_code == 0
    moved = caption(*STAGE_1, "--limit", "1", "--model-base", f"{Path.cwd()}/tiny-vicuna/")
    assert moved.exit_code == 0 and "0 of 1 images to caption" in moved.output
    record = json.loads((RUN / "run.json").read_text())
    assert record["sha256"].keys() == {"references", "model_path", "model_base"}
    assert [bool(sitting["ended"]) for sitting in record["sittings"]] == [True, True]
    with Path("tiny-vicuna/model.safetensors").open("ab") as weights:
        weights.write(b" ")
    other = caption(*STAGE_1, "--limit", "1")
    assert other.exit_code == 2 and "model.weights" in other.output


class StoppedError(Exception):
    """What ends a run in the middle."""


def test_a_run_that_was_stopped_goes_on_with_the_captions_it_has(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    keep = CaptionLog.keep

    def watch(questions: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        asked.extend(question.question_id for question in questions)
        return answer_questions(questions, *arguments, **options)

    def stop_at_the_fourth(self: CaptionLog, image: str, text: str) -> None:
        if image == IMAGES[3]:
            raise StoppedError
        keep(self, image, text)

    monkeypatch.setattr("llava.eval.answering.answer_questions", watch)
    with monkeypatch.context() as patch:
        patch.setattr(CaptionLog, "keep", stop_at_the_fourth)
        assert isinstance(caption(*STAGE_2).exception, StoppedError)
    assert not (RUN / "result.json").exists()
    asked.clear()
    assert caption(*STAGE_2).exit_code == 0
    assert asked == IMAGES[3:]
    stopped = read_samples(RUN)
    asked.clear()
    assert caption(*STAGE_2).exit_code == 0
    assert asked == []
    assert caption(*STAGE_2, "--batch-size", "1", output="whole").exit_code == 0
    assert asked == IMAGES
    assert stopped == read_samples(Path("whole/captions_toy"))


def test_captions_may_be_written_where_there_is_no_java_and_scored_later(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "require_metrics", lambda: pytest.fail("Java was asked for"))
        done = caption(*STAGE_2, "--answers-only")
    assert done.exit_code == 0, done.output
    assert "captions of 5 images; next: the same command without --answers-only" in done.output
    assert not (RUN / "result.json").exists()
    monkeypatch.setattr(command, "write_captions", lambda *_, **__: pytest.fail("captions were written again"))
    assert caption(*STAGE_2).exit_code == 0
    assert read_run(RUN).data.rows == 5


@pytest.mark.slow
def test_two_processes_share_the_images(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert caption(*STAGE_2).exit_code == 0
    run_in_two_processes("-m", "eval.captions", *STAGE_2, *FLAGS, "--output", "two", "--answers-only")
    files = sorted(Path("two/captions_toy/answers").iterdir())
    lines = [map(json.loads, path.read_text().splitlines()) for path in files]
    written = [{image: caption for image, _, caption in of_process} for of_process in lines]
    assert [list(captions) for captions in written] == [IMAGES[0::2], IMAGES[1::2]]
    assert written[0] | written[1] == {sample.id: sample.answer for sample in read_samples(RUN)}


def test_the_users_prompt_is_asked_and_a_run_of_other_settings_is_replaced_only_on_request(world: Path) -> None:
    own = (*STAGE_2, "--prompt", "What is it?")
    assert caption(*own, "--limit", "2").exit_code == 0
    result = read_run(RUN)
    assert "<image>\nWhat is it? ASSISTANT:" in result.settings.prompt
    assert (result.settings.limit, result.data.rows) == (2, 2)
    found = "holds a run with another settings.limit: found 2, asked for None; next: another --output"
    assert found in refused(*own)
    assert caption(*own, "--again").exit_code == 0
    assert read_run(RUN).settings.limit is None


def test_images_of_the_same_names_have_captions_of_their_own(world: Path) -> None:
    assert caption(*STAGE_2).exit_code == 0
    first = [sample.answer for sample in read_samples(RUN)]
    Path("others").mkdir()
    for name, other in zip(IMAGES, IMAGES[::-1], strict=True):
        shutil.copy(f"images/{name}", f"others/{other}")
    Path("others.json").write_text(json.dumps([{"image": name, "captions": ["Another"]} for name in IMAGES]))
    flags = (*STAGE_2, "--references", "others.json", "--image-folder", "others")
    assert "holds a run with another data.rows_sha256: found '" in refused(*flags)
    assert caption(*flags, "--again").exit_code == 0
    assert [sample.answer for sample in read_samples(RUN)] == first[::-1]


def test_what_is_wrong_is_told_before_the_model_is_loaded(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.model.builder.load_pretrained_model", lambda *_, **__: pytest.fail("it was loaded"))

    def no_java() -> None:
        raise OSError("java: found no such program")

    Path("images/im3.png").unlink()
    assert "found no im3.png, 4 of 5 images are there" in refused(*STAGE_2)
    assert "expected one of chatml_direct, " in refused("--model-path", "tiny-llava", "--conversation", "vicuna")
    assert "holds a projector alone; next: --model-base LLM" in refused("--model-path", "ckpt_stage1")
    assert "no such folder" in refused("--model-path", "liuhaotian/llava-v1.5-7b")
    assert "found no stanford-corenlp-3.6.0.jar" in refused(*STAGE_2, "--spice-jars", "images")
    monkeypatch.setattr(command, "require_metrics", no_java)
    assert refused(*STAGE_2) == "Error: java: found no such program\n"


def refused(*flags: str) -> str:
    """What a command says that ends with the exit code of wrong input."""
    done = caption(*flags)
    assert done.exit_code == 2, done.output
    return done.output


def test_captions_of_another_source_are_scored(world: Path) -> None:
    records = [{"image": name, "answer": "x" * number} for number, name in enumerate(IMAGES)]
    Path("answers.json").write_text(json.dumps(records))
    flags = ["--answers", "answers.json", "--references", "captions.jsonl"]
    done = CliRunner().invoke(score.app, [*flags, "--output", "scores.json"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[:3] == ["METEOR   0.0200 ± 0.5000", "ROUGE_L  0.0200 ± 0.5000",
                                            f"SPICE    not available: {command.find_spice(None, None)}"]  # fmt: skip
    assert done.output.splitlines()[-1] == "5 images, 1 with an empty answer"
    written = json.loads(Path("scores.json").read_text())
    assert written["scores"]["METEOR"] == {"value": 0.02, "stderr": 0.5}
    assert written["of_image"]["im3.png"]["ROUGE_L"] == 0.03
    assert written["empty"] == ["im0.png"]

    assert CliRunner().invoke(score.app, [*flags, "--limit", "2"]).output.splitlines()[-1].startswith("2 images")
