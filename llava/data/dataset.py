"""Dataset of training samples: token ids and labels, pixels, and a plugin's tensors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from llava import conversation as templates
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.collate import DataCollatorForSupervisedDataset
from llava.data.features import FeatureCache
from llava.data.records import RecordError, RecordTable, image_names, open_records, turns_of_pattern
from llava.data.tokenization import (
    preprocess,
    preprocess_independent_turns,
    preprocess_multimodal,
    training_segments,
)
from llava.mm_utils import image_view_of, load_rgb_image, process_images

if TYPE_CHECKING:
    from llava.plugin import TrainingPlugin

logger = logging.getLogger(__name__)

_WORDS_FOR_AN_IMAGE = 128
"""Length of an image in words, for grouping samples by length; upstream's number."""
_MOST_WORKERS = 256

GRACE_SAMPLES = 10
"""Up to this number, lost samples are only listed: a share of the first few is meaningless."""
LARGEST_SHARE = 0.01


def too_many_are_lost(lost: int, samples: int) -> bool:
    """Whether too many samples are lost, skipped or without a label, for the run to continue."""
    return lost > max(GRACE_SAMPLES, LARGEST_SHARE * samples)


class LazySupervisedDataset(Dataset):
    """Samples of a data file, prepared on access.

    A sample is a dict with `input_ids` and `labels`, int64 `[L]`, and `sample_id`. With an image it also has `image`,
    `[3, H, W]` (anyres: `[tiles, 3, H, W]`, the base tile first), and `image_size`, (width, height) in pixels; with
    several images, lists of these; with `independent_turns` and an image `turns`, int64 `[L]`; with a plugin
    `plugin_extras`, a dict, empty for text. A record without text whose image the plugin supervises has
    `auxiliary_only`, and its only token is the image. With `on_error="skip"`, a sample that cannot be read has
    `sample_id` and `skipped`, the reason; the collator skips it.

    Args:
        data_path: the data file; see `llava.data.records`.
        tokenizer: the LLM's tokenizer.
        data_args: its `image_folder`, `image_aspect_ratio`, `image_grid_pinpoints` (anyres), `is_multimodal`,
            `mm_use_im_start_end` and `independent_turns` are used; also `image_processor` and `on_error` unless they
            are given below.
        plugin: adds tensors to samples with an image.
        conversation: the template. Default: the current `llava.conversation.default_conversation`.
        grid: rows and columns of visual tokens; required for a plugin.
        seen_side: side of the model image that patches cover, in pixels; None for all.
        image_processor: converts images to pixel tensors.
        on_error: "fail", or "skip" to skip samples that cannot be read and list them in `output_dir`, in a file of
            JSON lines for each rank. A sample that is skipped in two epochs is listed twice.
        output_dir: folder of the run; None only logs them.
        visual_tokens_of: the number of visual tokens of an image of some (width, height), for samples that
            `tokenizer.model_max_length` has no room for.

    Raises:
        FileNotFoundError: if the data file does not exist.
        RecordError: if there are invalid records and `on_error` is "fail"; the message names the first few.
        ValueError: for inconsistent arguments.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: Any,
        data_args: Any,
        *,
        plugin: TrainingPlugin | None = None,
        conversation: Conversation | None = None,
        grid: tuple[int, int] | None = None,
        seen_side: int | None = None,
        image_processor: Any = None,
        on_error: str | None = None,
        output_dir: str | Path | None = None,
        visual_tokens_of: Callable[[tuple[int, int]], int] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.plugin = plugin
        self.conversation = templates.default_conversation if conversation is None else conversation
        self.grid, self.seen_side = grid, seen_side
        self.image_processor = image_processor or getattr(data_args, "image_processor", None)
        self.on_error = on_error or getattr(data_args, "on_error", "fail")
        self.output_dir = output_dir
        self.visual_tokens_of = visual_tokens_of
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"--on_error: found {self.on_error!r}, expected 'fail' or 'skip'")
        if plugin is not None and grid is None:
            raise ValueError("a plugin is given without `grid`; pass the model's visual_grid")
        self.records = open_records(data_path)
        self.rows, self.is_auxiliary = self._usable_rows()
        self.features: FeatureCache | None = None  # of the tower, in place of pixels; see `llava.train.cache_features`
        self._row_of_worker = torch.full((_MOST_WORKERS,), -1).share_memory_()

    @property
    def list_data_dict(self) -> RecordTable:
        """The records; upstream's name."""
        return self.records

    @property
    def lengths(self) -> np.ndarray:
        """Lengths in words, plus 128 with an image: int32 `[samples]`."""
        return (self.records.words() + _WORDS_FOR_AN_IMAGE * self.records.has_image())[self.rows]

    @property
    def modality_lengths(self) -> np.ndarray:
        """Lengths in words, at least 1, negative for text: int32 `[samples]`."""
        words = np.maximum(self.records.words(), 1)  # the sampler distinguishes modalities by sign
        return np.where(self.records.has_image(), words, -words)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        if (worker := get_worker_info()) is not None:
            self._row_of_worker[worker.id % _MOST_WORKERS] = row
        kind = {"auxiliary_only": True} if self.is_auxiliary[index] else {}
        try:
            return self._sample(row, bool(kind)) | kind
        except RecordError as error:
            if self.on_error == "fail":
                raise
            self._list_skipped(row, str(error))
            return {"sample_id": self.records.sample_id(row), "skipped": str(error)} | kind

    def _list_skipped(self, row: int, reason: str) -> None:
        logger.warning("Skipped: %s", reason)
        if self.output_dir is None:
            return
        rank = int(os.environ.get("RANK", "0"))
        path = Path(self.output_dir) / (f"skipped_samples_rank{rank}.jsonl" if rank else "skipped_samples.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:  # workers of a rank append to the same file
            file.write(json.dumps({"id": self.records.sample_id(row), "reason": reason}, ensure_ascii=False) + "\n")

    def being_read(self) -> dict[int, str]:
        """Return the last record that each data loader worker took, with its images."""
        rows = [(worker, row) for worker, row in enumerate(self._row_of_worker.tolist()) if row >= 0]
        return {worker: f"{self.records.where(row)}, {image_names(self.records[row])}" for worker, row in rows}

    def without_text(self) -> LazySupervisedDataset:
        """Return all images that the plugin supervises, as auxiliary-only samples."""
        images = copy(self)
        with_image = self.records.has_image() | self.records.is_textless()
        images.rows = self.rows[_supervised(self.records, self.rows[with_image[self.rows]], self.plugin)[self.rows]]
        images.is_auxiliary = np.ones(len(images.rows), dtype=bool)
        if not len(images):
            raise ValueError(f"{self.records.source}: found no image that can be trained without text")
        return images

    def _sample(self, row: int, is_auxiliary: bool) -> dict[str, Any]:
        record = self.records[row]
        names = image_names(record)
        sample: dict[str, Any] = {"sample_id": self.records.sample_id(row)}
        if is_auxiliary:
            sample["input_ids"] = torch.full((len(names),), IMAGE_TOKEN_INDEX)
            sample["labels"] = torch.full((len(names),), IGNORE_INDEX)
        else:
            sample |= self._encode_text(record, bool(names), row)
        images = [self._load_image(name, row) for name in names]  # (pixels [3, H, W], (width, height)) each
        if len(images) == 1:
            sample["image"], sample["image_size"] = images[0]
        elif images:
            sample["image"], sample["image_size"] = [pixels for pixels, _ in images], [size for _, size in images]
        if self.visual_tokens_of is not None and not is_auxiliary:
            self._require_room(sample["input_ids"], [size for _, size in images], row)
        if self.plugin is not None:
            sample["plugin_extras"] = self._plugin_extras(record, [size for _, size in images], row)
        return sample

    def _encode_text(self, record: Mapping[str, Any], has_image: bool, row: int) -> dict[str, Tensor]:
        try:
            dialogue = [record["conversations"]]
            if has_image and getattr(self.data_args, "independent_turns", False):
                return preprocess_independent_turns(dialogue[0], self.tokenizer, self.conversation, self.data_args)
            if has_image:
                dialogue = preprocess_multimodal(dialogue, self.data_args, self.conversation)
            encoded = preprocess(dialogue, self.tokenizer, has_image, self.conversation)
        except ValueError as error:
            raise RecordError(f"{self.records.where(row)}, {error}") from error
        return {"input_ids": encoded["input_ids"][0], "labels": encoded["labels"][0]}

    def _require_room(self, ids: Tensor, sizes: list[tuple[int, int]], row: int) -> None:
        """Raises `RecordError` where the sequence is cut before the end of its last image."""
        assert self.visual_tokens_of is not None
        positions = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        end = max(positions, default=-1) + 1 + sum(self.visual_tokens_of(size) - 1 for size in sizes)
        if sizes and end > self.tokenizer.model_max_length:
            raise RecordError(
                f"{self.records.where(row)}, field image: its {len(sizes)} images and the text before them take {end} "
                f"tokens, expected at most --model_max_length {self.tokenizer.model_max_length}"
            )

    def _load_image(self, name: str, row: int) -> tuple[Tensor, tuple[int, int]]:
        cached = None if self.features is None else self.features.find(name)
        return self.load_pixels(name, row) if cached is None else cached

    def load_pixels(self, name: str, row: int) -> tuple[Tensor, tuple[int, int]]:
        """Return what the tower sees of an image, and its width and height."""
        folder = Path(self.data_args.image_folder or "")
        try:
            # Symbolic links inside the folder may point elsewhere, since the user made them. A data file may not.
            if ".." in Path(name).parts or leads_out_of(folder, name):
                raise ValueError(f"found {name!r}, expected a path inside --image_folder {folder}")
            image = load_rgb_image(folder / name)
            pixels = process_images([image], self.image_processor, self.data_args)[0]  # [3, H, W] or [tiles, 3, H, W]
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self.records.where(row)}, field image: {error}. Pass --on_error skip to skip such records"
            ) from error
        return pixels, image.size

    def _plugin_extras(self, record: Mapping[str, Any], sizes: list[tuple[int, int]], row: int) -> dict[str, Tensor]:
        if not sizes:
            return {}
        if len(sizes) > 1:
            raise RecordError(
                f"{self.records.where(row)}, field image: found {len(sizes)} images, expected one with a plugin"
            )
        assert self.plugin is not None and self.grid is not None
        aspect_ratio = self.data_args.image_aspect_ratio
        view = image_view_of(sizes[0], self.image_processor, aspect_ratio, self.grid, self.seen_side)
        try:
            return self.plugin.transform_sample(record, view)
        except ValueError as error:
            raise RecordError(f"{self.records.where(row)}, {error}") from error

    def _problems_in_this_run(self, is_auxiliary: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield row and problem of records that break no format, but do not fit the run: all are known before it."""
        yield from missing_files(self.records, Path(self.data_args.image_folder or ""))
        counts = pc.fill_null(pc.list_value_length(self.records.table["images"]), 0).to_numpy()  # [rows]
        most = self.tokenizer.model_max_length
        if self.visual_tokens_of is not None and self.data_args.image_aspect_ratio != "anyres":
            each = self.visual_tokens_of((1, 1))
            for row in np.flatnonzero((counts * each > most) & ~is_auxiliary).tolist():
                yield row, f"field image: {counts[row]} images take {each} tokens each, --model_max_length is {most}"
        for row in np.flatnonzero(counts > 1).tolist() if self.plugin is not None else ():
            yield row, f"field image: found {counts[row]} images, expected one with a plugin"
        encoded = self.records.table["pattern"].combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy()  # [rows]
        for code, pattern in enumerate(encoded.dictionary.to_pylist()):
            try:
                list(training_segments(turns_of_pattern(pattern), self.conversation))
            except ValueError as error:
                yield from ((row, str(error)) for row in np.flatnonzero((codes == code) & ~is_auxiliary).tolist())

    def _usable_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the valid rows, and which of them are auxiliary only.

        All are checked now, so that no run fails on a record after hours.
        """
        is_auxiliary = auxiliary_only(self.records, self.plugin)  # [rows]
        problems = {row: problem for row, problem in self.records.problems().items() if not is_auxiliary[row]}
        rows = np.arange(len(self.records))
        multimodal = getattr(self.data_args, "is_multimodal", False) and self.image_processor is not None
        with_image = np.flatnonzero(self.records.has_image() | is_auxiliary)
        if len(with_image) and not multimodal:
            raise ValueError(
                f"{self.records.where(int(with_image[0]))} has an image, but the run has no vision tower; pass "
                "--vision_tower, or data without images"
            )
        if multimodal and not len(with_image) and not problems:
            raise ValueError(
                f"{self.records.source}: none of its {len(rows)} records names an image, which stands under the key "
                f"`image` or `images` of a record (found here: {', '.join(self.records[0])}); correct the file, or "
                "leave --vision_tower out"
            )
        # Only the first rank of each machine looks for files: it stops the run for all. With `--on_error skip`, samples
        # that only this run cannot read are listed when they are reached.
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        met_later = dict(self._problems_in_this_run(is_auxiliary)) if is_first else {}
        described = [f"{self.records.where(row)}, {problem}" for row, problem in (problems | met_later).items()]
        if described and (self.on_error == "fail" or too_many_are_lost(len(described), len(rows))):
            listing = "\n  ".join(described[:5])
            raise RecordError(
                f"{len(described)} of {len(rows)} records cannot be read or trained on, the first being\n  {listing}\n"
                f"Correct them; --on_error skip leaves out up to {LARGEST_SHARE:.0%} (or {GRACE_SAMPLES})"
            )
        for row, reason in zip(problems, described, strict=False):
            self._list_skipped(row, reason)
        usable = np.setdiff1d(rows[~held_out(self.records, self.plugin)], list(problems))
        if not len(usable):
            reason = described[0] if described else "all show images that are held out"
            raise RecordError(f"{self.records.source}: none of {len(rows)} records can be trained on: {reason}")
        return usable, is_auxiliary[usable]


def leads_out_of(image_folder: Path, name: str) -> bool:
    """Whether an image's path is absolute and not inside the folder. `..` is a problem of its record."""
    return bool(Path(name).anchor) and not Path(name).is_relative_to(image_folder.absolute())


def missing_files(records: RecordTable, image_folder: Path) -> Iterator[tuple[int, str]]:
    """Yield row and problem of images that are not there. Each folder is listed once, for drives of a network."""
    listings: dict[str, set[str] | None] = {}
    rows = pc.list_parent_indices(records.table["images"]).to_pylist()
    for row, name in zip(rows, pc.list_flatten(records.table["images"]).to_pylist(), strict=True):
        below, file = os.path.split(name)
        if leads_out_of(image_folder, name):
            yield row, f"field image: found {name!r}, expected a path inside --image_folder {image_folder}"
            continue
        if below not in listings:
            try:
                listings[below] = {file.name for file in os.scandir(image_folder / below)}
            except (FileNotFoundError, NotADirectoryError):
                listings[below] = set()
            except OSError:  # it may not be listed, yet its files may be read
                listings[below] = None
        listing = listings[below]
        # Some drives find files by other spellings than the listed ones.
        if listing is not None and file not in listing and not (listing and (image_folder / name).exists()):
            yield row, f"field image: {image_folder / name}: no such file; is --image_folder the right one?"


def held_out(records: RecordTable, plugin: TrainingPlugin | None) -> np.ndarray:
    """Return which records show an image that the plugin holds out: bool `[rows]`."""
    found = np.zeros(len(records), dtype=bool)
    if plugin is not None and plugin.held_out:
        names = pc.list_flatten(records.table["images"]).to_pylist()
        is_held = np.array([os.path.normpath(name) in plugin.held_out for name in names], dtype=bool)
        found[pc.list_parent_indices(records.table["images"]).to_numpy()[is_held]] = True
    return found


def auxiliary_only(records: RecordTable, plugin: TrainingPlugin | None) -> np.ndarray:
    """Return which records have no text and an image that the plugin supervises: bool `[rows]`."""
    return _supervised(records, np.flatnonzero(records.is_textless()), plugin)


def _supervised(records: RecordTable, rows: np.ndarray, plugin: TrainingPlugin | None) -> np.ndarray:
    found = np.zeros(len(records), dtype=bool)
    if plugin is not None and len(rows):
        found[rows] = plugin.supervises(records[int(row)] for row in rows)
    return found


def make_supervised_data_module(
    tokenizer: Any, data_args: Any, *, plugin: TrainingPlugin | None = None, **dataset_arguments: Any
) -> dict[str, Any]:
    """Build the trainer's data arguments: `train_dataset`, `eval_dataset` (None) and `data_collator`.

    `data_args` has the `data_path`; all arguments are those of `LazySupervisedDataset`.
    """
    if not data_args.data_path:
        raise ValueError("--data_path is missing; pass the training JSON")
    dataset = LazySupervisedDataset(data_args.data_path, tokenizer, data_args, plugin=plugin, **dataset_arguments)
    collator = DataCollatorForSupervisedDataset(tokenizer, plugin)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}
