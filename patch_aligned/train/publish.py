"""The model card of a stage 1, and the upload of its projector to the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

PROJECTOR_FILES = ("mm_projector.bin", "projector.safetensors")
"""Weights of LLaVA's stage 1, and of `patch-aligned train`, which writes a card itself."""
_SHOWN = ("model_name_or_path", "vision_tower", "mm_projector_type", "mm_vision_select_layer", "data_path",
          "patch_data_path", "patch_beta_start", "patch_beta_end", "patch_warmup_steps", "learning_rate",
          "global_batch_size", "num_train_epochs", "max_steps", "seed")  # fmt: skip


def publish_projector(run: Path, record: Mapping[str, Any], repo: str | None) -> list[Path]:
    """Write a card into a run of stage 1 that has none; upload and return it, projector and config, but no run.json.

    `record` is the run's run.json. `repo` is `USER/NAME`; None uploads nothing.
    """
    files = [run / name for name in PROJECTOR_FILES if (run / name).is_file()]
    if not (record and files):
        raise FileNotFoundError(f"{run}: found no run.json with a projector; expected the --output_dir of a stage 1")
    files += [run / "README.md", run / "config.json"]
    if not (run / "README.md").exists():
        given = {name: record["flags"][name] for name in _SHOWN if name in record["flags"]}
        flags = {name: Path(str(value)).name if Path(str(value)).exists() else value for name, value in given.items()}
        base, log = flags["model_name_or_path"], json.loads((run / "trainer_state.json").read_text())["log_history"]
        arm = "captions and the patch loss" if "patch_beta_end" in flags else "captions"
        load = f"--model-path {repo or 'USER/NAME'} --model-base {base} --image-file FILE --query ''"
        text = f"LLaVA's projector after stage 1 by {arm}\n\n    python -m llava.eval.run_llava {load}"
        stage_1_card(base, text, flags, record, log).save(run / "README.md")
    if repo is not None:
        HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=run, allow_patterns=[file.name for file in files])
    return files


def stage_1_card(
    base: str, text: str, flags: Mapping[str, Any], record: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> ModelCard:
    """Return a card whose `text` begins with its title, with flags, the last losses of the log, and versions."""
    data = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="image-text-to-text")
    tables = {
        "Flags (all of them: `run.json`)": flags,
        "Last line of the log": next((line for line in reversed(log) if "loss" in line), {}),
        "Versions": record["sittings"][-1]["versions"],
    }
    text = f"# {text}\n"
    for title, rows in tables.items():
        text += f"\n## {title}\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {rows[name]} |\n" for name in rows)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
