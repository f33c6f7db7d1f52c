"""Caption images with a checkpoint, and score the captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from eval.adapter import JsonLog, default_dtype, rank_and_count, shared, wait_for_all
from eval.captions.metrics import (
    CIDER,
    METEOR,
    ROUGE_L,
    CaptionScores,
    as_text,
    find_spice,
    java_version,
    mean_and_stderr,
    require_metrics,
    score_captions,
)
from eval.captions.references import CaptionedImage, CaptionSet, choose_set, image_files, read_references
from eval.plan import check_checkpoint, finished_run, identify, read_llava_config, training_of
from llava.command import RunRecord, clear_errors, typer_app
from llava.conversation import SeparatorStyle, conv_templates, conversation_mode
from llava.eval.vqa_files import GenerationSettings, Question, prompt_of
from llava.mm_utils import get_model_name_from_path
from patch_aligned.files import sha256_of
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

ANSWERS = "answers"
TABLE = 4
METEOR_MEAN = "METEOR mean over images"
LIBRARIES = ("torch", "transformers", "pillow", "patch-aligned-llava")
WORKERS = 4

# Options that `python -m eval.captions.score` has too.
REFERENCES_HELP = "COCO's captions, Karpathy's, records of `image` and `captions`, or PAD."
SplitOption = Annotated[str | None, typer.Option(help="Of Karpathy's file. Default: `test`.")]
SpiceJarsOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of CoreNLP 3.6.0 for SPICE. Default: $SPICE_JARS.")
]
SpiceJavaOption = Annotated[
    str | None, typer.Option(metavar="PROGRAM", help="Java 8 or 11 for SPICE. Default: $SPICE_JAVA, or java.")
]

app = typer_app()


@app.command(epilog="Captions of another source are scored by `python -m eval.captions.score`.")
@clear_errors
def main(
    context: typer.Context,
    model_path: Annotated[str, typer.Option(metavar="DIR", help="The checkpoint, of stage 1 or stage 2.")],
    model_base: Annotated[
        str | None, typer.Option(metavar="DIR", help="The LLM that a stage-1 projector or an adapter belongs to.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Its name in tables. Default: from its folder.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="`captions_coco2014`, `captions_coco2017`, `captions_mini`, or a name of yours.")
    ] = None,
    references: Annotated[Path | None, typer.Option(metavar="FILE", help=REFERENCES_HELP)] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the paths of the images are relative to.")
    ] = None,
    split: SplitOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the runs. Default: runs/eval/NAME.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The instruction. Default: to caption; none after stage 1 (`plain`)."),
    ] = None,
    conversation: Annotated[
        str | None,
        typer.Option(help="Template. Default: as trained, `plain` for a stage-1 projector that does not say."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch and process.")] = 8,
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], typer.Option(help="`auto`: float16 on a GPU, else float32.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images, for a trial.")] = None,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Stop before scoring, which needs Java. Score with the same command.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Replace a run of other settings. Captions are kept.")] = False,
    spice_jars: SpiceJarsOption = None,
    spice_java: SpiceJavaOption = None,
) -> None:
    """Caption images with a checkpoint and score the captions: METEOR, ROUGE-L, SPICE, CIDEr and BLEU.

    Writes `OUTPUT/BENCHMARK/result.json` and `samples.jsonl`, from which `patch-aligned table 4` is made. After an
    interruption run the same command again. Several GPUs: `accelerate launch --num_processes 8 -m eval.captions ...`.

    Example:

    `python -m eval.captions --model-path checkpoints/llava-v1.5-7b-pretrain --model-base lmsys/vicuna-7b-v1.5
    --benchmark captions_coco2014`
    """
    caption_set = choose_set(benchmark, references, image_folder)
    model_path = model_path.rstrip("/")
    check_checkpoint(model_path, model_base)
    rank, processes = rank_and_count()
    device = device_of(int(os.environ.get("LOCAL_RANK", 0)))
    if conversation is not None and conversation not in conv_templates:
        raise ValueError(f"--conversation: found {conversation!r}, expected one of {', '.join(sorted(conv_templates))}")
    if not answers_only:  # now, since scoring comes hours later
        require_metrics()
    spice = "captions are not scored" if answers_only else find_spice(spice_jars, spice_java)
    read = read_references(caption_set.references, split)
    images = read.images[:limit]
    files = image_files(images, caption_set.image_folder)

    captioner = None
    if rank == 0:
        model = identify(model_name or get_model_name_from_path(model_path), model_path, model_base)
        dtype_chosen = default_dtype() if dtype == "auto" else dtype
        captioner = describe_captioner(model, conversation, prompt, dtype_chosen, max_new_tokens, caption_set.prompt)
    captioner = shared(captioner)
    assert captioner is not None
    full_prompt = captioner.full_prompt
    folder = (output or Path("runs", "eval", captioner.model.name)) / caption_set.name
    if not again:
        finished_run(
            folder,
            {
                "model.weights": captioner.model.weights,
                "settings.conversation": captioner.conversation,
                "settings.dtype": captioner.dtype,
                "settings.max_new_tokens": max_new_tokens,
                "settings.limit": limit,
                "settings.prompt": full_prompt,
                "data.rows_sha256": rows_sha256((image.id, list(image.captions)) for image in images),
            },
        )
    hashes = {
        "references": sha256_of(caption_set.references),
        "model_path": captioner.model.sha256,
        "model_base": captioner.model.base_sha256,
    }
    flags = {**context.params, "references": caption_set.references}
    record = RunRecord(folder, flags, hashes, is_writer=rank == 0, trained=training_of(model_path))
    record.begin()
    log = CaptionLog(folder / ANSWERS, captioner.identity, files, rank)
    wait_for_all()  # so that all processes agree on the missing captions
    missing = [image for image in images if image.id not in log.known]
    if rank == 0:
        typer.echo(
            f"{captioner.model.name}: {len(missing)} of {len(images)} images to caption; template "
            f"{captioner.conversation}, {captioner.dtype}, batch size {batch_size}"
        )
    if own := missing[rank::processes]:
        write_captions(captioner, own, files, log, batch_size, device, show_progress=rank == 0)
    wait_for_all()
    if rank > 0:
        return
    if answers_only:
        record.end()
        typer.echo(
            f"{folder / ANSWERS}: captions of {len(images)} images; next: the same command without --answers-only"
        )
        return

    known = CaptionLog(folder / ANSWERS, captioner.identity, files).known
    answers = {image.id: known[image.id] for image in images}
    scores = score_captions({image.id: image.captions for image in images}, answers, spice)
    settings = RunSettings(
        prompt=full_prompt,
        conversation=captioner.conversation,
        box_frame=None,
        dtype=captioner.dtype,
        batch_size=batch_size,
        seed=0,
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        num_processes=processes,
        limit=limit,
        judge=None,
    )
    write_run(folder, *as_run(captioner.model, settings, caption_set, read.split, images, answers, scores))
    record.end()
    typer.echo(f"{captioner.model.name}, {caption_set.column}\n{as_text(scores)}")
    typer.echo(f"{folder / RESULT_FILE}; next: patch-aligned table 4 --runs {folder.parent}")


def device_of(local_rank: int) -> str:
    """Device of a process. Raises `ValueError` for more processes than GPUs."""
    import torch

    count = torch.cuda.device_count()
    if count and local_rank >= count:
        raise ValueError(
            f"process {local_rank + 1} has no GPU of its own; next: accelerate launch --num_processes {count}"
        )
    return f"cuda:{local_rank}" if count else "cpu"


@dataclass(frozen=True)
class Captioner:
    """A model and how it is asked. Decoding is greedy."""

    model: ModelIdentity
    conversation: str  # name of the template
    prompt: str  # the instruction; empty with a `plain` template, where captions follow their image
    mm_use_im_start_end: bool  # whether the checkpoint expects marks around its images
    dtype: str  # one of `DTYPES`
    max_new_tokens: int

    @property
    def identity(self) -> str:
        """Hash of everything that a caption depends on, except the image."""
        asked = (self.conversation, self.prompt, self.dtype, self.max_new_tokens)
        parts = [*self.model.weights, *asked, version("patch-aligned-llava")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def full_prompt(self) -> str:
        """What the model receives, the same for all images."""
        question = Question("", self.prompt, ("",))
        return prompt_of(question, conv_templates[self.conversation], self.mm_use_im_start_end)


def describe_captioner(
    model: ModelIdentity, conversation: str | None, prompt: str | None, dtype: str, max_new_tokens: int, default: str
) -> Captioner:
    """Fill in what the checkpoint decides: its template, and no prompt instead of `default` with a `plain` one."""
    config = read_llava_config(model.path, model.base)
    conversation = conversation or conversation_mode(get_model_name_from_path(model.path), config)
    if prompt is None:
        is_plain = conv_templates[conversation].sep_style is SeparatorStyle.PLAIN
        prompt = "" if is_plain else default
    with_marks = bool(getattr(config, "mm_use_im_start_end", False))
    return Captioner(model, conversation, prompt, with_marks, dtype, max_new_tokens)


class CaptionLog:
    """Captions of one model with one prompt, stored as they come, so that a stopped run can resume.

    Attributes:
        known: captions by the image's id, of images whose file has not changed since.
    """

    def __init__(self, folder: Path, identity: str, files: Mapping[str, Path], rank: int = 0) -> None:
        self._log = JsonLog(folder, identity, rank)
        self._files = files
        self.known: dict[str, str] = {}
        for path, number, line in self._log.read():
            try:
                image, found, caption = line
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: found no caption; next: delete the file") from error
            if image in files and found == sha256_of(files[image]):
                self.known[image] = caption

    def keep(self, image: str, caption: str) -> None:
        """Add a caption."""
        self._log.append([image, sha256_of(self._files[image]), caption])
        self.known[image] = caption


def write_captions(
    captioner: Captioner,
    images: Sequence[CaptionedImage],
    files: Mapping[str, Path],
    log: CaptionLog,
    batch_size: int,
    device: str,
    show_progress: bool = True,
) -> None:
    """Caption images and add each caption to `log`. Captions do not depend on the batch size."""
    from tqdm import tqdm

    from llava.eval.answering import answer_questions
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        captioner.model.path, captioner.model.base, captioner.model.name, device=device, dtype=captioner.dtype
    )
    answers = answer_questions(
        [Question(image.id, captioner.prompt, (files[image.id],)) for image in images],
        tokenizer,
        model,
        image_processor,
        conv_templates[captioner.conversation],
        GenerationSettings(max_new_tokens=captioner.max_new_tokens),
        batch_size=batch_size,
        workers=WORKERS,
    )
    with tqdm(total=len(images), unit="caption", disable=not show_progress) as bar:
        for answer in answers:
            log.keep(str(answer.question.question_id), answer.text)
            bar.update()


def as_run(
    model: ModelIdentity,
    settings: RunSettings,
    caption_set: CaptionSet,
    split: str,
    images: Sequence[CaptionedImage],
    answers: Mapping[str, str],
    scores: CaptionScores,
) -> tuple[RunResult, list[Sample]]:
    """The run's result and rows. METEOR is no mean over images, so a mean is added, for comparisons."""
    of_run = {
        name: Score(metric.value, metric.stderr, scores.images, "sum" if name == CIDER else "share")
        for name, metric in scores.metrics.items()
    }
    meteor = scores.metrics[METEOR]
    mean, stderr = mean_and_stderr(list(meteor.of_image.values()))
    of_run[METEOR_MEAN] = Score(mean, stderr, scores.images, "share")
    samples = [
        Sample(
            image.id,
            settings.prompt,
            answers[image.id],
            list(image.captions),
            {name: metric.of_image[image.id] for name, metric in scores.metrics.items()}
            | {METEOR_MEAN: meteor.of_image[image.id]},
        )
        for image in images
    ]
    hashed = rows_sha256((sample.id, sample.target) for sample in samples)
    result = RunResult(
        benchmark=caption_set.name,
        tables=(TABLE,),
        column=caption_set.column,
        task="captions",
        model=model,
        harness=Harness("pycocoevalcap", version("pycocoevalcap")),
        libraries={**{name: version(name) for name in LIBRARIES}, "java": str(java_version())},
        settings=settings,
        data=RunData(caption_set.references.name, None, split, len(samples), hashed),
        headline=ROUGE_L,  # a mean over images, so that two models can be compared image by image
        scores=of_run,
        not_available=scores.not_available,
    )
    return result, samples
