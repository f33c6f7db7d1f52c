"""What `python -m eval.captions` does: everything checked, captions written, captions scored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from eval.adapter import DTYPES, default_dtype, rank_and_count, shared, wait_for_all
from eval.captions.metrics import (
    CIDER,
    METEOR,
    METRICS,
    ROUGE_L,
    CaptionScores,
    SpiceSetup,
    find_spice,
    java_version,
    mean_and_stderr,
    require_metrics,
    score_captions,
)
from eval.captions.references import CaptionedImage, CaptionSet, image_files, named, read_references
from eval.plan import check_checkpoint, finished_run, identify, read_llava_config, training_of
from llava.command import RunRecord
from llava.conversation import SeparatorStyle, conv_templates, conversation_mode
from llava.eval.answering import GenerationSettings, Question, answer_questions, prompt_of
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from patch_aligned.files import sha256_of
from patch_aligned.pad import iter_records
from patch_aligned.results.run import (
    RESULT_FILE,
    Harness,
    ModelIdentity,
    RunData,
    RunResult,
    RunSettings,
    Sample,
    Score,
    rows_sha256,
    write_run,
)

# Captions that a model wrote, appended as they come, so that a stopped run can resume.

_IMAGE_KEYS = ("image_id", "image")
_CAPTION_KEYS = ("caption", "answer", "text")


class CaptionLog:
    """Captions of one model with one prompt, in files of a folder: each process writes its own, and reads all.

    Attributes:
        known: captions by the image's id, of those images whose file is the one that was captioned.
    """

    def __init__(self, folder: Path, identity: str, files: Mapping[str, Path], rank: int = 0) -> None:
        """Opens the log.

        Args:
            folder: of the files; made with the first caption.
            identity: stands for all that captions depend on besides the image; goes into the files' names.
            files: where each image is, by its id.
            rank: of this process.

        Raises:
            ValueError: a line is no caption.
        """
        self._path = folder / f"{identity}-{rank}.jsonl"
        self._files = files
        self.known: dict[str, str] = {}
        for path in sorted(folder.glob(f"{identity}-*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # the last line of a process that was killed may be cut
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    image, found, caption = json.loads(line)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: found no caption; next: delete the file") from error
                if image in files and found == sha256_of(files[image]):
                    self.known[image] = caption
            if path == self._path and whole != content:  # or the next line would be glued to it
                os.truncate(path, len(whole))  # other processes may be reading the lines that stay

    def keep(self, image: str, caption: str) -> None:
        """Adds a caption."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps([image, sha256_of(self._files[image]), caption]) + "\n")
        self.known[image] = caption


def read_answers(path: Path, images: Sequence[CaptionedImage]) -> dict[str, str]:
    """Captions of another source: COCO's results (`image_id`, `caption`), or records of `image` and `answer`.

    Args:
        path: JSON, JSON lines, either gzipped, or Parquet.
        images: what is captioned. Records name them by id or by path.

    Returns:
        Captions by the image's id.

    Raises:
        ValueError: a record is no caption, or of no such image, or of one that has a caption already.
        RecordFileError: the file is missing, or broken.
    """
    ids = {name: image.id for image in images for name in (image.image, image.id)}
    answers: dict[str, str] = {}
    unknown = []
    for number, record in enumerate(iter_records(path)):
        place = f"{path}: record {number}"
        name = str(_first(record, _IMAGE_KEYS, int | str, place))
        caption = _first(record, _CAPTION_KEYS, str, place)
        if name not in ids:
            unknown.append(name)
        elif ids[name] in answers:
            raise ValueError(f"{place}: found image {name!r} a second time, expected one caption of each")
        else:
            answers[ids[name]] = caption
    if unknown:
        raise ValueError(
            f"{path}: found captions of {named(unknown)}, which are not among the {len(images)} images of the "
            "references; are these the captions of the same images?"
        )
    return answers


def _first(record: Any, names: tuple[str, ...], kind: Any, place: str) -> Any:
    """The first of some fields that a record has."""
    found = next((record[name] for name in names if name in record), None) if isinstance(record, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        keys = ", ".join(record) if isinstance(record, dict) else str(record)[:60]
        raise ValueError(f"{place}: found {keys}; expected a text or number in one of {', '.join(names)}")
    return found


# Captions by a checkpoint: one question an image, asked by the loop that all of this package's answers come from.

WORKERS = 4


@dataclass(frozen=True)
class Writer:
    """Who writes captions, and how it is asked. Greedy, so nothing is drawn.

    Attributes:
        model: checkpoint and base.
        conversation: name of the template.
        prompt: what the model is told to do; nothing under a `plain` template, where captions follow their image.
        mm_use_im_start_end: whether the checkpoint wants marks around its images.
        dtype: one of `DTYPES`.
        max_new_tokens: where a caption is cut off.
    """

    model: ModelIdentity
    conversation: str
    prompt: str
    mm_use_im_start_end: bool
    dtype: str
    max_new_tokens: int

    @property
    def identity(self) -> str:
        """Changes with everything that a caption depends on."""
        parts = [
            *self.model.weights,
            self.conversation,
            self.prompt,
            self.dtype,
            self.max_new_tokens,
            version("patch-aligned-llava"),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def full_prompt(self) -> str:
        """What the model is given, the same for all images."""
        question = Question("", self.prompt, ("",))
        return prompt_of(question, conv_templates[self.conversation], self.mm_use_im_start_end)


def describe_writer(
    model: ModelIdentity, conversation: str | None, prompt: str | None, dtype: str, max_new_tokens: int, default: str
) -> Writer:
    """Fills in what the checkpoint decides.

    Args:
        model: checkpoint and base.
        conversation: name of the template; None is the checkpoint's own.
        prompt: what the user wants the model to be told; None is `default`, or nothing under a `plain` template.
        dtype: one of `DTYPES`.
        max_new_tokens: where a caption is cut off.
        default: the prompt where the template takes one.
    """
    config = read_llava_config(model.path, model.base)
    conversation = conversation or conversation_mode(get_model_name_from_path(model.path), config)
    if prompt is None:
        is_plain = conv_templates[conversation].sep_style is SeparatorStyle.PLAIN
        prompt = "" if is_plain else default
    with_marks = bool(getattr(config, "mm_use_im_start_end", False))
    return Writer(model, conversation, prompt, with_marks, dtype, max_new_tokens)


def write_captions(
    writer: Writer,
    images: Sequence[CaptionedImage],
    files: Mapping[str, Path],
    log: CaptionLog,
    batch_size: int,
    device: str,
    show_progress: bool = True,
) -> None:
    """Captions images and keeps each caption in `log`.

    Args:
        writer: who, and how.
        images: those without a caption so far.
        files: where each image is, by its id.
        log: keeps the captions.
        batch_size: images at once; captions do not depend on it.
        device: "cpu", "cuda:0", ...
        show_progress: a bar on standard error.

    Raises:
        UnreadableImageError: an image is broken; it is named, and what was written before is kept.
    """
    tokenizer, model, image_processor, _ = load_pretrained_model(
        writer.model.path, writer.model.base, writer.model.name, device=device, dtype=DTYPES[writer.dtype]
    )
    answers = answer_questions(
        [Question(image.id, writer.prompt, (files[image.id],)) for image in images],
        tokenizer,
        model,
        image_processor,
        conv_templates[writer.conversation],
        GenerationSettings(max_new_tokens=writer.max_new_tokens),
        batch_size=batch_size,
        workers=WORKERS,
    )
    with tqdm(total=len(images), unit="caption", disable=not show_progress) as bar:
        for answer in answers:
            log.keep(str(answer.question.question_id), answer.text)
            bar.update()


def device_of(local_rank: int) -> str:
    """Where a process of a machine runs.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if count and local_rank >= count:
        raise ValueError(
            f"process {local_rank + 1} has no GPU of its own; next: accelerate launch --num_processes {count}"
        )
    return f"cuda:{local_rank}" if count else "cpu"


# What came out: as text for people, as JSON for captions of another source, as a run for the tables.

TABLE = 4
METEOR_MEAN = "METEOR mean over images"
LIBRARIES = ("torch", "transformers", "pillow", "patch-aligned-llava")


def as_text(scores: CaptionScores) -> str:
    """The scores, a line each, and how many images they are from."""
    lines = []
    for name in METRICS:
        if name in scores.metrics:
            metric = scores.metrics[name]
            error = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
            lines.append(f"{name:<8} {metric.value:.4f}{error}")
        else:
            lines.append(f"{name:<8} not available: {scores.not_available[name]}")
    without = f", {len(scores.empty)} with an empty answer" if scores.empty else ""
    return "\n".join([*lines, f"{scores.images} images{without}"])


def as_json(scores: CaptionScores) -> dict[str, Any]:
    """All scores, of all images together and of each."""
    return {
        "images": scores.images,
        "empty": list(scores.empty),
        "scores": {name: {"value": m.value, "stderr": m.stderr} for name, m in scores.metrics.items()},
        "not_available": scores.not_available,
        "of_image": {
            image: {name: metric.of_image[image] for name, metric in scores.metrics.items()}
            for image in scores.metrics[METEOR].of_image
        },
    }


def as_run(
    writer: Writer,
    caption_set: CaptionSet,
    split: str,
    images: Sequence[CaptionedImage],
    answers: Mapping[str, str],
    scores: CaptionScores,
    *,
    batch_size: int,
    num_processes: int,
    limit: int | None,
) -> tuple[RunResult, list[Sample]]:
    """The run's result and rows. METEOR, which is no mean over images, has such a mean beside it for comparisons."""
    of_run = {
        name: Score(metric.value, metric.stderr, scores.images, "sum" if name == CIDER else "share")
        for name, metric in scores.metrics.items()
    }
    meteor = scores.metrics[METEOR]
    mean, stderr = mean_and_stderr(list(meteor.of_image.values()))
    of_run[METEOR_MEAN] = Score(mean, stderr, scores.images, "share")
    prompt = writer.full_prompt
    samples = [
        Sample(
            image.id,
            prompt,
            answers[image.id],
            list(image.captions),
            {name: metric.of_image[image.id] for name, metric in scores.metrics.items()}
            | {METEOR_MEAN: meteor.of_image[image.id]},
        )
        for image in images
    ]
    settings = RunSettings(
        prompt=prompt,
        conversation=writer.conversation,
        box_frame=None,
        dtype=writer.dtype,
        batch_size=batch_size,
        seed=0,
        temperature=0.0,
        max_new_tokens=writer.max_new_tokens,
        num_processes=num_processes,
        limit=limit,
        judge=None,
    )
    hashed = rows_sha256((sample.id, sample.target) for sample in samples)
    result = RunResult(
        benchmark=caption_set.name,
        tables=(TABLE,),
        column=caption_set.column,
        task="captions",
        model=writer.model,
        harness=Harness("pycocoevalcap", version("pycocoevalcap")),
        libraries={**{name: version(name) for name in LIBRARIES}, "java": str(java_version())},
        settings=settings,
        data=RunData(caption_set.references.name, None, split, len(samples), hashed),
        headline=ROUGE_L,  # a mean over images, so that two models can be compared image by image
        scores=of_run,
        not_available=scores.not_available,
    )
    return result, samples


ANSWERS = "answers"


@dataclass(frozen=True)
class Request:
    """The command's options; None where the default depends on others."""

    model_path: str
    model_base: str | None
    model_name: str | None
    caption_set: CaptionSet
    split: str | None
    output: Path | None
    prompt: str | None
    conversation: str | None
    max_new_tokens: int
    batch_size: int
    dtype: str
    limit: int | None
    answers_only: bool
    again: bool
    spice_jars: Path | None
    spice_java: str | None


def run(request: Request, say: Callable[[str], None]) -> None:
    """Captions and scores, in all processes; the first one scores.

    Raises:
        ValueError: something does not fit; the message says what and what to do.
        OSError: a file or Java is missing.
        ImportError: pycocoevalcap is not installed.
    """
    rank, processes = rank_and_count()
    device = device_of(int(os.environ.get("LOCAL_RANK", 0)))
    spice = _check(request)
    references = read_references(request.caption_set.references, request.split)
    images = references.images[: request.limit]
    files = image_files(images, request.caption_set.image_folder)

    writer = shared(_writer(request) if rank == 0 else None)
    assert writer is not None
    folder = (request.output or Path("runs", "eval", writer.model.name)) / request.caption_set.name
    if not request.again:
        wanted = rows_sha256((image.id, list(image.captions)) for image in images)
        finished_run(
            folder,
            writer.model,
            writer.conversation,
            writer.dtype,
            writer.max_new_tokens,
            request.limit,
            lambda run: {
                "prompt": (run.settings.prompt, writer.full_prompt),
                "set of images and captions (SHA-256)": (run.data.rows_sha256, wanted),
            },
        )
    of_data = {"references": sha256_of(request.caption_set.references)}
    hashes = {**of_data, "model_path": writer.model.sha256, "model_base": writer.model.base_sha256}
    flags = {**asdict(request), "references": request.caption_set.references}
    record = RunRecord(folder, flags, hashes, is_writer=rank == 0, trained=training_of(writer.model.path))
    record.begin()
    log = CaptionLog(folder / ANSWERS, writer.identity, files, rank)
    wait_for_all()  # so that all see the same captions as missing
    missing = [image for image in images if image.id not in log.known]
    if rank == 0:
        say(
            f"{writer.model.name}: {len(missing)} of {len(images)} images to caption; template {writer.conversation}, "
            f"{writer.dtype}, batch size {request.batch_size}"
        )
    if own := missing[rank::processes]:
        write_captions(writer, own, files, log, request.batch_size, device, show_progress=rank == 0)
    wait_for_all()
    if rank > 0:
        return
    if request.answers_only:
        record.end()
        say(f"{folder / ANSWERS}: captions of {len(images)} images; next: the same command without --answers-only")
        return

    known = CaptionLog(folder / ANSWERS, writer.identity, files).known
    answers = {image.id: known[image.id] for image in images}
    scores = score_captions({image.id: image.captions for image in images}, answers, spice)
    result, samples = as_run(
        writer,
        request.caption_set,
        references.split,
        images,
        answers,
        scores,
        batch_size=request.batch_size,
        num_processes=processes,
        limit=request.limit,
    )
    write_run(folder, result, samples)
    record.end()
    say(f"{writer.model.name}, {request.caption_set.column}")
    say(as_text(scores))
    say(f"{folder / RESULT_FILE}; next: patch-aligned table 4 --runs {folder.parent}")


def _check(request: Request) -> SpiceSetup | str:
    """Finds out in a second what would otherwise end the run after an hour."""
    check_checkpoint(request.model_path, request.model_base)
    if request.conversation is not None and request.conversation not in conv_templates:
        raise ValueError(
            f"--conversation: found {request.conversation!r}, expected one of {', '.join(sorted(conv_templates))}"
        )
    if request.answers_only:
        return "captions are not scored"
    require_metrics()
    return find_spice(request.spice_jars, request.spice_java)


def _writer(request: Request) -> Writer:
    name = request.model_name or get_model_name_from_path(request.model_path)
    model = identify(name, request.model_path, request.model_base)
    dtype = default_dtype() if request.dtype == "auto" else request.dtype
    return describe_writer(
        model, request.conversation, request.prompt, dtype, request.max_new_tokens, request.caption_set.prompt
    )


# Options that the two commands which score captions share.

REFERENCES_HELP = "COCO's captions, Karpathy's, records of `image` and `captions`, or PAD."
SplitOption = Annotated[str | None, typer.Option(help="Of Karpathy's file. Default: `test`.")]
SpiceJarsOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of CoreNLP 3.6.0 for SPICE. Default: $SPICE_JARS.")
]
SpiceJavaOption = Annotated[
    str | None, typer.Option(metavar="PROGRAM", help="Java 8 or 11 for SPICE. Default: $SPICE_JAVA, or java.")
]
