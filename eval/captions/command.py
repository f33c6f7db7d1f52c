"""What `python -m eval.captions` does: everything checked, captions written, captions scored."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval.adapter import default_dtype
from eval.captions.answer_file import CaptionLog
from eval.captions.caption_sets import CaptionSet
from eval.captions.generate import Writer, describe_writer, device_of, write_captions
from eval.captions.java import require_metrics
from eval.captions.metrics import score_captions
from eval.captions.record import as_run, as_text
from eval.captions.references import image_files, read_references
from eval.captions.spice import SpiceSetup, find_spice
from eval.checkpoint import identify
from eval.finished import finished_run
from eval.preflight import check_checkpoint
from eval.processes import rank_and_count, shared, wait_for_all
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path
from patch_aligned.results.run_file import RESULT_FILE, rows_sha256, write_run

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
