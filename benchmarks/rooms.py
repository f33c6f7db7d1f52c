"""Counts the modules that a walk through the code enters: how many files a reader opens to follow one thing.

    python benchmarks/rooms.py                  this checkout
    python benchmarks/rooms.py --tree DIR       another one, such as a worktree of an older commit

A module counts once a function of it is called, of `llava` or `patch_aligned`; importing a module is not entering it.
Each walk runs twice on the tiny checkpoints of tests/goldens, and the second run is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGES = ("llava", "patch_aligned")
FLAGS = (
    "--bf16 False --use_cpu True --report_to none --vision_tower tiny-clip --mm_vision_select_layer -2 "
    "--mm_use_im_start_end False --mm_use_im_patch_token False --disable_tqdm True --model_name_or_path tiny-vicuna "
    "--image_folder images --model_max_length 2048 --version plain --tune_mm_mlp_adapter True --max_steps 1 "
    "--per_device_train_batch_size 2 --learning_rate 3e-3 --save_strategy no --data_path pad.json --output_dir run"
)


class Rooms:
    """The modules entered while `watching`."""

    def __init__(self) -> None:
        self.entered: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts while the block runs."""
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.split(".")[0] in PACKAGES and frame.f_code.co_name != "<module>":
            self.entered.add(module)


def plugin_class() -> Any:
    """The plugin, wherever the tree has it."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("patch_aligned.train.plugin").PatchAlignedPlugin
    return importlib.import_module("patch_aligned.plugin").PatchAlignedPlugin


def trained(plugin: Any) -> Any:
    """The trainer after one step of stage 1."""
    train = importlib.import_module("llava.train.train").train
    sys.argv = ["train.py", *FLAGS.split()]
    with contextlib.redirect_stdout(io.StringIO()):
        return train(plugin=plugin)


def image_to_loss(rooms: Rooms) -> None:
    """From the records of two images to the loss of their batch."""
    trainer = trained(None)
    with rooms.watching():
        batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1)])
        trainer.compute_loss(trainer.model, batch)


def region_to_patch_loss(rooms: Rooms) -> None:
    """From the PAD file to the loss of the plugin."""
    base = plugin_class()

    def watched(name: str) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            with rooms.watching():
                return getattr(base, name)(self, *arguments, **keywords)

        return call

    steps = ("setup", "transform_sample", "collate", "auxiliary_losses")
    trained(type("Watched", (base,), {name: watched(name) for name in steps})())


def checkpoint_to_report(rooms: Rooms) -> None:
    """From a projector's folder to report.html."""
    app = importlib.import_module("patch_aligned.cli").app
    runner = importlib.import_module("typer.testing").CliRunner()
    command = (
        "analyze --projector start=train_init/mm_projector.bin --base tiny-vicuna --vision-tower tiny-clip "
        "--data pad.json --image-folder images --output report --resamples 5 --random-init 1 --token-maps 1 "
        "--rounds 1 --picture-rows 1 --english none"
    )
    with rooms.watching():
        result = runner.invoke(app, command.split())
    if result.exit_code:
        raise SystemExit(f"patch-aligned {command}\n{result.output}")


WALKS = (image_to_loss, region_to_patch_loss, checkpoint_to_report)


def make_world(tree: Path, folder: Path) -> None:
    """The tiny checkpoints and a PAD file over their images."""
    goldens = tree / "tests" / "goldens" / "llava"
    for name in ("tiny-clip", "tiny-vicuna", "train_init", "images"):
        shutil.copytree(goldens / name, folder / name)
    from PIL import Image
    from pycocotools import mask as coco_mask

    numpy = importlib.import_module("numpy")
    records = []
    for name in ("im0.png", "im5.png"):
        width, height = Image.open(folder / "images" / name).size
        mask = numpy.zeros((height, width), dtype=numpy.uint8, order="F")
        mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
        rle_mask = coco_mask.encode(mask)["counts"].decode()
        label = {"tag": "dog", "bbox": [0, 0, width, height], "rle_mask": rle_mask}
        records.append({"image_id": name, "size": [width, height], "caption": "a lake", "labels": [label]})
    (folder / "pad.json").write_text(json.dumps(records))


def main() -> int:
    """Prints a table of walks; with --names the modules too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="checkout to count")
    parser.add_argument("--names", action="store_true", help="list the modules of each walk")
    options = parser.parse_args()
    sys.path.insert(0, str(options.tree.resolve()))
    with tempfile.TemporaryDirectory() as scratch:
        make_world(options.tree.resolve(), Path(scratch))
        os.environ |= {"HF_HOME": scratch, "PATCH_ALIGNED_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
        os.chdir(scratch)
        for walk in WALKS:
            for rooms in (Rooms(), Rooms()):
                walk(rooms)
            print(f"{walk.__name__.replace('_', ' '):24s} {len(rooms.entered):3d} modules")
            if options.names:
                print("\n".join(f"    {name}" for name in sorted(rooms.entered)))
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
