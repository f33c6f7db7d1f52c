"""What `scripts/chaos.sh` runs: jobs that are stopped at random moments, and what became of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from tqdm import tqdm

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "llava"
TRAIN = (
    "llava.train.train --bf16 False --use_cpu True --report_to none --logging_steps 1 --disable_tqdm True "
    "--model_name_or_path tiny-vicuna --vision_tower tiny-clip --mm_projector_type mlp2x_gelu --version plain "
    "--mm_vision_select_layer -2 --mm_use_im_patch_token False --data_path data_plain.json --image_folder images "
    "--tune_mm_mlp_adapter True --per_device_train_batch_size 1 --max_steps 60 --learning_rate 1e-3 "
    "--save_strategy steps --save_steps 2 --save_total_limit 2 --output_dir"
)
ANNOTATE = (
    "patch_aligned.cli annotate --images pictures --ram models/ram.converted.safetensors --device cpu "
    "--ram_tag_list models/ram_tag_list.txt --ram_thresholds models/ram_thresholds.txt --box_threshold 0.98 "
    "--detector models/grounding_dino --sam models/sam --shard_size 2 --decode_workers 2 --output"
)
ANSWER = (
    "llava.eval.model_vqa_loader --model-path tiny-llava --question-file questions.jsonl --image-folder images "
    "--temperature 0 --max_new_tokens 16 --device cpu --batch-size 2 --workers 1 --answers-file"
)
PICTURES, QUESTIONS = 60, 300


def losses(folder: Path) -> str:
    """What a training logged, without times and without the mean since it was last resumed."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return json.dumps([entry for entry in history if "train_runtime" not in entry])


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of files by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob(pattern))}


KILL, WRITING, TERM, FULL = "SIGKILL", "SIGKILL while it writes", "SIGTERM", "full disk"
EQUAL, ENDED, NO_MOUNT, DIFFERENT = "resumed, equal", "had ended before, equal", "left out: no mount", "different"


@dataclass(frozen=True)
class Job:
    """A command that resumes.

    Attributes:
        name: as the table shows it.
        command: module and flags; the output follows.
        output: what the command is given below its folder.
        working: what its log says once it is at work.
        writing: matches what is there only while it writes; None where it appends to one file.
        result: what must not depend on how often it was stopped.
    """

    name: str
    command: str
    output: str
    working: str
    writing: str | None
    result: Callable[[Path], object]

    @property
    def ways(self) -> list[str]:
        """How it is stopped, in turn."""
        return [KILL, WRITING, TERM, FULL] if self.writing else [KILL, TERM, FULL]

    def start(self, folder: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start it, or resume it."""
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", *self.command.split(), str(folder / self.output)]
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, cwd=folder.parents[1])


JOBS = (
    Job("training", TRAIN, "", r"step +\d", ".unfinished/*/*", lambda f: (losses(f), hashes(f, "mm_projector.bin"))),
    Job("annotation", ANNOTATE, "", r"[1-9]\d*/\d+", "shards/.*.tmp", lambda f: hashes(f, "shards/*.gz")),
    Job("evaluation", ANSWER, "answers.jsonl", r"[1-9]\d*/\d+", None, lambda f: hashes(f, "answers.jsonl")),
)


def prepare(work: Path) -> None:
    """Write what the jobs read."""
    for name in ("tiny-clip", "tiny-vicuna", "tiny-llava", "images"):
        shutil.copytree(GOLDENS / name, work / name, dirs_exist_ok=True)
    shutil.copy(GOLDENS / "data_plain.json", work)
    (work / "pictures").mkdir(exist_ok=True)
    images = sorted((work / "images").iterdir())
    for number in range(PICTURES):
        shutil.copy(images[number % len(images)], work / "pictures" / f"{number}.png")
    asked = [
        {"question_id": number, "image": images[number % len(images)].name, "text": f"What is this, number {number}?"}
        for number in range(QUESTIONS)
    ]
    (work / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in asked))
    models = [sys.executable, "-m", "playground.mini.annotation_models", "--out", str(work / "models")]
    subprocess.run(models, check=True, capture_output=True)


def wait_until_working(job: Job, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once a job does what it is for, or has ended."""
    while process.poll() is None and not re.search(job.working, log.read_text(errors="replace")):
        time.sleep(0.02)


def stop(job: Job, how: str, process: subprocess.Popen[bytes], folder: Path, log: Path, seconds: float) -> bool:
    """Stop a job after so many seconds of work, or at the next write after them; whether it had not ended before."""
    wait_until_working(job, process, log)
    time.sleep(seconds)
    while how == WRITING and job.writing and process.poll() is None and not any(folder.glob(job.writing)):
        time.sleep(0)  # a write takes a millisecond
    process.send_signal(signal.SIGTERM if how == TERM else signal.SIGKILL)
    status = process.wait(timeout=120)
    return status in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)


def mount(folder: Path, size_kib: int, again: bool = False) -> bool:
    """Make a folder a disk of a size, or let that disk grow; whether that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"{'remount,' if again else ''}size={size_kib}k"
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode


def finish(job: Job, folder: Path, log: Path) -> object:
    """Run a job to its end and return its result, or what its log says last."""
    if job.start(folder, log).wait(timeout=600):
        return " ".join(log.read_text(errors="replace").split()[-30:])
    return job.result(folder)


def reference(job: Job, work: Path) -> tuple[object, float, int]:
    """Run a job that nothing stops: its result, seconds of work, and KiB on the disk."""
    log, folder = work / f"{job.name}.log", work / job.name / "whole"
    process = job.start(folder, log)
    wait_until_working(job, process, log)
    began = time.monotonic()
    if process.wait(timeout=600):
        raise SystemExit(f"{job.name} does not run: {log.read_text(errors='replace')[-2000:]}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return job.result(folder), time.monotonic() - began, size // 1024


def stop_and_resume(job: Job, how: str, number: int, args: argparse.Namespace, whole: tuple[object, float, int]) -> str:
    """Stop a job and resume it; what became of it, in a word."""
    expected, seconds, size_kib = whole
    draw = random.Random(f"{args.seed} {job.name} {number}")
    folder, log = args.work / job.name / str(number), args.work / f"{job.name}-{number}.log"
    if how == FULL and not mount(folder, round(size_kib * draw.uniform(0.2, 0.9))):
        return NO_MOUNT
    try:
        process = job.start(folder, log)
        if how == FULL:
            was_stopped = process.wait(timeout=600) != 0
            mount(folder, 16 * size_kib + 4096, again=True)
        else:
            was_stopped = stop(job, how, process, folder, log, draw.uniform(0, 0.8 * seconds))
        found = finish(job, folder, log)
    finally:
        if how == FULL:
            subprocess.run(["umount", folder], check=True)
    if found != expected:
        tqdm.write(f"{job.name}, {how}, round {number}: found {found}, expected {expected}")
        return DIFFERENT
    shutil.rmtree(folder)
    return EQUAL if was_stopped else ENDED


def main() -> None:
    """Print the table; exit with 1 where something differs."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    prepare(args.work)
    wholes = {job: reference(job, args.work) for job in JOBS}
    rounds = [(job, how, number) for job in JOBS for number, how in zip(range(args.rounds), cycle(job.ways))]
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(stop_and_resume, job, how, number, args, wholes[job]) for job, how, number in rounds]
        for _ in tqdm(as_completed(begun), total=len(begun), unit="round"):
            pass
    became: dict[tuple[str, str], Counter[str]] = {}
    for (job, how, _), future in zip(rounds, begun, strict=True):
        became.setdefault((job.name, how), Counter())[future.result()] += 1
    columns = (EQUAL, ENDED, NO_MOUNT, DIFFERENT)
    print(f"| job | stopped by | {' | '.join(columns)} |\n|---|---|{'--:|' * len(columns)}")
    for (name, how), counts in became.items():
        print(f"| {name} | {how} | {' | '.join(str(counts[column]) for column in columns)} |")
    sys.exit(any(counts[DIFFERENT] for counts in became.values()))


if __name__ == "__main__":
    main()
