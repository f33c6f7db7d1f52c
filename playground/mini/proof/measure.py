"""Measures one run of stage 1: alignment, what the frozen LLM names, and how well the run's own targets were learnt."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from tqdm import tqdm

from patch_aligned.analysis.names import NameSettings
from patch_aligned.analysis.regions import MeasureSettings
from patch_aligned.analysis.run import Analysis, AnalysisSettings, analyse, plain_json
from patch_aligned.files import written_whole
from patch_aligned.intervals import Resampling
from patch_aligned.models.base import VisionLanguageModel, WordEmbeddings
from patch_aligned.models.load import load_models
from patch_aligned.pad import read_annotations
from playground.mini.arms import write_arm
from playground.mini.proof.experiment import ARMS, LLM
from playground.mini.sprites import load_sprites
from playground.mini.train_rotated import rotation_about

SCORES = (
    "iou_px", "shuffled_iou_px", "cosine", "other_cosine", "best_word_cosine", "contrast", "top1",
    "name_bound", "name_information", "name_auc",
)  # fmt: skip

CAPTION_TOKENS = 24
"""Most captions of training are shorter."""


def main(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    arm: Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")],
    seed: Annotated[int, typer.Option(help="That the run was trained with.")],
    scenes: Annotated[Path, typer.Option(help="Folder of the scenes to measure on.")],
    targets: Annotated[Path, typer.Option(help="PAD file that the run was trained on.")],
    output: Annotated[Path, typer.Option(help="Path of what is written, without suffix.")],
    objects_only: Annotated[bool, typer.Option("--objects-only", help="Neither captions nor backgrounds.")] = False,
) -> None:
    """Measure a run; writes OUTPUT.json with its metrics, and OUTPUT.parquet with the scores of each object."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = ARMS[arm]
    [model] = load_models([f"{arm}={run}"], base=LLM)
    objects = MeasureSettings(scenes / "pad.json", scenes, region_kind="object", picture_rows=0)
    names = NameSettings(
        {sprite.name: (sprite.plural,) for sprite in load_sprites(simple_only=True)},
        max_new_tokens=0 if objects_only else CAPTION_TOKENS,
    )
    found = measure(model, objects, names)
    own = found
    if chosen.rotated:
        labels = {region.tag for image in read_annotations(targets) for region in image.regions}
        own = measure(replace(model, words=rotated(model.words, sorted(labels), seed)), objects)
    elif chosen.variant == "deranged":
        deranged = output.parent / f"{output.name}_deranged"
        write_arm(scenes, "deranged", deranged, seed)
        own = measure(model, replace(objects, data=deranged / "pad.json"), names)

    of_run = found.models[arm]
    numbers = {
        "arm": arm,
        "seed": seed,
        "images": found.images,
        "labels": found.labels,
        "cosine_floor": of_run.cosine_floor,
        "entropy_before_nats": of_run.entropy_before.entropy_nats,
        "entropy_after_nats": of_run.entropy_after.entropy_nats,
    }
    if not objects_only:
        assert of_run.names is not None
        of_background = measure(model, replace(objects, region_kind="background")).models[arm]
        numbers["captions"] = of_run.names.captions["value"].to_dict()
        numbers["background"] = of_background.metrics["value"][["cosine", "contrast", "retrieval_top1"]].to_dict()
    scores = found.regions[["image", "label", "in_caption", *SCORES]]
    frame = pd.concat([scores, own.regions[[*SCORES]].add_prefix("own_")], axis=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output.with_suffix(".parquet")) as path:
        frame.to_parquet(path)
    with written_whole(output.with_suffix(".json")) as path:
        path.write_text(json.dumps(plain_json(numbers), indent=1) + "\n", encoding="utf-8")


def measure(model: VisionLanguageModel, settings: MeasureSettings, names: NameSettings | None = None) -> Analysis:
    """Analyse one model, with a progress bar and without intervals: those are taken over all runs together."""
    with tqdm(unit="image", desc=settings.region_kind) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return analyse([model], AnalysisSettings(settings, Resampling(0), names=names), show)


def rotated(words: WordEmbeddings, labels: Sequence[str], seed: int) -> WordEmbeddings:
    """Word embeddings turned about the mean of `labels`, as those that the arm R was trained towards."""
    rotation = rotation_about(words.of_labels(labels).mean(dim=0), seed)
    return WordEmbeddings(words.tokenizer, (words.table.double() @ rotation.T).float(), words.source)


if __name__ == "__main__":
    typer.run(main)
