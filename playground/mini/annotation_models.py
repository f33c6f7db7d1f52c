"""Tiny random models in the place of RAM, Grounding DINO and SAM, in the formats in which the real ones come.

What they find is noise. They are there so that the whole annotation pipeline can run on two CPU cores in seconds: they
have the real architectures, and load through the same code.

    python -m playground.mini.annotation_models --out playground/mini/cache/annotation_models
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import string
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    SamConfig,
    SamImageProcessorPil,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SwinConfig,
)

from patch_aligned.annotate.options import ModelOptions
from patch_aligned.annotate.ram.model import Conversion, PublishedFile, RamConfig, RamModel, save_converted

DEFAULT_OUT = Path(__file__).parent / "cache" / "annotation_models"
_NAMES = Path(__file__).parent / "assets" / "sprite_names.csv"
_BERT_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ",": 1010, ".": 1012, "?": 1029}
_RAM_PX = 96
_SHARE_OF_TAGS = 0.6  # of all tags in all images, above the threshold
_SPREAD_OF_BOX_SCORES = 0.3
_SPREAD_OF_BOXES = 0.15
_SPREAD_OF_SAM3 = 1.5


def write_models(out: Path) -> None:
    """Writes `ram.converted.safetensors`, `ram_tag_list.txt`, `ram_thresholds.txt`, `grounding_dino` and `sam`.

    The same files come out each time.
    """
    out.mkdir(parents=True, exist_ok=True)
    tags = tag_names()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write_ram(out, tags)
        _write_grounding_dino(out / "grounding_dino", tags)
        for part in tiny_sam():
            part.save_pretrained(out / "sam")


def write_sam3(folder: Path) -> None:
    """Writes a tiny SAM 3, which needs torchvision, to a folder."""
    for part in tiny_sam3():
        part.save_pretrained(folder)


def options_of(folder: Path) -> ModelOptions:
    """The options that name the models that `write_models` wrote to a folder, and `write_sam3` to `sam3` below it."""
    return ModelOptions(
        ram=folder / "ram.converted.safetensors",
        ram_tag_list=folder / "ram_tag_list.txt",
        ram_thresholds=folder / "ram_thresholds.txt",
        detector=str(folder / "grounding_dino"),
        sam=str(folder / "sam"),
        sam3=str(folder / "sam3"),
    )


def tag_names() -> list[str]:
    """Names of the sprites of the miniature's simple scenes."""
    with _NAMES.open(encoding="utf-8", newline="") as file:
        return sorted({row["name"] for row in csv.DictReader(file) if row["simple"] == "1"})


def _write_ram(out: Path, tags: list[str]) -> None:
    config = RamConfig(
        kind="ram", image_size=_RAM_PX, window_size=3, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8),
        num_tags=len(tags), label_width=64, hidden_size=64, intermediate_size=128, decoder_layers=2,
    )  # fmt: skip
    model = RamModel(config).eval()
    spread_out(model)
    with torch.no_grad():
        scores = model(_smooth_noise(64), model.tag_queries()).sigmoid()  # [64, tags]
    threshold = scores.quantile(1 - _SHARE_OF_TAGS).item()
    (out / "ram_tag_list.txt").write_text("".join(f"{tag}\n" for tag in tags), encoding="utf-8")
    (out / "ram_thresholds.txt").write_text(f"{threshold:.6f}\n" * len(tags), encoding="utf-8")
    source = PublishedFile(name="random", bytes=0, sha256=hashlib.sha256(b"random").hexdigest())
    conversion = Conversion(config=config, source=source)
    save_converted(model.state_dict(), out / "ram.converted.safetensors", conversion)


def spread_out(model: RamModel) -> None:
    """Gives random weights a scale at which images do not all look alike to them."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)


def vocabulary_of(tags: list[str]) -> dict[str, int]:
    """BERT's vocabulary, as far as Grounding DINO knows it, with the words of tags."""
    vocabulary = dict(_BERT_IDS)
    vocabulary |= {f"[unused{number}]": number for number in range(1030) if number not in _BERT_IDS.values()}
    for word in sorted({word for tag in tags for word in tag.split()}):
        vocabulary[word] = len(vocabulary)
    return vocabulary


def _smooth_noise(count: int) -> Tensor:
    """Pictures of soft blobs, `[count, 3, side, side]`, normalised."""
    return torch.nn.functional.interpolate(torch.randn(count, 3, 4, 4), size=_RAM_PX, mode="bicubic")


def _write_grounding_dino(folder: Path, tags: list[str]) -> None:
    vocabulary = vocabulary_of(tags)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=128, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=7,
            out_features=["stage2", "stage3", "stage4"],  # type: ignore[call-arg]
        ),
        text_config=BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=256,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=30,
    )  # fmt: skip
    detector = GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # as they come, boxes are tiny anchors, and scores are all nearly 0 or nearly 1
        for name, parameter in detector.named_parameters():
            if "bbox_embed" in name:
                parameter.normal_(std=_SPREAD_OF_BOXES)
        detector.model.text_projection.weight.mul_(_SPREAD_OF_BOX_SCORES)
        detector.model.decoder.layer_norm.weight.mul_(_SPREAD_OF_BOX_SCORES)
    detector.save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 160, "longest_edge": 266}).save_pretrained(folder)


def tiny_sam() -> tuple[SamModel, SamImageProcessorPil]:
    """SAM with random weights, and the image processor that belongs to it: pictures are 64 px at their longest edge."""
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
            window_size=4, global_attn_indexes=[1], num_pos_feats=8, mlp_dim=64, initializer_range=0.02,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )  # fmt: skip
    processor = SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    return SamModel(config).eval(), processor


def tiny_sam3(side: int = 56) -> tuple[Sam3Model, Sam3Processor]:
    """SAM 3 with random weights, and its processor, which needs torchvision: pictures are `side` px squares.

    Its tokenizer spells words in letters and digits. Scores go from 0.2 to 0.8, and differ between phrases.
    """
    letters = [letter + end for letter in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    size = {"hidden_size": 16, "num_attention_heads": 2}
    layers = {**size, "intermediate_size": 32, "num_layers": 1, "dropout": 0.0}
    cells = side // 14
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                **size, "model_type": "sam3_vit_model", "intermediate_size": 32, "num_hidden_layers": 2,
                "image_size": side, "pretrain_image_size": side, "window_size": 2, "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 16, "backbone_feature_sizes": [[4 * cells] * 2, [2 * cells] * 2, [cells] * 2],
        },
        text_config={
            **size, "model_type": "clip_text_model", "vocab_size": len(vocabulary), "intermediate_size": 32,
            "projection_dim": 16, "num_hidden_layers": 1, "max_position_embeddings": 32,
            "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1,
        },
        geometry_encoder_config=layers, detr_encoder_config=layers, mask_decoder_config=size,
        detr_decoder_config={**layers, "num_queries": 20},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sam3Model(config)
        for parameter in model.parameters():  # as they come, nothing depends on image or phrase
            if parameter.ndim > 1:
                parameter.data.normal_(std=_SPREAD_OF_SAM3 * parameter[0].numel() ** -0.5)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    return model.eval(), Sam3Processor(Sam3ImageProcessor(size={"height": side, "width": side}), tokenizer)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="Folder to write to.")
    out = parser.parse_args().out
    write_models(out)
    print(f"Written: {out}")


if __name__ == "__main__":
    main()
