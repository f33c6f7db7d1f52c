"""Which part of alignment pays: three studies, each a table and a plot.

- `supervision`: masks, boxes or image tags, with wrong labels among them, on few or many images.
- `exactness`: how near to its word must a token be, and how long, for a frozen LLM to read it? Nothing is trained.
- `unseen`: half of the names is aligned; is the other half found?

The CSV file gets a row as each setting is done; the same command continues after an interruption.

Letters: I images, S visual tokens, d width of the tower, D width of the LLM, R regions of an image, L names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

from llava.train.phases import RAMP
from patch_aligned.analysis.names import STEMS, name_auc
from patch_aligned.files import written_whole
from patch_aligned.images import decode_image, image_path
from patch_aligned.loss import patch_loss, region_cosines, region_embeddings
from patch_aligned.masks import covered_tokens_of_regions
from patch_aligned.models.base import VisionLanguageModel, seeded
from patch_aligned.models.language import LanguageModel, name_bounds
from patch_aligned.models.load import load_models
from patch_aligned.pad import read_annotations
from patch_aligned.tables import Cell, Table
from playground.mini.arms import derange_names
from playground.mini.proof.experiment import LLM, RATE, TOWER, WARMUP_STEPS
from playground.mini.train_rotated import rotation_about

BATCH = 8
LEAST_COVERAGE = 0.5
SEEDS = (0, 1, 2)
Place = Literal["mask", "box", "tag"]
Run = tuple[dict[str, Any], Callable[[], dict[str, float]]]
"""A setting of a study, and what measures it."""


@dataclass(frozen=True)
class Scenes:
    """Scenes as a projector is trained on them."""

    features: Tensor  # [I, S, d]
    tokens: dict[Place, list[Tensor]]  # of each image, [R, S] bool: what masks cover, what boxes cover, and all tokens
    names: list[list[str]]  # of each image, R names


def read_scenes(model: VisionLanguageModel, folder: Path) -> Scenes:
    """Compute the features of scenes, and the tokens that objects cover."""
    features, names = [], []
    tokens: dict[Place, list[Tensor]] = {"mask": [], "box": [], "tag": []}
    for image in tqdm(list(read_annotations(folder / "pad.json")), unit="image", desc=folder.name):
        with torch.inference_mode():
            picture = decode_image(image_path(folder, image.image_id))
            encoded = model.encode([picture])
            features.append(encoded.features[0].clone())
            layout = model.layout(image.size_wh, model.visual_tokens(encoded)[0])
        objects = [region for region in image.regions if region.extra.get("kind") == "object"]
        masks = [region.rle_mask for region in objects]
        covered = covered_tokens_of_regions(masks, image.size_wh, layout.grids[0], LEAST_COVERAGE, image.image_id)
        shown = np.flatnonzero(covered.any(axis=1))
        boxes = np.array([objects[index].bbox_xyxy_px for index in shown]).reshape(-1, 4)  # [R, 4]
        tokens["mask"].append(torch.from_numpy(covered[shown]))
        tokens["box"].append(torch.from_numpy(boxed_tokens(boxes, layout.grids[0].x_edges, layout.grids[0].y_edges)))
        tokens["tag"].append(torch.ones(len(shown), layout.length, dtype=torch.bool))
        names.append([objects[index].tag for index in shown])
    return Scenes(torch.stack(features), tokens, names)


def boxed_tokens(boxes: np.ndarray, x_edges: Sequence[float], y_edges: Sequence[float]) -> np.ndarray:
    """Cells that a box `[R, 4]` covers by at least half, `[R, S]`."""

    def share(low: np.ndarray, high: np.ndarray, edges: np.ndarray) -> np.ndarray:
        overlap = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
        return overlap.clip(min=0) / np.diff(edges)

    across = share(boxes[:, 0], boxes[:, 2], np.array(x_edges))  # [R, cols]
    down = share(boxes[:, 1], boxes[:, 3], np.array(y_edges))  # [R, rows]
    return (down[:, :, None] * across[:, None, :]).reshape(
        len(boxes), down.shape[1] * across.shape[1]
    ) >= LEAST_COVERAGE


def train(
    model: VisionLanguageModel, scenes: Scenes, place: Place, targets: Sequence[Sequence[Tensor]], steps: int, seed: int
) -> nn.Module:
    """Train a new projector by the patch loss alone, as the warm-up of stage 1 does.

    `place` says which tokens a label gets; `targets` are R vectors `[D]` for each image. A step has `BATCH` images.
    """
    projector = seeded(model.build, seed).train()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.0)
    ramp = max(round(RAMP * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / ramp, 1.0))
    labelled = [number for number, of_image in enumerate(targets) if of_image]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < BATCH:
            order += [labelled[number] for number in torch.randperm(len(labelled), generator=generator)]
        batch, order = order[:BATCH], order[BATCH:]
        regions = torch.tensor([len(targets[number]) for number in batch])
        region_image = torch.arange(BATCH).repeat_interleave(regions)  # [R of the batch]
        region_tokens = torch.cat([scenes.tokens[place][number] for number in batch])  # [R of the batch, S]
        wanted = torch.stack([vector for number in batch for vector in targets[number]])  # [R of the batch, D]
        features = scenes.features[batch]  # [BATCH, S, d]
        is_read = torch.zeros(features.shape[:2], dtype=torch.long).index_add(0, region_image, region_tokens.long()) > 0
        tokens = features.new_zeros(*features.shape[:2], wanted.shape[1])  # [BATCH, S, D]; no region reads the others
        tokens = tokens.index_put((is_read,), projector(features[is_read]))
        means = region_embeddings(tokens, region_image, region_tokens)
        loss = patch_loss(region_cosines(means, wanted), region_image, BATCH)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return projector.eval()


@torch.inference_mode()
def retrieval(projector: nn.Module, scenes: Scenes, table: Tensor, names: Sequence[str], of: set[str]) -> float:
    """Share of the objects named in `of` whose mean token is nearest to its own row of `table` `[L, D]`."""
    place = {name: row for row, name in enumerate(names)}
    directions = F.normalize(table, dim=-1)
    hits: list[bool] = []
    for features, covered, own in zip(scenes.features, scenes.tokens["mask"], scenes.names, strict=True):
        if not own:
            continue
        tokens = projector(features[None])
        means = region_embeddings(tokens, torch.zeros(len(own), dtype=torch.long), covered)  # [R, D]
        nearest = (means @ directions.T).argmax(dim=1).tolist()
        hits += [place[name] == found for name, found in zip(own, nearest, strict=True) if name in of]
    return float(np.mean(hits))


def study_supervision(model: VisionLanguageModel, train_on: Scenes, test_on: Scenes, steps: int) -> Iterator[Run]:
    """Retrieval after training on masks, boxes or tags, wrong labels among them, on few or many images."""
    names = sorted({name for own in [*train_on.names, *test_on.names] for name in own})
    word = dict(zip(names, model.words.of_labels(names), strict=True))
    table = torch.stack([word[name] for name in names])
    sizes = [size for size in (50, 200, 800, 3200) if size <= len(train_on.names)]

    def measure(place: Place, noise: float, images: int, seed: int) -> dict[str, float]:
        generator = np.random.default_rng(seed)
        given = [
            [str(generator.choice(names)) if generator.random() < noise else name for name in own]
            for own in train_on.names[:images]
        ]
        projector = train(model, train_on, place, [[word[name] for name in own] for own in given], steps, seed)
        return {"retrieval": retrieval(projector, test_on, table, names, set(names))}

    places: tuple[Place, ...] = ("mask", "box", "tag")
    for place, noise, images, seed in product(places, (0.0, 0.1, 0.3, 0.5), sizes, SEEDS):
        setting = {"supervision": place, "wrong labels": noise, "images": images, "seed": seed}
        yield setting, partial(measure, place, noise, images, seed)


def study_unseen(model: VisionLanguageModel, train_on: Scenes, test_on: Scenes, steps: int) -> Iterator[Run]:
    """Retrieval of the half of the names that no target had, towards words, rotated words and deranged names."""
    names = sorted({name for own in [*train_on.names, *test_on.names] for name in own})

    def measure(arm: str, seed: int) -> dict[str, float]:
        half = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist())
        wrong = derange_names(seed, None)
        table = model.words.of_labels([wrong[name] if arm == "D" else name for name in names])  # [L, D]
        if arm == "R":
            table = table @ rotation_about(table.mean(dim=0), seed).float().T
        target = dict(zip(names, table, strict=True))
        targets = [[target[name] for name in own] for own in train_on.names]
        kept = [[name in half for name in own] for own in train_on.names]
        chosen = [list(compress(*pair)) for pair in zip(targets, kept, strict=True)]
        projector = train(model, _only(train_on, kept), "mask", chosen, steps, seed)
        other = [name for name in names if name not in half]
        of_other = torch.stack([target[name] for name in other])
        return {
            "aligned half": retrieval(projector, test_on, table, names, half),
            "other half": retrieval(projector, test_on, table, names, set(other)),
            "other half, among itself": retrieval(projector, test_on, of_other, other, set(other)),
        }

    for arm, seed in product(("P", "R", "D"), SEEDS):
        yield {"arm": arm, "seed": seed}, partial(measure, arm, seed)


def _only(scenes: Scenes, kept: Sequence[Sequence[bool]]) -> Scenes:
    flags = [torch.tensor(of_image, dtype=torch.bool) for of_image in kept]
    tokens = {place: [own[flag] for own, flag in zip(of, flags, strict=True)] for place, of in scenes.tokens.items()}
    return Scenes(scenes.features, tokens, scenes.names)


def study_exactness(model: VisionLanguageModel, scenes: Scenes, background: Sequence[str]) -> Iterator[Run]:
    """Name scores of a frozen LLM that reads tokens made of words, at several cosines and lengths.

    Tokens stand for the objects of `scenes`; those that no object covers have the image's name in `background`.
    """
    assert model.language is not None
    language = model.language.load()
    assert isinstance(language, LanguageModel)
    names = sorted({name for own in scenes.names for name in own})
    ids = [model.words.token_ids(name) for name in names]
    column = {name: place for place, name in enumerate(names)}
    length = float(model.words.of_labels(names).norm(dim=-1).mean())
    present = np.zeros((len(scenes.names), len(names)), dtype=bool)
    for row, own in enumerate(scenes.names):
        present[row, [column[name] for name in own]] = True

    def measure(cosine: float, words: float) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        log_p = []
        for own, covered, behind in zip(scenes.names, scenes.tokens["mask"], background, strict=True):
            directions = model.words.directions_of_labels([behind])[0].repeat(covered.shape[1], 1)  # [S, D]
            for name, of_object in zip(own, covered, strict=True):
                directions[of_object] = model.words.directions_of_labels([name])[0]
            noise = torch.randn(directions.shape, generator=generator)
            noise = F.normalize(noise - (noise * directions).sum(dim=-1, keepdim=True) * directions, dim=-1)
            tokens = (cosine * directions + (1 - cosine**2) ** 0.5 * noise) * length * words  # [S, D]
            log_p.append(language.log_probabilities(language.read(tokens[None]), STEMS[0], ids)[0].numpy())
        found = np.stack(log_p)  # [I, L]
        return {
            "name score (i)": float(name_bounds(found)[present].mean()),
            "AUC": float(name_auc(found, present)[present].mean()),
        }

    for cosine, words in product((1.0, 0.9, 0.8, 0.7, 0.56, 0.4), (0.5, 1, 2, 6)):
        yield {"cosine": cosine, "length in words": words}, partial(measure, cosine, words)


def run_all(runs: Sequence[Run], path: Path) -> pd.DataFrame:
    """Measure the settings that the CSV file `path` does not have yet. It has all of them afterwards."""
    found = pd.read_csv(path).to_dict("records") if path.is_file() else []
    for setting, measure in tqdm(runs, desc=path.stem):
        if not any(setting.items() <= row.items() for row in found):
            found.append(setting | measure())
            with written_whole(path) as whole:
                pd.DataFrame(found).to_csv(whole, index=False, float_format="%.4f")
    return pd.DataFrame(found)


def summarise(found: pd.DataFrame, values: Sequence[str], by: Sequence[str]) -> Table:
    """A row for each setting, with means over seeds and each seed."""
    rows = [
        [
            *(Cell(str(part)) for part in key),
            *(Cell(f"{group[name].mean():.2f}", " / ".join(f"{v:.2f}" for v in group[name])) for name in values),
        ]
        for key, group in found.groupby(list(by), sort=False)
    ]
    return Table("", [*by, *values], rows)


def draw(found: pd.DataFrame, x: str, y: str, panel: str | None, line: str, path: Path) -> None:
    """Draw lines of means over seeds, with seeds as points."""
    import matplotlib.pyplot as plt

    panels = list(found[panel].unique()) if panel else [None]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, chosen in zip(axes[0], panels, strict=True):
        part = found if panel is None else found[found[panel] == chosen]
        for name, group in part.groupby(line, sort=False):
            means = group.groupby(x)[y].mean()
            [drawn] = axis.plot(means.index, means.to_numpy(), label=f"{line} {name}")
            axis.plot(group[x], group[y], ".", color=drawn.get_color(), markersize=4)
        if found[x].max() > 50 * found[x].min():
            axis.set_xscale("log")
        axis.set_title("" if chosen is None else str(chosen), fontsize=10)
        axis.set_xlabel(x)
    axes[0][0].set_ylabel(y)
    axes[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    study: Annotated[Literal["supervision", "exactness", "unseen"], typer.Argument(help="Which study.")],
    train_on: Annotated[Path, typer.Option("--train", help="Folder of training scenes.")],
    test_on: Annotated[Path, typer.Option("--test", help="Folder of development scenes: the studies are exploratory.")],
    output: Annotated[Path, typer.Option(help="Folder for STUDY.md, STUDY.csv and STUDY.png.")],
    steps: Annotated[int, typer.Option(help="Patch steps of 8 scenes.")] = WARMUP_STEPS,
) -> None:
    """Run one study."""
    [model] = load_models(["projector=random:0"], base=LLM, vision_tower=TOWER)
    tested = read_scenes(model, test_on)
    output.mkdir(parents=True, exist_ok=True)
    picture, csv = output / f"{study}.png", output / f"{study}.csv"
    if study == "exactness":
        found = run_all(list(study_exactness(model, tested, background_of(test_on))), csv)
        table = summarise(found, ["name score (i)", "AUC"], ["cosine", "length in words"])
        draw(found, "cosine", "name score (i)", None, "length in words", picture)
    elif study == "unseen":
        found = run_all(list(study_unseen(model, read_scenes(model, train_on), tested, steps)), csv)
        table = summarise(found, ["aligned half", "other half", "other half, among itself"], ["arm"])
        draw(found, "aligned half", "other half, among itself", None, "arm", picture)
    else:
        found = run_all(list(study_supervision(model, read_scenes(model, train_on), tested, steps)), csv)
        table = summarise(found, ["retrieval"], ["supervision", "wrong labels", "images"])
        draw(found, "images", "retrieval", "supervision", "wrong labels", picture)
    with written_whole(output / f"{study}.md") as path:
        path.write_text(table.markdown() + "\n", encoding="utf-8")
    print(table.markdown())


def background_of(folder: Path) -> list[str]:
    """The first background label of each scene."""
    records = read_annotations(folder / "pad.json")
    return [
        next(region.tag for region in image.regions if region.extra.get("kind") == "background") for image in records
    ]


if __name__ == "__main__":
    typer.run(main)
