"""Who works on which shard: one process, several that share out the shards by their rank, or Ray's actors.

All of them call `process_shard` and nothing else, and all give the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from patch_aligned.annotate.job import AnnotationJob, ShardWorker
from patch_aligned.annotate.run_folder import RunFolder
from patch_aligned.annotate.shards import ShardHeader
from patch_aligned.annotate.stage_clock import StageTimes

Engine = Literal["local", "torchrun", "ray"]


class Watcher(Protocol):
    """Who looks on."""

    def opened(self, folder: RunFolder, todo: Sequence[int]) -> None:
        """Called once, with the shards that are left to do."""

    def image_done(self) -> None:
        """Called for each image that is done in this process; not for those of Ray's actors."""

    def finished(self, header: ShardHeader, times: StageTimes) -> None:
        """Called with each shard that was done, and what it took."""


class EngineError(ValueError):
    """An engine that doesn't fit how the process was started, or isn't installed."""


@dataclass(frozen=True)
class Place:
    """This process among those that share the shards.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: what its models run on.
    """

    rank: int
    world_size: int
    device: str

    def shards(self, folder: RunFolder) -> list[int]:
        """Shards that are this process's, done or not. A shard's owner is fixed: nothing has to be agreed upon."""
        return list(range(self.rank, folder.num_shards, self.world_size))


def place_of(engine: Engine, device: str, environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands.

    Args:
        engine: `local` is the only process, `torchrun` reads RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets, or
            the job script of a Slurm array.
        device: as given; `auto` is the GPU of this process's local rank, or the CPU.
        environment: variables.

    Raises:
        EngineError: several processes that all are `local`, or none of the variables.
    """
    rank, world_size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if engine == "torchrun":
        if rank is None or world_size is None:
            raise EngineError(
                "--engine torchrun: found no RANK and WORLD_SIZE, which torchrun sets. Start it with `torchrun "
                "--nproc_per_node 8 --no_python patch-aligned annotate ...`, or set both in the script of a Slurm array"
            )
        local_rank = environment.get("LOCAL_RANK", "0")
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise EngineError(f"RANK, WORLD_SIZE: found {rank!r} and {world_size!r}, expected 0 to WORLD_SIZE - 1")
        if not local_rank.isdecimal():
            raise EngineError(
                f"LOCAL_RANK: found {local_rank!r}, expected this process's number on its machine, from 0"
            )
        return Place(int(rank), int(world_size), _device(device, int(local_rank)))
    if engine == "local" and world_size not in (None, "", "1"):
        raise EngineError(
            f"--engine local: found WORLD_SIZE {world_size}, so that each of {world_size} processes would do all the "
            "work. Pass --engine torchrun"
        )
    return Place(0, 1, _device(device, 0))


def _device(device: str, local_rank: int) -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return f"cuda:{local_rank % gpus}" if gpus else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f"--device: found {device!r}, expected `auto`, `cpu` or `cuda:1`") from error
    if asked.type != "cuda":
        return device
    if not gpus:
        raise EngineError(f"--device {device}: torch sees no CUDA device here. Pass --device cpu")
    if asked.index is None:  # `cuda` alone would be the first GPU to every process
        return f"cuda:{local_rank % gpus}"
    if asked.index >= gpus:
        raise EngineError(f"--device {device}: found {gpus} GPUs here, expected cuda:0 to cuda:{gpus - 1}")
    return device


def run_here(job: AnnotationJob, place: Place, watcher: Watcher) -> RunFolder:
    """Does this process's shards that aren't done, or have records to try again."""
    worker = ShardWorker(job, place.device)
    todo = [shard for shard in place.shards(worker.folder) if worker.folder.is_left(shard, job.retry)]
    watcher.opened(worker.folder, todo)
    for shard in todo:
        watcher.finished(*worker.process(shard, watcher.image_done))
    return worker.folder


def run_with_ray(job: AnnotationJob, workers: int | None, device: str, watcher: Watcher) -> RunFolder:
    """Does all shards that aren't done with Ray's actors, each with a GPU where there are any.

    Takes part in the cluster that RAY_ADDRESS names, or starts one here. All nodes need the same paths. An actor that
    dies is started again by Ray, and its shard is done anew.

    Args:
        job: what to do.
        workers: actors; by default one for each GPU of the cluster, or 1.
        device: `auto` for GPUs where there are any, `cuda` to insist on them, `cpu` for none.
        watcher: looks on.

    Raises:
        EngineError: if Ray isn't installed, there are more workers than GPUs, none where they are insisted on, or an
            actor that is started again still dies.
        ValueError, OSError, ImportError: what an actor raised.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool
    except ImportError as error:
        raise EngineError("--engine ray: Ray isn't installed: pip install 'patch-aligned-llava[annotate]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
            raise EngineError(
                f"--engine ray --device {device}: found {gpus} GPUs in the cluster, of which Ray gives each actor one; "
                "expected --device `auto`, `cpu`, or `cuda` where there are any"
            )
        if gpus and (workers or 0) > gpus:
            raise EngineError(
                f"--ray_workers {workers}: found {gpus} GPUs in the cluster, expected no more workers: each "
                "takes one, the others would wait for ever"
            )
        # Ray shows each actor its own GPU alone, which is cuda:0 to it.
        actor_class = ray.remote(num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=3)(ShardWorker)
        shared_job = ray.put(job)
        actors: list[Any] = [
            actor_class.remote(shared_job, "cuda:0" if gpus else "cpu") for _ in range(workers or gpus or 1)
        ]
        ray.get([actor.ready.remote() for actor in actors])
        folder = RunFolder(job.output)
        todo = [shard for shard in range(folder.num_shards) if folder.is_left(shard, job.retry)]
        watcher.opened(folder, todo)
        done = ActorPool(actors).map_unordered(lambda actor, shard: actor.process.remote(shard), todo)
        for header, times in done:
            watcher.finished(header, times)
        return folder
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError | ImportError):
            raise error.cause from None  # wrong input, without the actor's traceback in the message
        raise
    except RayError as error:
        raise EngineError(
            f"--engine ray: an actor died again and again ({str(error).strip().splitlines()[0]}). What is done stays: "
            "once that is mended, run the same command again. Too little memory is the commonest cause: fewer "
            "--ray_workers, or a smaller --chunk"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()
