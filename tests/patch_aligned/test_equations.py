"""A whole stage 1 against the paper's equations, written down anew in float64 on Hugging Face's CLIP and Llama.

Nothing of the two packages is used for what is expected: geometry, coverage, labels, both losses, beta's schedule,
accumulation and the optimizer's steps are all stated here. The images have odd shapes; of the micro-batches some have
no labelled image, and some images no record, no region, or regions without a token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, LlamaForCausalLM

from llava.train.train import train
from patch_aligned.train.plugin import PatchAlignedPlugin
from tests.pads import rle_of

SIDE, GRID, STEPS, ACCUMULATION, BATCH, LEARNING_RATE = 56, 4, 3, 2, 2, 0.5
SIZES_WH = [(97, 41), (41, 97), (224, 56), (57, 63), (56, 56), (333, 100), (10, 11), (61, 200), (128, 64), (64, 127)]
SIZES_WH += [(300, 299), (57, 56)]  # one for each sample of the run
WITHOUT_RECORD, WITHOUT_REGION = (3, 6), (4, 8, 9)  # 8 and 9 are a micro-batch
TAGS = ["water", "traffic light", "a very odd dog-house", "é"]
FLAGS = (
    "--bf16 False --use_cpu True --report_to none --logging_steps 1 --seed 42 --vision_tower tiny-clip "
    "--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --disable_tqdm True "
    "--model_name_or_path tiny-vicuna --image_folder odd --model_max_length 2048 --version plain --output_dir out "
    "--tune_mm_mlp_adapter True --mm_projector_type mlp2x_gelu --pretrain_mm_mlp_adapter start.bin "
    "--data_path train.json --patch_data_path pad.json "
    "--optim sgd --lr_scheduler_type constant --weight_decay 0 --max_grad_norm 1e9 --save_strategy no "
    f"--learning_rate {LEARNING_RATE} --per_device_train_batch_size {BATCH} --max_steps {STEPS} "
    f"--gradient_accumulation_steps {ACCUMULATION} --train_sampling_strategy sequential --image_aspect_ratio"
)
Layers = dict[str, Tensor]


def write_world() -> None:
    """Images of noise with elliptical regions, their captions, and the projector to start from."""
    random = np.random.default_rng(1)
    Path("odd").mkdir()
    samples, records = [], []
    for number, (width, height) in enumerate(SIZES_WH):
        name, y, x = f"{number}.png", *np.mgrid[:height, :width]
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(Path("odd") / name)
        caption = " ".join(random.choice(["a", "lake", "dog", "red", "boat"], random.integers(2, 9)))
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        samples.append({"id": name, "image": name, "conversations": turns})
        labels = []
        for _ in range(0 if number in WITHOUT_REGION else random.integers(1, 5)):
            centre_x, centre_y, size = (
                random.random() * width,
                random.random() * height,
                random.choice([4e-4, 0.1, 0.2]),
            )
            mask = ((x - centre_x) / width) ** 2 + ((y - centre_y) / height) ** 2 < size
            labels.append({"tag": str(random.choice(TAGS)), "bbox": [0, 0, 1, 1], "rle_mask": rle_of(mask)})
        if number not in WITHOUT_RECORD:
            records.append({"image_id": name, "size": [width, height], "caption": "", "labels": labels})
    Path("train.json").write_text(json.dumps(samples))
    Path("pad.json").write_text(json.dumps(records))
    seen, wide = 32, 64  # widths of tiny-clip and tiny-vicuna
    torch.manual_seed(0)
    layers = {"0.weight": torch.randn(wide, seen) / 10, "0.bias": torch.zeros(wide)}
    layers |= {"2.weight": torch.randn(wide, wide) / 10, "2.bias": torch.zeros(wide)}
    torch.save({f"model.mm_projector.{name}": values for name, values in layers.items()}, "start.bin")


def overlaps(edges: np.ndarray) -> np.ndarray:
    """Length of each cell, in cells, under each pixel whose edges are given in model pixels: `[GRID, pixels]`."""
    starts = np.arange(GRID)[:, None] * SIDE / GRID
    common = np.minimum(edges[1:], starts + SIDE / GRID) - np.maximum(edges[:-1], starts)
    return np.clip(common, 0, None) * GRID / SIDE


class Equations:
    """The paper's losses of one sample at a time, in float64."""

    def __init__(self, aspect: str) -> None:
        self.aspect = aspect
        options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
        self.tower = CLIPVisionModel.from_pretrained("tiny-clip", **options).requires_grad_(False)
        self.llm = LlamaForCausalLM.from_pretrained("tiny-vicuna", **options).requires_grad_(False)
        self.words = self.llm.get_input_embeddings().weight
        self.tokenizer = AutoTokenizer.from_pretrained("tiny-vicuna")
        self.processor = CLIPImageProcessorPil.from_pretrained("tiny-clip")
        self.labels = {record["image_id"]: record["labels"] for record in json.loads(Path("pad.json").read_text())}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def framed(self, image: Image.Image) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """The image as its processor gets it, and where the edges of its pixels lie in the model's image."""
        width, height = image.size
        x, y = np.arange(width + 1.0), np.arange(height + 1.0)
        if self.aspect == "pad":
            side = max(image.size)
            left, top = (side - width) // 2, (side - height) // 2
            canvas = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.processor.image_mean))
            canvas.paste(image, (left, top))
            return canvas, (x + left) * SIDE / side, (y + top) * SIDE / side
        shortest = min(image.size)
        wide, high = int(SIDE * width / shortest), int(SIDE * height / shortest)
        return image, x * wide / width - (wide - SIDE) // 2, y * high / height - (high - SIDE) // 2

    def of_sample(self, sample: dict[str, Any], layers: Layers) -> tuple[Tensor, int, Tensor | None]:
        """Summed caption loss (6), its number of tokens, and patch loss (5) if a region covers a token."""
        image = Image.open(Path("odd") / sample["image"]).convert("RGB")
        framed, x, y = self.framed(image)
        pixels = torch.from_numpy(np.array(self.processor(framed)["pixel_values"])).double()
        seen = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        w0, b0, w2, b2 = layers.values()
        visual = torch.nn.functional.gelu(seen @ w0.T + b0) @ w2.T + b2  # V [S, D]
        cosines = []
        for label in self.labels.get(sample["image"], ()):
            mask = coco_mask.decode({"size": image.size[::-1], "counts": label["rle_mask"].encode()})
            covered = np.flatnonzero(overlaps(y) @ mask @ overlaps(x).T >= 0.5 - 1e-12)  # Idx(p)
            if covered.size:
                text = self.words[self.ids(label["tag"])].mean(dim=0)  # t(p), (2)
                cosines.append(torch.cosine_similarity(visual[covered].mean(dim=0), text, dim=0))
        caption = self.ids(sample["conversations"][1]["value"] + "\n")
        rows = torch.cat([self.words[[self.tokenizer.bos_token_id]], visual, self.words[caption]])
        scores = self.llm(inputs_embeds=rows[None]).logits[0, len(visual) : -1].log_softmax(dim=-1)
        patch = 1 - torch.stack(cosines).mean() if cosines else None
        return -scores[range(len(caption)), caption].sum(), len(caption), patch

    def run(self, layers: Layers) -> tuple[list[dict[str, float]], Layers]:
        """Losses of each step, and the projector after the last."""
        samples, logged = iter(json.loads(Path("train.json").read_text())), []
        for step in range(STEPS):
            captions, patches = [], []  # means of the micro-batches
            for _ in range(ACCUMULATION):
                sums, counts, of_images = zip(
                    *(self.of_sample(next(samples), layers) for _ in range(BATCH)), strict=True
                )
                captions.append(sum(sums) / sum(counts))
                labelled = [patch for patch in of_images if patch is not None]
                patches.append(torch.stack(labelled).mean() if labelled else torch.zeros((), dtype=torch.float64))
            beta = 5.0 * step / (STEPS - 1)
            caption, patch = torch.stack(captions).mean(), torch.stack(patches).mean()
            gradients = torch.autograd.grad(caption + beta * patch, list(layers.values()))  # (7)
            values = zip(layers.items(), gradients, strict=True)
            layers = {name: (v.detach() - LEARNING_RATE * slope).requires_grad_() for (name, v), slope in values}
            terms = {"loss/caption": caption, "loss/patch": patch, "loss": caption + beta * patch}
            logged.append({"patch/beta": beta} | {name: value.item() for name, value in terms.items()})
        return logged, layers


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_losses_and_trained_projector_are_those_of_the_equations(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch, aspect: str
) -> None:
    monkeypatch.setenv("PATCH_ALIGNED_CACHE", "cache")
    monkeypatch.setattr("llava.data.records.HF_HOME", str(golden_world / "cache"))
    write_world()
    start = {name: values.double() for name, values in torch.load("start.bin", weights_only=True).items()}
    expected, trained = Equations(aspect).run({name: v.clone().requires_grad_() for name, v in start.items()})
    monkeypatch.setattr(sys, "argv", ["train_mem.py", *FLAGS.split(), aspect])
    history = train(plugin=PatchAlignedPlugin()).state.log_history
    history = [entry for entry in history if "loss/patch" in entry]
    assert all(
        any(entry[name] for entry in history) for name in ("patch/dropped_regions", "patch/images_without_record")
    )
    steps = [{name: entry[name] for name in expected[0]} for entry in history]
    assert steps == [pytest.approx(of_step, rel=1e-6, abs=1e-9) for of_step in expected]
    for name, values in torch.load("out/mm_projector.bin", weights_only=True).items():
        moved, should_move = values.double() - start[name], trained[name].detach() - start[name]
        assert (moved - should_move).norm() < 5e-6 * should_move.norm(), name  # float32 against float64
