"""What happens to data as people really have it: odd training samples, images and annotations, written here.

Recorded is whether a run ends well, how many steps it took, and what it left out; of a message only whether it names
the sample at fault. Some outcomes are known faults of commit 2628157: one that is mended becomes a named difference.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from product import RUN_RECORD, Facts, Product, sha256

Records = list[dict[str, Any]]
BAD, AT = "sample-at-fault", 9


def turns(*texts: tuple[str, str]) -> list[dict[str, str]]:
    """A conversation of (speaker, text)."""
    return [{"from": speaker, "value": text} for speaker, text in texts]


HUMAN, GPT = ("human", "<image>\nWhat is it?"), ("gpt", "A boat.")
CONVERSATIONS: dict[str, Any] = {
    "two questions in a row": turns(HUMAN, ("human", "And this?"), GPT),
    "an answer alone": turns(GPT),
    "an empty answer": turns(HUMAN, ("gpt", "")),
    "no answer": turns(HUMAN),
    "nothing": [],
    "another speaker": turns(("system", "You are a sailor."), HUMAN, GPT),
    "no value": [{"from": "human"}, {"from": "gpt", "value": "A boat."}],
    "a number": turns(HUMAN, ("gpt", 3)),  # type: ignore[arg-type]
    "no picture asked for": turns(("human", "What is it?"), GPT),
    "pictures without end": turns(("human", "<image>" * 80 + "What is it?"), GPT),
    "a separator": turns(HUMAN, ("gpt", "A boat.</s>USER: <s> [/INST] ASSISTANT: no")),
    "odd characters": turns(HUMAN, ("gpt", "\u2028 a\0boat \U0001f6a4 e\u0301")),
}
IMAGES = {"an absolute path": "/etc/hostname", "out of the folder": "../../secret.jpg", "missing": "gone.jpg",
          "a folder": "odd", "a number": 7, "no picture": "odd/text.jpg", "cut off": "odd/cut.jpg",
          "sixteen bits": "odd/sixteen.png", "turned by EXIF": "odd/turned.jpg",
          "a palette": "odd/palette.png"}  # fmt: skip


def record(product: Product) -> Facts:
    """Trainings by sample at fault, then commands by annotation file."""
    scenes = product.work / "scenes"
    shutil.copytree(product.inputs / "mini/train", scenes)
    write_odd_images(scenes)
    sound = [sample for sample in json.loads((scenes / "instruct.json").read_text()) if "image" in sample][:24]
    changes: dict[str, Callable[[Records], None]] = {"control": lambda records: None}
    changes |= {name: _change("conversations", value) for name, value in CONVERSATIONS.items()}
    changes |= {f"image: {name}": _change("image", value) for name, value in IMAGES.items()}
    facts: Facts = {}
    for number, (name, change) in enumerate(changes.items()):
        records: Records = copy.deepcopy(sound)
        records[AT]["id"] = BAD
        change(records)
        facts[name] = {how: _trained(product, scenes, records, number, how) for how in ("fail", "skip")}
    return {"training": facts, "annotations": _annotations(product)}


def _change(key: str, value: Any) -> Callable[[Records], None]:
    return lambda records: records[AT].__setitem__(key, value)


def write_odd_images(scenes: Path) -> None:
    """Files that Pillow reads in its own ways, or not at all."""
    folder = scenes / "odd"
    folder.mkdir()
    picture = Image.open(next((scenes / "images").rglob("*.jpg"))).crop((0, 0, 200, 120))
    (folder / "text.jpg").write_text("no picture")
    picture.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    Image.new("I;16", (64, 48), 40000).save(folder / "sixteen.png")
    picture.quantize(16).save(folder / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=turned)


def _trained(product: Product, scenes: Path, records: Records, number: int, how: str) -> Facts:
    data = product.work / f"case_{number}.json"
    data.write_text(json.dumps(records))
    name = f"case_{number}_{how}"
    sizes = {"MAX_STEPS": "12", "GLOBAL_BATCH_SIZE": "2", "SAVE_STEPS": "1000"}
    places = {"DATA_PATH": str(data), "IMAGE_FOLDER": str(scenes), "MODEL_MAX_LENGTH": "512"}
    flags = ("--on_error", how, "--group_by_modality_length", "False")
    output = product.train("finetune.sh", name, *flags, check=False, **sizes, **places)
    log = (product.work / "log" / f"{name}.txt").read_text()
    ended = (output / "trainer_state.json").exists()
    return {
        "status": int(log.split(maxsplit=3)[2]),
        "named": BAD in log,
        "losses": product.read(output / "trainer_state.json")["log_history"] if ended else None,
        "files": sorted(path.name for path in output.glob("*") if path.name != RUN_RECORD),
        "steps begun": log.count("'grad_norm'"),
    }


def _annotations(product: Product) -> Facts:
    scenes = product.inputs / "mini/heldout"
    records = json.loads((scenes / "pad.json").read_text())
    coco = json.loads((product.inputs / "coco.json").read_text())
    many = copy.deepcopy(records[:2])
    many[0]["labels"] = many[0]["labels"][:1] * 256
    swapped = copy.deepcopy(records[:3])
    swapped[1]["size"] = [swapped[1]["size"][0] + 1, swapped[1]["size"][1]]
    marked = copy.deepcopy(records[:3])
    marked[0]["labels"][0]["tag"] = "<script>alert(1)</script>"
    twice = {**coco, "images": [*coco["images"], {**coco["images"][0], "file_name": coco["images"][1]["file_name"]}]}
    empty = {**coco, "annotations": [{**entry, "segmentation": []} for entry in coco["annotations"]]}
    files = {"256 regions": many, "another size": swapped, "markup": marked, "one record twice": records[:1] * 2,
             "no record": [], "coco, an id twice": twice, "coco, empty polygons": empty}  # fmt: skip
    models = ["--projector", f"aligned={product.inputs / 'projectors/patch_aligned'}", "--random-init", "0",
              "--base", product.inputs / "models/tiny-vicuna", "--image-folder", scenes,
              "--resamples", "0"]  # fmt: skip
    facts: Facts = {}
    for number, (name, value) in enumerate(files.items()):
        path = product.work / f"annotations_{number}.json"
        path.write_text(json.dumps(value))
        output = product.work / f"of_{path.stem}"
        analyzed, _ = product.call("patch-aligned", "analyze", *models, "--data", path, "--output", output)
        done = output / "analysis.json"
        facts[name] = {"analyze": analyzed, "analysis": product.read(done) if done.exists() else None}
        if "coco" not in name:
            facts[name]["verify"], _ = product.call("patch-aligned", "verify", path, "--image-folder", scenes)
            facts[name]["stats"], _ = product.call("patch-aligned", "stats", path, "--no-plots")
            merged = product.work / f"joined_{number}.json"
            facts[name]["join"], _ = product.call(
                "patch-aligned", "join", path, scenes / "train.json", "--output", merged
            )
            facts[name]["joined"] = sha256(merged.read_bytes()) if merged.exists() else None
    return facts
