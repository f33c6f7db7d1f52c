"""Asks a model the questions of test scenes: how likely it holds each of the given answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.collate import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.model.builder import load_pretrained_model
from patch_aligned.files import written_whole
from playground.mini.proof.experiment import LLM, STAGE_2_TEMPLATE


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a model after stage 2, or of a run of stage 1.")],
    scenes: Annotated[Path, typer.Option(help="Folder of the scenes.")],
    output: Annotated[Path, typer.Option(help="The table to write, a row a question (.parquet).")],
) -> None:
    """Write log p of each answer, summed over its tokens, for all questions of `choices.json`."""
    is_projector = (run / "mm_projector.bin").exists()
    tokenizer, model, processor, _ = load_pretrained_model(
        str(run), LLM if is_projector else None, run.name, device="cpu", torch_dtype=torch.float32
    )
    questions = pd.DataFrame(json.loads((scenes / "choices.json").read_text(encoding="utf-8")))
    by_image = questions.groupby("image", sort=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output.with_suffix(".json")) as data:
        data.write_text(json.dumps([_dialogue(image, asked) for image, asked in by_image]), encoding="utf-8")
    arguments = SimpleNamespace(
        image_folder=str(scenes),
        image_aspect_ratio="square" if is_projector else "pad",
        is_multimodal=True,
        independent_turns=True,
    )
    dataset = LazySupervisedDataset(
        output.with_suffix(".json"),
        tokenizer,
        arguments,
        conversation=conv_templates[STAGE_2_TEMPLATE],
        image_processor=processor,
    )
    collate = DataCollatorForSupervisedDataset(tokenizer)
    answers = [
        answer for row in tqdm(range(len(dataset)), unit="scene") for answer in log_p(model, collate([dataset[row]]))
    ]
    ends = np.cumsum([len(options) for options in questions["options"]])
    questions["log_p"] = np.split(np.array(answers), ends[:-1])
    with written_whole(output) as path:
        questions.drop(columns=["question"]).to_parquet(path)


def _dialogue(image: str, asked: pd.DataFrame) -> dict[str, Any]:
    """A turn for each answer of each question."""
    turns = [
        {"from": who, "value": text}
        for question, options in zip(asked["question"], asked["options"], strict=True)
        for option in options
        for who, text in (("human", question), ("gpt", option))
    ]
    turns[0] = {**turns[0], "value": f"<image>\n{turns[0]['value']}"}
    return {"id": image, "image": image, "conversations": turns}


@torch.no_grad()
def log_p(model: Any, batch: dict[str, Any]) -> list[float]:
    """Return log p of the answer of each turn of a batch of one sample."""
    ids: Tensor = batch["input_ids"][0]  # [T]
    repeats = torch.ones_like(ids)
    repeats[ids == IMAGE_TOKEN_INDEX] = model.visual_tokens_of(batch["image_sizes"][0])
    labels, turns = (batch[key][0].repeat_interleave(repeats) for key in ("labels", "turns"))  # [L]
    labels[(ids == IMAGE_TOKEN_INDEX).repeat_interleave(repeats)] = IGNORE_INDEX
    [answered] = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [n]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "image_sizes", "turns")}
    logits = model(**inputs, logits_to_keep=answered - 1).logits[0]  # [n, M]
    of_token = -F.cross_entropy(logits.float(), labels[answered], reduction="none")  # [n]
    of_turn = torch.zeros(int(turns.max()) + 1).index_add_(0, turns[answered], of_token)
    return of_turn[1:].tolist()


if __name__ == "__main__":
    typer.run(main)
