"""Fill the cache of a frozen tower's outputs (`--cache_features`).

Each image runs through the tower alone. Rounding depends on the size of a batch, so features computed one by one are
the same in each run, and differ from those of a batch in the last bits only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava.data.dataset import LazySupervisedDataset
from llava.data.features import CachedImage, FeatureCache
from llava.data.records import RecordError, image_names
from llava.model.weights import gathered
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.assemble import mixed_precision_dtype

logger = logging.getLogger(__name__)

_SHARD_BYTES = 1 << 30


class _Pixels(torch.utils.data.Dataset):
    """Pixels of images, for workers; None for one that cannot be read and that `--on_error skip` will skip."""

    def __init__(
        self, dataset: LazySupervisedDataset, cache: FeatureCache, row_of_image: list[tuple[str, int]]
    ) -> None:
        self.dataset, self.cache, self.row_of_image = dataset, cache, row_of_image

    def __len__(self) -> int:
        return len(self.row_of_image)

    def __getitem__(self, index: int) -> tuple[int, Tensor, tuple[int, int]] | None:
        name, row = self.row_of_image[index]
        try:
            pixels, size_wh = self.dataset.load_pixels(name, row)
            return self.cache.key(name), pixels, size_wh
        except RecordError:
            if self.dataset.on_error == "fail":
                raise
            return None


def cache_features(
    model: Any, dataset: LazySupervisedDataset, data_args: DataArguments, training_args: TrainingArguments
) -> None:
    """Compute the features of all images that have none, split over the ranks, and let dataset and model use them."""
    ranks, tower = PartialState(), model.get_vision_tower()
    with gathered(list(tower.parameters())), torch.no_grad():
        folder = Path(str(data_args.cache_features)) / tower_key(tower, data_args, training_args)
        folder.mkdir(parents=True, exist_ok=True)
        # One run fills the cache at a time; another one waits, and finds the images.
        with FileLock(folder / "lock") if ranks.is_main_process else nullcontext():
            ranks.wait_for_everyone()
            cache = FeatureCache(folder, data_args.image_folder)
            images = {name: row for row in dataset.rows.tolist() for name in image_names(dataset.records[row])}
            missing = [(name, row) for name, row in images.items() if name not in cache]
            shape = (tower.num_patches + (tower.select_feature == "cls_patch"), tower.hidden_size)
            check_room(folder, len(missing), len(images), shape, tower.dtype)
            ranks.wait_for_everyone()
            own = missing[ranks.process_index :: ranks.num_processes]
            loader = DataLoader(
                _Pixels(dataset, cache, own), batch_size=None, num_workers=training_args.dataloader_num_workers
            )
            is_hidden = bool(training_args.disable_tqdm) or not ranks.is_main_process
            encoded = encode(tower, tqdm(loader, "Features", disable=is_hidden), training_args)
            of_shard = math.ceil(_SHARD_BYTES / (math.prod(shape) * tower.dtype.itemsize))
            while images_of_shard := list(islice(encoded, of_shard)):
                cache.add(images_of_shard)
            ranks.wait_for_everyone()
    cache.reload()
    dataset.features, model.reads_features = cache, True


def encode(tower: Any, images: Any, training_args: TrainingArguments) -> Iterator[CachedImage]:
    """Run each image through the tower as the forward pass of training does."""
    half = mixed_precision_dtype(training_args)
    is_automatic = half != torch.float32 and not training_args.deepspeed
    for key, pixels, size_wh in filter(None, images):  # None: an image that cannot be read
        with torch.autocast(tower.device.type, dtype=half, enabled=is_automatic):
            yield key, tower.encode(pixels[None])[0].cpu(), size_wh  # [1, 3, H, W] -> [S, C]


def tower_key(tower: Any, data_args: DataArguments, training_args: TrainingArguments) -> str:
    """Return a hash of all that features depend on, but for the image."""
    settings = {
        "config": tower.config.to_diff_dict(),
        "processor": tower.image_processor.to_dict(),
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "select": [tower.select_layer, tower.select_feature],
        "dtype": [str(tower.dtype), str(mixed_precision_dtype(training_args)), bool(training_args.deepspeed)],
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=10)
    for name, weight in sorted(tower.named_parameters()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_room(folder: Path, missing: int, images: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Log what the missing features will take, and raise `ValueError` if there is less room."""
    tokens, width = shape
    needed, free = missing * tokens * width * dtype.itemsize, shutil.disk_usage(folder).free
    taken = f"{missing:,} x {tokens} x {width:,} in {str(dtype).removeprefix('torch.')} take {needed / 1e9:,.2f} GB"
    logger.info("%s: features of %d of %d images are missing: %s", folder, missing, images, taken)
    if needed > free:
        raise ValueError(
            f"--cache_features: found {free / 1e9:,.2f} GB free for {folder}, expected room for the features: {taken}. "
            "Give a folder on a larger disk, or leave the flag out."
        )
