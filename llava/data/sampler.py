"""Sample orders grouped by length, and optionally by modality.

If all samples of a global batch have about the same length and the same modality, batches need little padding, and the
vision tower is either used or idle on all ranks. Given the same random state, orders equal upstream's index by index.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Split indices into chunks of equal count and about equal total length.

    Each index goes to the shortest chunk that is not full. If counts cannot be equal, indices are dealt in turn.
    """
    if len(indices) % num_chunks:
        return [list(indices[chunk::num_chunks]) for chunk in range(num_chunks)]
    capacity = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [(0, chunk) for chunk in range(num_chunks)]  # a heap, shortest first; ties go to the first chunk
    for index in indices:
        total, chunk = heapq.heappop(totals)
        chunks[chunk].append(index)
        if len(chunks[chunk]) < capacity:
            heapq.heappush(totals, (total + int(lengths[index]), chunk))
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """Draw a random order in which each global batch is sorted, longest first, and split evenly between ranks.

    A global batch has `world_size` micro-batches (ranks times accumulation steps) of `batch_size` samples. `merge` is
    unused; accepted for upstream's callers. The order is always one flat list.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    grouped: list[int] = []
    for batch in _batches(order, batch_size * world_size):
        batch.sort(key=lambda index: lengths[index], reverse=True)
        for chunk in split_to_even_chunks(batch, lengths, world_size):
            grouped.extend(chunk)
    return grouped


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw a random order of global batches that are all images or all text (negative length), each grouped by length.

    The remainders of both modalities come last, together, in the order of the data. `generator` draws the order of
    global batches alone.
    """
    with_image = [index for index, length in enumerate(lengths) if length > 0]
    text = [index for index, length in enumerate(lengths) if length < 0]
    if len(with_image) + len(text) != len(lengths):
        zero = next(index for index, length in enumerate(lengths) if not length)
        raise ValueError(f"lengths[{zero}]: found 0, expected a positive length for images or a negative one for text")
    if not with_image or not text:
        return get_length_grouped_indices(lengths, batch_size, world_size, generator=generator)

    whole: list[list[int]] = []
    rest: list[int] = []
    for members in (with_image, text):
        sizes = [abs(int(lengths[index])) for index in members]
        # upstream parity: orders within a modality use the global generator, even if another one is given.
        order = get_length_grouped_indices(sizes, batch_size, world_size, generator=None)
        *batches, last = _batches([members[position] for position in order], batch_size * world_size)
        whole.extend(batches)
        rest.extend(last)  # upstream parity: also if the last batch is full
    shuffled = torch.randperm(len(whole), generator=generator).tolist()
    return [index for number in shuffled for index in whole[number]] + sorted(rest)


class LengthGroupedSampler(Sampler[int]):
    """Sampler that draws a new length-grouped order in each pass. The order depends only on torch's random state.

    With `group_by_modality` images and text, whose lengths are negative, are separate.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
    ) -> None:
        if lengths is None:
            raise ValueError("lengths: found None, expected one length per sample")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(draw(self.lengths, self.batch_size, self.world_size, generator=self.generator))


def micro_steps_of_kinds(text: int, auxiliary: int, size: int, ratio: float | None) -> tuple[int, int]:
    """Return an epoch's micro-steps, of `size` samples over all ranks, of samples with text and of auxiliary ones.

    `ratio` is the number of auxiliary-only micro-steps for each one with text, if there are both; None: each sample
    once.
    """
    with_text, without = math.ceil(text / size), math.ceil(auxiliary / size)
    return with_text, round(ratio * with_text) if ratio is not None and text and auxiliary else without


def mix_kinds(text: Sequence[int], auxiliary: Sequence[int], size: int, ratio: float | None) -> list[int]:
    """Order samples so that each micro-step is of one kind on all ranks, both kinds spread evenly over the epoch.

    A kind's last micro-step is filled up with its first samples, as accelerate does with the last one of an epoch.
    Arguments are those of `micro_steps_of_kinds`, with the indices of the samples in the order drawn.
    """
    counts = micro_steps_of_kinds(len(text), len(auxiliary), size, ratio)
    placed = []
    for kind, (order, count) in enumerate(zip((text, auxiliary), counts, strict=True)):
        batches = _batches(list(islice(cycle(order), count * size)), size)
        placed += [((number + 0.5) / count, kind, batch) for number, batch in enumerate(batches)]
    return [index for _, _, batch in sorted(placed) for index in batch]


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class EpochSampler(Sampler[int]):
    """Samples in an order that depends on seed and epoch only, so it is equal on all ranks and after a restart.

    `draw_order` draws it from torch's global generator, which is seeded before and restored afterwards.
    """

    def __init__(self, draw_order: Callable[[], list[int]], length: int, seed: int):
        self.draw_order = draw_order
        self.length = length
        self.seed = seed
        self.epoch = 0
        self._drawn: tuple[int, list[int]] | None = None  # of one epoch: drawing half a million takes seconds

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """Return the sample indices of an epoch, in order."""
        if self._drawn is None or self._drawn[0] != epoch:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed + epoch)  # torch.manual_seed would also seed the GPUs
                self._drawn = (epoch, self.draw_order())
        return self._drawn[1]

    def fingerprint(self, epoch: int) -> str:
        """Return a short hash of an epoch's order."""
        return hashlib.sha256(" ".join(map(str, self.order(epoch))).encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))
