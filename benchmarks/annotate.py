"""How much faster images are annotated in batches than one at a time, with the same weights on the same machine.

    python -m benchmarks.annotate                                  tiny random models: what the machinery costs
    python -m benchmarks.annotate --models FOLDER --images FOLDER --device cuda      real ones

"One at a time" is the reference recipe: read the image, tag it, read it again, detect, read it again, segment, write,
in float32. "Batched" is `process_shard` as `patch-aligned annotate` runs it. Both use the same model objects. Prints
images a second of both and their ratio, and seconds an image by stage. With tiny models nearly all of that is what
decoding, resizing, NMS, run lengths and writing cost, not the models.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamVisionConfig,
)

from patch_aligned.annotate.fetch import RAM_WEIGHTS, TAG_FILES
from patch_aligned.annotate.folder import RunFolder
from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.manifest import ManifestEntry, list_images
from patch_aligned.annotate.options import CandidateThresholds, Dtype, ModelOptions, Selection, Workload
from patch_aligned.annotate.pipeline import Failure, ImageInWork, StageClock, Stages, StageTimes
from patch_aligned.annotate.ram.model import RamConfig, RamModel
from patch_aligned.annotate.ram.tagger import RamTagger
from patch_aligned.annotate.regions import Candidate, Tag, select
from patch_aligned.annotate.run import process_shard
from patch_aligned.annotate.sam import SamSegmenter
from patch_aligned.annotate.sam3 import Sam3Segmenter
from patch_aligned.annotate.stages import BoxesThenMasks, ModelStages, build_stages
from patch_aligned.annotate.taggers import PhraseTagger
from patch_aligned.images import decode_image
from playground.mini.annotation_models import options_of, spread_out, tiny_sam3, vocabulary_of, write_models
from playground.mini.scene_records import DatasetSettings, write_scene

TINY_BOX_THRESHOLD = 0.98
TAGS_AN_IMAGE, CANDIDATES_AN_IMAGE, REGIONS_AN_IMAGE = 12, 40, 5
LEAST_SCORE = 0.965  # of the candidates of random weights
BUSY_SELECTION = Selection(box_threshold=LEAST_SCORE, text_threshold=LEAST_SCORE)
RAM_PLUS = RamConfig(
    kind="ram_plus", image_size=384, window_size=12, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48),
    num_tags=4585, label_width=512, hidden_size=768, intermediate_size=3072, decoder_layers=2,
)  # fmt: skip
SAM_HUGE = SamVisionConfig(
    hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, global_attn_indexes=[7, 15, 23, 31], mlp_dim=5120
)
SCENE_SIZES = ((448, 336), (336, 448), (500, 336))


def tiny_stages(folder: Path, device: str, dtype: Dtype = "auto") -> ModelStages:
    """Tiny random models, written to `folder`."""
    write_models(folder)
    selection = Selection(box_threshold=TINY_BOX_THRESHOLD)
    return build_stages(replace(options_of(folder), dtype=dtype), selection, device)


def real_stages(folder: Path, device: str, dtype: Dtype = "auto") -> ModelStages:
    """What `patch-aligned models fetch --output FOLDER` downloaded."""
    models = ModelOptions(
        ram=folder / RAM_WEIGHTS["ram"].name,
        ram_tag_list=folder / TAG_FILES[0].name,
        ram_thresholds=folder / TAG_FILES[1].name,
        detector=str(folder / "grounding-dino-tiny"),
        sam=str(folder / "sam-vit-huge"),
        dtype=dtype,
    )
    return build_stages(models, Selection(), device)


def busy_tagger(ram: RamTagger) -> PhraseTagger:
    """RAM with random weights, whose scores mean nothing: an image gets as many tags as real ones find."""

    def tag(items: Sequence[ImageInWork]) -> list[list[Tag] | Failure]:
        scores = ram.scores(ram.preprocess([item.image for item in items]))  # [B, T]
        likeliest = scores.topk(TAGS_AN_IMAGE, dim=1)
        return [
            [Tag(ram.tags[place], score) for place, score in zip(places, values, strict=True)]
            for places, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ]

    return PhraseTagger(ram.settings, tag, ram.tags, "ram")


class BusyBoxes(BoxesThenMasks):
    """The same of Grounding DINO: as many candidates and regions as `regions` says."""

    def __init__(self, detector: GroundingDetector, sam: SamSegmenter, regions: int = REGIONS_AN_IMAGE) -> None:
        super().__init__(detector, sam)
        self.regions = regions

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """The likeliest boxes, of which as many can become regions."""
        found = []
        for item, candidates in zip(items, super().detect(items), strict=True):
            least = Selection(box_threshold=self.candidate_thresholds.box)
            regions = select(candidates, least, item.image.size)[: self.regions]
            found.append(
                [
                    candidate if position in regions else replace(candidate, score=0.0)
                    for position, candidate in enumerate(candidates[: max(CANDIDATES_AN_IMAGE, 4 * self.regions)])
                ]
            )
        return found


def busy_boxes(device: str, names: Sequence[str], dtype: torch.dtype | None = None) -> BusyBoxes:
    """Random Grounding DINO (tiny) and SAM (ViT-H), for tags of these words."""
    torch.manual_seed(0)
    with torch.device(device):
        detector = GroundingDinoForObjectDetection(GroundingDinoConfig())
        with torch.no_grad():  # as they come, boxes are tiny anchors, and scores are all 0 or 1
            for name, parameter in detector.named_parameters():
                if "bbox_embed" in name:
                    parameter.normal_(std=0.85 * GroundingDinoConfig().d_model ** -0.5)
            detector.model.decoder.layer_norm.weight.mul_(0.1)
        sam = SamModel(SamConfig(vision_config=SAM_HUGE))
    tokenizer = BertTokenizer(vocab=vocabulary_of(list(names)))
    kept = CandidateThresholds(LEAST_SCORE, LEAST_SCORE)
    return BusyBoxes(
        GroundingDetector(
            detector, tokenizer, GroundingDinoImageProcessorPil(), device=device, dtype=dtype, candidate_thresholds=kept
        ),
        SamSegmenter(sam, SamImageProcessorPil(), device=device, dtype=dtype),
    )


def tiny_boxes(folder: Path) -> BusyBoxes:
    """Tiny random Grounding DINO and SAM, written to `folder`."""
    write_models(folder)
    kept = CandidateThresholds(TINY_BOX_THRESHOLD, 0.0)
    detector = GroundingDetector.from_pretrained(folder / "grounding_dino", candidate_thresholds=kept)
    return BusyBoxes(detector, SamSegmenter.from_pretrained(folder / "sam"))


def busy_sam3(device: str, is_tiny: bool, names: Sequence[str]) -> Sam3Segmenter:
    """Random SAM 3, tiny or of the published size, which finds about one instance of a phrase."""
    model, processor = tiny_sam3()
    if not is_tiny:
        with torch.device(device):
            model = Sam3Model(Sam3Config())
        processor = Sam3Processor(Sam3ImageProcessor(), processor.tokenizer)
    segmenter = Sam3Segmenter(model, processor, device=device, candidate_thresholds=CandidateThresholds(0, 0))
    found = segmenter.instances(Image.effect_noise((448, 336), 64).convert("RGB"), names[:8])
    assert isinstance(found, list)
    least = found[min(8, len(found) - 1)].score
    segmenter.candidate_thresholds = CandidateThresholds(least, least)
    return segmenter


def given_phrases(segmenter: BusyBoxes | Sam3Segmenter, names: Sequence[str]) -> ModelStages:
    """Stages that look for the same phrases in each image, and find about one region for each."""
    tagger = PhraseTagger({"kind": "given"}, lambda items: [list(map(Tag, names)) for _ in items])
    least = segmenter.candidate_thresholds.box
    if isinstance(segmenter, BusyBoxes):
        segmenter.regions = len(names)
    selection = Selection(box_threshold=least, text_threshold=max(least, 0.2))
    return ModelStages(tagger, segmenter, selection, segment_candidates=isinstance(segmenter, Sam3Segmenter))


def full_size_stages(device: str) -> tuple[ModelStages, ModelStages]:
    """Random RAM++ (Swin-L), Grounding DINO (tiny) and SAM (ViT-H), in float32 and as the pipeline runs them."""
    torch.manual_seed(0)
    names = [f"tag{number}" for number in range(RAM_PLUS.num_tags)]
    with torch.device(device):
        ram = RamModel(RAM_PLUS)
        spread_out(ram)
    exact = busy_boxes(device, names, torch.float32)
    fast = BusyBoxes(
        GroundingDetector(
            exact.detector.model, exact.detector.tokenizer, exact.detector.image_processor, device=device,
            candidate_thresholds=exact.candidate_thresholds,
        ),
        SamSegmenter(exact.sam.model, exact.sam.image_processor, device=device),
    )  # fmt: skip
    # A copy of RAM++ each: the pipeline holds a part of it in half precision.
    rams = [
        RamTagger(copy.deepcopy(ram), names, [0.5] * len(names), device=device, dtype=dtype)
        for dtype in (torch.float32, None)
    ]
    return (
        ModelStages(busy_tagger(rams[0]), exact, BUSY_SELECTION),
        ModelStages(busy_tagger(rams[1]), fast, BUSY_SELECTION),
    )


def write_scenes(folder: Path, count: int) -> None:
    """Pictures of the sizes that LLaVA's pretraining images have most often."""
    for number, size in enumerate(SCENE_SIZES):
        settings = DatasetSettings(count=-(-count // len(SCENE_SIZES)), seed=number, size_wh=size)
        for index in range(settings.count):
            write_scene(settings, index, folder)


def done(result: list[Any] | Failure) -> list[Any]:
    """The result of a stage that did not fail."""
    assert not isinstance(result, Failure), result
    return result


def one_at_a_time(stages: Stages, entries: list[ManifestEntry], folder: Path, output: Path) -> StageTimes:
    """The reference recipe; returns what each stage took. Reading counts for the stage that reads."""
    clock = StageClock()
    with output.open("w") as file:
        for entry in entries:
            path = folder / entry.image_id
            with clock.measure("tag", 1):
                item = ImageInWork(entry.image_id, decode_image(path))
                item.tags = done(stages.tag([item])[0])
            labels: list[dict[str, Any]] = []
            if item.tags:
                with clock.measure("detect", 1):
                    item.image = decode_image(path)
                    item.candidates = done(stages.detect([item])[0])
                    item.to_segment = select(item.candidates, stages.selection, item.image.size)
            if item.to_segment:
                with clock.measure("segment", 1):
                    item.image = decode_image(path)
                    masks = stages.segment([item])[0]
                labels = [
                    item.candidates[position].to_label(position, stages.selection, mask)
                    for position, mask in zip(item.to_segment, masks, strict=True)
                ]
            file.write(json.dumps({"image_id": entry.image_id, "labels": labels}) + "\n")
    return clock.times


def timed_shard(
    stages: Stages, entries: list[ManifestEntry], folder: Path, output: Path, workload: Workload
) -> tuple[float, StageTimes]:
    """Seconds of one shard of all images, and what each stage took."""
    run = RunFolder.start(output, entries, stages.settings, len(entries))
    clock = StageClock()
    begin = time.perf_counter()
    process_shard(run, 0, stages, folder, workload, clock)
    return time.perf_counter() - begin, clock.times


def show(name: str, seconds: float, images: int, times: StageTimes) -> None:
    """One row of the table: milliseconds for each image that a stage took, and what no stage took."""
    cells = [f"{1000 * taken.seconds / taken.images:7.1f}" if taken.images else "      -" for taken in times.values()]
    rest = 1000 * (seconds - sum(taken.seconds for taken in times.values())) / images
    print(f"{name:28}{images / seconds:9.1f}  {'  '.join(cells)}  {rest:7.1f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="Folder of real models. Default: tiny random ones.")
    parser.add_argument("--images", type=Path, help="Folder of images. Default: scenes of the miniature.")
    parser.add_argument("--limit", type=int, default=120, help="Images.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.images is None:
            write_scenes(folder / "scenes", arguments.limit)
        build = partial(real_stages, arguments.models) if arguments.models else partial(tiny_stages, folder / "models")
        entries, images = list_images(arguments.images or folder / "scenes")
        entries = entries[: arguments.limit]
        # The recipe computes in float32; the pipeline in bfloat16 where there is a GPU. The weights are the same.
        single = build(arguments.device, "float32")
        batched = build(arguments.device) if arguments.device != "cpu" else single
        workload = Workload(chunk=64)
        one_at_a_time(single, entries[:8], images, folder / "warm.jsonl")
        timed_shard(batched, entries[:16], images, folder / "warm", workload)

        begin = time.perf_counter()
        single_times = one_at_a_time(single, entries, images, folder / "single.jsonl")
        single_seconds = time.perf_counter() - begin
        one_chunk_seconds, one_chunk_times = timed_shard(
            batched, entries, images, folder / "one", replace(workload, chunks_at_once=1)
        )
        batched_seconds, _ = timed_shard(batched, entries, images, folder / "two", workload)

    print(f"batched over one at a time, images/s: {single_seconds / batched_seconds:.2f}")
    print(f"{len(entries)} images on {arguments.device}, {torch.get_num_threads()} threads")
    print(
        f"{'':28}{'images/s':>9}  {'decode':>7}  {'tag':>7}  {'detect':>7}  {'segment':>7}  {'rest':>7}   (ms an image)"
    )
    show("one at a time", single_seconds, len(entries), single_times)
    show("batched, a chunk at a time", one_chunk_seconds, len(entries), one_chunk_times)
    print(f"{'batched, two chunks at once':28}{len(entries) / batched_seconds:9.1f}")


if __name__ == "__main__":
    main()
