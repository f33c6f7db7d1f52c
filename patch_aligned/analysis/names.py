"""Name scores: does the LLM say what a picture shows, once it has read the visual tokens?

After a fixed beginning of an answer ("A picture of a"), every name has a log-probability. Three scores of a name that a
picture shows compare it with other pictures and with other names, free of how likely the LLM finds the name anyway.
Beside them, greedy captions are searched for the names.

Letters: P pictures, N names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from patch_aligned.analysis.regions import MeasuredSet, MeasureSettings, open_image
from patch_aligned.intervals import Resampling, ratios_of
from patch_aligned.models.base import ReadingModel, VisionLanguageModel
from patch_aligned.models.language import name_bounds

STEMS = ("A picture of a", "A picture with the")


# The scores, each of a matrix `[P, N]` of natural log-probabilities.


def name_information(log_p: np.ndarray) -> np.ndarray:
    """`log N` less the NLL of a name among the N names: nats, 0 is an even guess, at most `log N`."""
    return log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True) + np.log(log_p.shape[1])


def name_auc(log_p: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Share of the absent names of all pictures that lie below a name, once each name's mean is taken away.

    The mean over present names (`[P, N]` is true where the picture shows the name) is the area under the ROC curve;
    ties count half. NaN where no name is absent.
    """
    centred = log_p - log_p.mean(axis=0)
    absent = np.sort(centred[~present])
    if not len(absent):
        return np.full(log_p.shape, np.nan)
    below = [np.searchsorted(absent, centred, side) for side in ("left", "right")]
    return (below[0] + below[1]) / (2 * len(absent))


def name_scores(log_p_of_stems: Sequence[np.ndarray], present: np.ndarray) -> dict[str, np.ndarray]:
    """The scores by the names of `regions.SCORES_BY_NAME`, `[P, N]` each, means over stems."""
    of_stems = {
        "name_bound": map(name_bounds, log_p_of_stems),
        "name_information": map(name_information, log_p_of_stems),
        "name_auc": (name_auc(log_p, present) for log_p in log_p_of_stems),
    }
    return {name: np.mean(list(scores), axis=0) for name, scores in of_stems.items()}


def name_finder(names: Mapping[str, Sequence[str]]) -> Callable[[str], set[str]]:
    """Return a function from a caption to the names in it, as whole words, the longest first, in any case.

    `names` has the further forms of each name; the regular plurals of all forms count too.
    """
    name_of: dict[str, str] = {}
    for name, forms in names.items():
        for form in (name, *forms):
            for ending, plural in (("", "s"), ("", "es"), ("y", "ies"), ("fe?", "ves")):
                name_of[re.sub(f"{ending}$", plural, form.lower(), count=1)] = name
    name_of |= {form.lower(): name for name, forms in names.items() for form in (name, *forms)}  # before any plural
    spellings = "|".join(map(re.escape, sorted(name_of, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)(?:{spellings})(?!\w)")
    return lambda caption: {name_of[found] for found in pattern.findall(" ".join(caption.lower().split()))}


def caption_metrics(mentioned: np.ndarray, present: np.ndarray, resampling: Resampling) -> pd.DataFrame:
    """Precision, recall and F1 of the names in captions, over all pictures, with intervals over pictures.

    `[P, N]` says whether the caption has the name, and whether the picture shows it. Rows are as in `metrics_of`.
    """
    hits, said, shown = (of.sum(axis=1) for of in (mentioned & present, mentioned, present))  # [P] each
    sums, counts = np.stack([hits, hits, 2 * hits], axis=1), np.stack([said, shown, said + shown], axis=1)  # [P, 3]
    return ratios_of(sums.astype(float), counts.astype(float), resampling, ("precision", "recall", "f1"))


@dataclass(frozen=True)
class NameSettings:
    """What the LLM is asked."""

    names: Mapping[str, Sequence[str]] | None = None  # each with its further forms in captions; None: the set's labels
    stems: tuple[str, ...] = STEMS  # beginnings of the answer; scores are means over them
    max_new_tokens: int = 64  # of a caption; 0 writes none


@dataclass(frozen=True)
class NameAnalysis:
    """Captions of one model, and how many names its scores, which the region frame has, choose from."""

    names: int  # N
    captions: pd.DataFrame  # see `caption_metrics`
    caption_of: dict[str, str]  # by image id


def read_name_file(path: Path) -> dict[str, tuple[str, ...]]:
    """Read names, one a line, each with its further forms after commas: `mouse, mice`."""
    lines = [[" ".join(form.split()) for form in line.split(",")] for line in path.read_text("utf-8").splitlines()]
    names = {name: tuple(filter(None, forms)) for name, *forms in lines if name}
    if not names:
        raise ValueError(f"--names {path}: found no name; expected one a line, as the labels of --data are spelled.")
    return names


@torch.no_grad()
def read_names(
    model: VisionLanguageModel,
    language: ReadingModel,
    batches: Iterable[Sequence[Image.Image]],
    names: Sequence[str],
    settings: NameSettings,
) -> tuple[list[np.ndarray], list[str]]:
    """Let a model's LLM, `model.language.load()`, read batches of pictures; no number depends on the batches.

    Returns log-probabilities of the names, tokenised as inside a sentence, `[P, N]` for each stem; and the captions.
    """
    ids = [model.words.token_ids(name) for name in names]
    log_p: list[list[np.ndarray]] = [[] for _ in settings.stems]
    captions: list[str] = []
    for images in batches:
        seen = language.see(model, images)
        for stem, found in zip(settings.stems, log_p, strict=True):
            found.append(language.log_probabilities(seen, stem, ids).cpu().numpy())
        if settings.max_new_tokens:
            captions += language.captions(seen, settings.max_new_tokens)
    return [np.concatenate(found) for found in log_p], captions


def analyse_names(
    models: Sequence[VisionLanguageModel],
    measured: MeasuredSet,
    measure: MeasureSettings,
    settings: NameSettings,
    resampling: Resampling,
    tell: Callable[[int], None],
) -> Iterator[tuple[str, pd.DataFrame, NameAnalysis]]:
    """Let each model's LLM read all images: its name, scores as columns of the region frame, and captions.

    Of several regions of a name in an image, the largest has the score: a name counts once an image.
    """
    forms = settings.names or dict.fromkeys(measured.labels, ())
    names, find, images = list(forms), name_finder(forms), measured.images
    column = measured.regions["label"].astype(object).map({name: number for number, name in enumerate(names)})
    known = measured.regions.assign(column=column).dropna(subset="column")
    largest = known.loc[known.groupby(["image", "column"], observed=True)["area_px"].idxmax()]
    places = largest["image"].cat.codes.to_numpy(), largest["column"].to_numpy(dtype=int)
    present = np.zeros((len(images), len(names)), dtype=bool)
    present[places] = True

    def batches(size: int) -> Iterator[list[Image.Image]]:
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            yield [open_image(image, measure) for image in batch]
            tell(len(batch))

    source = language = None
    for model in models:
        assert model.language is not None  # whatever `load_models` loads has one
        if model.language != source:
            language = None  # before the next is loaded: memory may not hold two
            source, language = model.language, model.language.load()
        assert language is not None
        size = measure.batch_size if model.encoder.takes_batches else 1
        log_p, captions = read_names(model, language, batches(size), names, settings)
        captions = captions or [""] * len(images)
        scores = {name: score[places] for name, score in name_scores(log_p, present).items()}
        mentioned = np.array([[name in found for name in names] for found in map(find, captions)])
        caption_of = dict(zip((image.image_id for image in images), captions, strict=True))
        of_captions = caption_metrics(mentioned, present, resampling)
        yield model.name, pd.DataFrame(scores, largest.index), NameAnalysis(len(names), of_captions, caption_of)
