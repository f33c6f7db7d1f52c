"""Says where the training data of LLaVA-1.5 belongs, how much of it is there, and what to run for the rest.

Exit status 0 if everything is there, 1 otherwise. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


@dataclass(frozen=True)
class Part:
    """One thing that must be there: a JSON file of records, or a folder of images (`images_of` names its JSON file)."""

    path: str
    expected: int
    next_command: str
    images_of: str | None = None


_PRETRAIN = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
_MIXTURE = "llava_v1_5_mix665k.json"


def _from_hub(repository: str, files: str, folder: str) -> str:
    return f"hf download --repo-type dataset {repository} {files} --local-dir {folder}"


def _from_zip(url: str, folder: str) -> str:
    archive = f"{folder}/{url.rsplit('/', 1)[-1]}"
    return f"wget -c -P {folder} {url} && unzip -nq {archive} -d {folder}"


_COCO = _from_zip("http://images.cocodataset.org/zips/train2017.zip", "DATA/coco")
_GQA = _from_zip("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "DATA/gqa")
_TEXTVQA = _from_zip("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "DATA/textvqa")
_VG_1 = _from_zip("https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip", "DATA/vg")
_VG_2 = _from_zip("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip", "DATA/vg")

STAGES: dict[str, list[Part]] = {
    "Stage 1: captions (558K)": [
        Part(
            _PRETRAIN,
            558_128,
            _from_hub("liuhaotian/LLaVA-Pretrain", "blip_laion_cc_sbu_558k.json images.zip", "DATA/LLaVA-Pretrain"),
        ),
        Part(
            "LLaVA-Pretrain/images",
            558_128,
            "unzip -nq DATA/LLaVA-Pretrain/images.zip -d DATA/LLaVA-Pretrain/images",
            _PRETRAIN,
        ),
    ],
    "Stage 1: regions (PAD)": [
        Part("PAD/pad_558k.jsonl", 558_128, "DATA=DATA bash scripts/annotate_pad.sh"),
    ],
    "Stage 2: instructions (665K)": [
        Part(_MIXTURE, 665_298, _from_hub("liuhaotian/LLaVA-Instruct-150K", _MIXTURE, "DATA")),
        Part("coco/train2017", 118_287, _COCO, _MIXTURE),
        Part("gqa/images", 148_854, _GQA, _MIXTURE),
        Part("ocr_vqa/images", 207_572, "# save https://ocr-vqa.github.io as .jpg in DATA/ocr_vqa/images", _MIXTURE),
        Part("textvqa/train_images", 25_119, _TEXTVQA, _MIXTURE),
        Part("vg/VG_100K", 64_346, _VG_1, _MIXTURE),
        Part("vg/VG_100K_2", 43_903, _VG_2, _MIXTURE),
    ],
}


def iterate_images(folder: Path) -> Iterator[str]:
    """Paths of the images below `folder`, relative to it, with forward slashes."""
    for where, _, names in os.walk(folder):
        inside = Path(where).relative_to(folder).as_posix()
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield name if inside == "." else f"{inside}/{name}"


def read_records(path: Path) -> list[dict]:
    """Records of a JSON array, or of a file with one JSON object a line (`.jsonl`)."""
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        return json.load(file)


def named_images(records: Iterable[dict], folder: str, image_root: str) -> set[str]:
    """Images that the records name inside `folder`; records count their images from `image_root`."""
    prefix = "" if folder == image_root else f"{folder}/"
    paths = (record["image"] for record in records if "image" in record)
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


def count_part(data: Path, part: Part, records_of: dict[str, list[dict]]) -> tuple[int | None, list[str]]:
    """How many records or images of `part` are there (`None`: no such file or folder), and which named ones are not.

    Args:
        data: data root.
        part: what to look for.
        records_of: records of the JSON files seen so far; a JSON file adds its own.
    """
    path = data / part.path
    if not path.exists():
        return None, []
    if part.images_of is None:
        records_of[part.path] = read_records(path)
        return len(records_of[part.path]), []
    there = set(iterate_images(path))
    image_root = part.path if part.images_of == _PRETRAIN else "."
    named = named_images(records_of.get(part.images_of, []), part.path, image_root)
    return len(there), sorted(named - there)


def check(data: Path) -> tuple[list[str], list[str]]:
    """Compares the folder `data` with what training reads.

    Returns:
        The lines of the report, and the commands that would fill the gaps.
    """
    lines = [f"Data root: {data}"]
    next_commands: list[str] = []
    records_of: dict[str, list[dict]] = {}
    for title, parts in STAGES.items():
        lines += ["", f"{title:<50}{'expected':>10}{'found':>10}"]
        for part in parts:
            found, absent = count_part(data, part, records_of)
            lines.append(f"  {part.path:<48}{part.expected:>10,}{'missing' if found is None else f'{found:,}':>10}")
            if absent:
                lines.append(f"    {len(absent):,} images named by {part.images_of} are absent, such as {absent[0]}")
            # A folder may hold more or fewer images than its source, as long as it has all that the records name.
            complete = found is not None and not absent and (part.images_of in records_of or found >= part.expected)
            if not complete:
                next_commands.append(re.sub(r"\bDATA\b(?!=)", lambda _: str(data), part.next_command))
    return lines, next_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("playground/data"), help="data root (default: %(default)s)")
    lines, next_commands = check(parser.parse_args(argv).data)
    print("\n".join(lines))
    if not next_commands:
        print("\nEverything is there.")
        return 0
    print(f"\n{len(next_commands)} parts are missing or incomplete. Next:")
    print("\n".join(f"  {command}" for command in next_commands))
    return 1


if __name__ == "__main__":
    sys.exit(main())
