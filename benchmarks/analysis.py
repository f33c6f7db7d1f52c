"""Images a second and peak memory of an analysis: only records, under a kilobyte a region, may add to it.

    python benchmarks/analysis.py

Analyses an untrained projector on scenes of the miniature, copied as often as need be, each number of images in a
process of its own. `bash scripts/prepare_mini.sh` makes models and scenes.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from measuring import command_line

from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models
from patch_aligned.intervals import Resampling
from patch_aligned.pad import read_annotations, write_annotations

MODELS = Path("playground/mini/cache/models")
SCENES = Path("playground/data/mini/train")
MOST_GROWTH = 1.05


def analyse_images(images: int) -> dict[str, float]:
    """Images a second, and the process's peak memory in bytes."""
    scenes = list(read_annotations(SCENES / "pad.json"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = []
        for number in range(images):  # copies: a set has one record an image
            scene = scenes[number % len(scenes)]
            records.append(replace(scene, image_id=f"{number:05}.jpg"))
            shutil.copy(SCENES / scene.image_id, folder / records[-1].image_id)
        write_annotations(records, folder / "pad.jsonl")
        del scenes, records
        models = load_models(["random=random:0"], str(MODELS / "smollm2-135m-instruct"), str(MODELS / "dinov2-small"))
        measure = MeasureSettings(folder / "pad.jsonl", folder, picture_rows=0)
        found = analyse(models, AnalysisSettings(measure, Resampling(resamples=0)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"images_per_second": found.images_per_second, "peak_bytes": peak}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a number of images; the exit status is 1 if the most images take more memory than the fewest."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000], help="numbers of images, rising")
    parser.add_argument("--alone", action="store_true", help="in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(analyse_images(options.images[0])))
        return 0
    peaks = []
    for images in options.images:
        command = [sys.executable, __file__, "--alone", "--images", str(images)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        peaks.append(found["peak_bytes"])
        print(
            f"{images:,} images: {found['images_per_second']:.1f} a second, peak {peaks[-1] / 1e6:,.0f} MB", flush=True
        )
    growth = peaks[-1] / peaks[0]
    print(
        f"{growth:.3f}x the memory for {options.images[-1] / options.images[0]:g}x the images (target {MOST_GROWTH}x)"
    )
    return int(growth > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
