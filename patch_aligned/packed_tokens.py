"""Covered tokens of all regions of a PAD file, worked out once: one bit a token, memory-mapped.

A pack is one Arrow file with a row for each image of the PAD file's index, in the index's order. Which tokens a mask
covers depends on the mask, on what happens to the image, and on the least coverage; the pack states all three
(`PackedFor`), and is refused where a run's differ. Bits are in the order of `numpy.packbits`: the first token of eight
is the highest bit. 24 x 24 tokens take 72 bytes a region.

Letters: R regions of an image, S visual tokens of an image.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shlex
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from llava.image_geometry import ImageGeometry, Mode
from patch_aligned.files import sha256_of, written_whole
from patch_aligned.masks import covered_tokens_of_regions, require_size
from patch_aligned.pad import ROWS_PER_BATCH, AnnotationIndex, RecordFileError

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when the layout, or what a mask covers, changes
_METADATA_KEY = b"patch_aligned.packed_tokens"
_SUFFIX = ".packed.arrow"
_BITS_PER_BYTE = 8

Watch = Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]


class PackedTokensError(RuntimeError):
    """A pack that is broken, or was made for another PAD file or another geometry; says how to make the right one.

    Not a ValueError: it is no fault of a record, so that no run that skips broken records goes on over it.
    """


@dataclass(frozen=True)
class PackedFor:
    """All that decides which tokens a mask of a given image covers; fields as those of `ImageGeometry`.

    Attributes:
        shortest_edge, processed_side: as they apply, so never None.
        min_coverage: share of a cell's area, inclusive.
    """

    mode: Mode
    side: int
    grid: tuple[int, int]
    shortest_edge: int
    processed_side: int
    min_coverage: float

    @classmethod
    def of(cls, geometry: ImageGeometry, min_coverage: float) -> PackedFor:
        """What a run with images of this geometry needs, whatever their size."""
        output = geometry.side if geometry.processed_side is None else geometry.processed_side
        edge = output if geometry.shortest_edge is None else geometry.shortest_edge
        return cls(geometry.mode, geometry.side, geometry.grid, edge, output, min_coverage)

    def geometry_of(self, size_wh: tuple[int, int]) -> ImageGeometry:
        """The geometry of an image of this size in pixels."""
        return ImageGeometry(size_wh, self.side, self.mode, self.grid, self.shortest_edge, self.processed_side)

    def command(self, source: Path, output: Path) -> str:
        """The command that makes such a pack."""
        flags = f"--grid {self.grid[0]} --side {self.side} --min-coverage {self.min_coverage}"
        flags += f" --image-aspect-ratio {'pad' if self.mode == 'pad' else 'square'}"
        flags += " --squeeze" if self.mode == "squeeze" else ""
        flags += f" --shortest-edge {self.shortest_edge}" if self.shortest_edge != self.processed_side else ""
        flags += f" --processed-side {self.processed_side}" if self.processed_side != self.side else ""
        return f"patch-aligned pack {shlex.quote(str(source))} --output {shlex.quote(str(output))} {flags}"


class PackedImage(NamedTuple):
    """Regions of one image: their tags, and bool `[R, S]`, the tokens that each covers (perhaps none)."""

    tags: Sequence[str]
    covered: np.ndarray


class PackedTokens:
    """The rows of a pack. Read-only, picklable, cheap to fork; `open_packed_tokens` checks whether a run may use it.

    Attributes:
        path: of the pack.
        source: the PAD file, for messages.
        stated: what the pack says of itself: format, packed_for, source, images, regions.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.stated: dict[str, Any] = json.loads((self._reader.schema.metadata or {})[_METADATA_KEY])
        except FileNotFoundError:
            raise PackedTokensError(f"{path}: found no such file; expected the output of patch-aligned pack") from None
        except (pa.ArrowException, OSError, KeyError) as error:
            command = f"patch-aligned pack {shlex.quote(str(source))} --output {shlex.quote(str(path))}"
            raise PackedTokensError(f"{path}: found no whole pack ({error!r}); make it anew with {command}") from error
        if self.stated.get("format") != _FORMAT:
            raise PackedTokensError(
                f"{path}: found format {self.stated.get('format')}; expected format {_FORMAT}, which this version "
                f"reads. Make it anew with patch-aligned pack {shlex.quote(str(source))} --output "
                f"{shlex.quote(str(path))}, and the flags of the run's geometry"
            )
        rule = self.stated["packed_for"]
        self.packed_for = PackedFor(**{**rule, "grid": tuple(rule["grid"])})

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTokens, (self.path, self.source)

    def read(self, row: int, image_id: str, geometry: ImageGeometry) -> PackedImage:
        """Regions of the image in a row of the index.

        Raises:
            PackedTokensError: if the pack is for another geometry, or has another image there.
            PatchMaskError: if the record's size is not the image's.
        """
        wanted = PackedFor.of(geometry, self.packed_for.min_coverage)
        if wanted != self.packed_for:
            self.refuse(_differences(self.packed_for, wanted), _differences(wanted, self.packed_for), wanted)
        batch, place = self._reader.get_batch(row // ROWS_PER_BATCH), row % ROWS_PER_BATCH
        stored_id, width, height, tags = (batch.column(number)[place].as_py() for number in range(4))
        if stored_id != image_id:
            self.refuse(f"image {stored_id!r} in row {row}", f"{image_id!r}", wanted)
        require_size((width, height), geometry, f"{self.source}: image_id {image_id!r}")
        tokens = geometry.grid[0] * geometry.grid[1]
        regions = batch.column(4)
        first, last = (regions.offsets[place + end].as_py() for end in (0, 1))
        row_bytes = regions.type.value_type.byte_width
        bits = np.frombuffer(regions.values.buffers()[1], np.uint8, (last - first) * row_bytes, first * row_bytes)
        covered = np.unpackbits(bits.reshape(-1, row_bytes), axis=1, count=tokens)  # [R, bytes] -> [R, S]
        return PackedImage(tags, covered.view(bool))

    def refuse(self, found: str, expected: str, wanted: PackedFor) -> NoReturn:
        """Names what differs, and the command that makes the pack that is wanted."""
        raise PackedTokensError(
            f"{self.path}: found {found}; expected {expected}. Make the right pack with\n"
            f"  {wanted.command(self.source, self.path)}\n"
            "or train from the masks: leave --patch_packed_path out, and no pack beside the PAD file."
        )


def open_packed_tokens(index: AnnotationIndex, path: str | Path | None, min_coverage: float) -> PackedTokens | None:
    """The pack of a run: the one that `path` names, else the one beside the PAD file, else None.

    Raises:
        PackedTokensError: if the file is no pack, or was made from other PAD records or for another least coverage.
    """
    if path is None and not default_pack_path(index.source).is_file():
        return None
    pack = PackedTokens(Path(path or default_pack_path(index.source)), index.source)
    wanted = replace(pack.packed_for, min_coverage=min_coverage)
    if pack.packed_for != wanted:
        pack.refuse(f"min_coverage {pack.packed_for.min_coverage}", f"{min_coverage}", wanted)
    if not _is_same_file(index.source, pack.stated["source"]):
        pack.refuse(f"tokens of another file ({pack.stated['source']})", f"tokens of {index.source} as it is", wanted)
    if pack.stated["images"] != len(index):
        pack.refuse(f"{pack.stated['images']} images", f"the {len(index)} of the PAD file", wanted)
    logger.info("Covered tokens of %d regions are read from %s", pack.stated["regions"], pack.path)
    return pack


def default_pack_path(source: Path) -> Path:
    """Where a pack is found without being named: beside the PAD file."""
    return source.with_name(source.name + _SUFFIX)


def pack_tokens(
    index: AnnotationIndex, packed_for: PackedFor, output: Path, *, workers: int = 1, watch: Watch = iter
) -> None:
    """Writes the pack of a PAD file, whole or not at all. The bytes do not depend on `workers`.

    Args:
        index: of the PAD file.
        packed_for: geometry and least coverage of the runs that will read it.
        output: Arrow file.
        workers: processes.
        watch: passes the batches on, and may show progress.

    Raises:
        RecordFileError: if the PAD file changes meanwhile.
        ChildProcessError: if a worker is killed.
    """
    source = _identity(index.source)
    stated = {
        "format": _FORMAT,
        "packed_for": asdict(packed_for),
        "source": source,
        "images": len(index),
        "regions": index.regions,
    }
    schema = _schema(packed_for).with_metadata({_METADATA_KEY: json.dumps(stated)})
    pack_batch = partial(_pack_batch, index, packed_for)
    output.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(index.batches)
    with ExitStack() as stack:
        temporary = stack.enter_context(written_whole(output))
        if workers > 1:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            batches: Iterable[pa.RecordBatch] = pool.map(pack_batch, numbers)
        else:
            batches = map(pack_batch, numbers)
        try:
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for batch in watch(batches):
                    writer.write_batch(batch)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"{output}: one of {workers} worker processes was killed, most likely because memory ran out. Nothing "
                "was written. Pass fewer --workers"
            ) from error
        if not _is_same_file(index.source, source):
            raise RecordFileError(f"{index.source}: changed while it was packed; pack it when it is complete")


def _pack_batch(index: AnnotationIndex, packed_for: PackedFor, number: int) -> pa.RecordBatch:
    images = index.read_batch(number)
    bits = []  # [R, bytes] of each image
    for image in images:
        masks, name = [region.rle_mask for region in image.regions], f"{index.source}: image_id {image.image_id!r}"
        geometry = packed_for.geometry_of(image.size_wh)
        covered = covered_tokens_of_regions(masks, image.size_wh, geometry, packed_for.min_coverage, name)  # [R, S]
        bits.append(np.packbits(covered, axis=1))  # [R, S] -> [R, bytes]
    offsets = pa.array(np.cumsum([0, *map(len, bits)]), pa.int32())
    tags = pa.array([region.tag for image in images for region in image.regions], pa.string())
    schema = _schema(packed_for)
    token_type = schema.field("tokens").type.value_type
    buffer = pa.py_buffer(np.concatenate(bits).tobytes())
    tokens = pa.FixedSizeBinaryArray.from_buffers(token_type, len(tags), [None, buffer])
    columns = [
        pa.array([image.image_id for image in images], pa.string()),
        pa.array([image.size_wh[0] for image in images], pa.int32()),
        pa.array([image.size_wh[1] for image in images], pa.int32()),
        pa.ListArray.from_arrays(offsets, tags),
        pa.ListArray.from_arrays(offsets, tokens),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _schema(packed_for: PackedFor) -> pa.Schema:
    rows, cols = packed_for.grid
    token_type = pa.binary(-(-rows * cols // _BITS_PER_BYTE))
    columns = [("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    return pa.schema([*columns, ("tags", pa.list_(pa.string())), ("tokens", pa.list_(token_type))])


def _identity(source: Path) -> dict[str, Any]:
    stat = source.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(source)}


def _is_same_file(source: Path, stated: dict[str, Any]) -> bool:
    """A file of the same size and time is not read; one that was copied or touched is hashed."""
    stat = source.stat()
    if stat.st_size != stated["bytes"]:
        return False
    return stat.st_mtime_ns == stated["mtime_ns"] or sha256_of(source) == stated["sha256"]


def _differences(of: PackedFor, other: PackedFor) -> str:
    others = asdict(other)
    return ", ".join(f"{name} {value}" for name, value in asdict(of).items() if value != others[name])
