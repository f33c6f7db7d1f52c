"""What came out: as text for people, as JSON for captions of another source, as a run for the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from eval.captions.caption_sets import CaptionSet
from eval.captions.java import java_version
from eval.captions.metrics import CIDER, METEOR, METRICS, ROUGE_L, CaptionScores, mean_and_stderr
from eval.captions.references import CaptionedImage
from patch_aligned.results.run_file import Harness, RunData, RunResult, RunSettings, Sample, Score, rows_sha256

if TYPE_CHECKING:
    from eval.captions.generate import Writer

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
