"""Tiny random models of every family with their real processors. A family is an entry of `FAMILIES`.

    python tests/patch_aligned/models/families.py [--write docs/vlm.md]

checks all of them against the transformers that is installed, and prints the table of families.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.utils import logging

from patch_aligned.models.impulse import impulse_test
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.tiny import tiny_copy

SIZES = [(300, 200), (201, 333), (640, 480), (97, 60)]  # landscape, portrait, the usual, tiny

ATTRIBUTES = """
    image_token video_token boi_token eoi_token boa_token eoa_token audio_token img_line_break_token start_image_token
    end_image_token context_image_token image_start_token image_end_token video_start_token video_end_token
    slice_start_token slice_end_token image_id_start_token image_id_end_token image_break_token vision_start_token
    vision_end_token
"""
SPELLED = """
    <image> <IMG_START> <IMG_ATOM> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END> <|IMG_PATCH|> <|patch|> <|image|>
    <|image_start|> <|image_end|> <|tile_x_separator|> <|tile_y_separator|> <im_patch> <im_col> <im_start> <im_end>
    <low_res_im_start> [IMG] [IMG_BREAK] [IMG_END] <|START_OF_IMG|> <|END_OF_IMG|> <fake> <global-img>
"""
IMAGE = "<image_token>"
VOCABULARY = 256


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One tokenizer that knows the special tokens of all families."""
    specials = [f"<{name}>" for name in ATTRIBUTES.split()] + SPELLED.split()
    words = ["<pad>", "<unk>", "<s>", "</s>", *specials, "what", "is", "a", "cat"]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={name: f"<{name}>" for name in ATTRIBUTES.split()},
    )
    made.add_special_tokens({"additional_special_tokens": SPELLED.split()})
    return made


@dataclass(frozen=True)
class Family:
    """A family of models, or a way of its processor.

    Attributes:
        model_type: of the config.
        images: class of the image processor, without suffix.
        processor: class of the processor.
        settings: of the image processor.
        options: of the processor.
        config: settings of the config.
        parts: arguments that the config is made with.
        vision, text: settings of its parts.
        overrides: of the processor's own settings for images.
        token: the token that stands for a visual token.
        cell: side of a token's cell in pixels of the model.
        blur: pixels of the model by which a resize filter, or interpolation of tokens, spreads a change.
        since: the oldest release of transformers that it was checked with.
    """

    model_type: str
    images: str
    processor: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    token: str = IMAGE
    cell: int = 28
    blur: float = 3
    since: str = "5.17"

    @property
    def is_installed(self) -> bool:
        """Whether the installed release of transformers has the family."""
        return Version(transformers.__version__) >= Version(self.since)

    def image_processor(self, suffix: str = "") -> Any:
        """Make the image processor, on torchvision or, with the suffix `Pil`, on PIL."""
        return getattr(transformers, self.images + suffix)(**self.settings)

    def make_processor(self, image_processor: Any = None) -> Any:
        made = getattr(transformers, self.processor)
        parts = {"image_processor": image_processor or self.image_processor(), "tokenizer": copy.deepcopy(tokenizer())}
        if "video_processor" in made.get_attributes():
            name = self.images.replace("ImageProcessor", "VideoProcessor").replace("GotOcr2", "InternVL")
            parts["video_processor"] = getattr(transformers, name)()
        if "feature_extractor" in made.get_attributes():
            parts["feature_extractor"] = getattr(transformers, f"{self.processor[:-9]}AudioFeatureExtractor")()
        if self.model_type == "smolvlm":  # it asks for a package that only videos need
            vars(importlib.import_module(made.__module__)).update(num2words=str)
        processor = made(**parts, **self.options)
        if self.overrides:
            processor.images_kwargs = made.images_kwargs | self.overrides
        return processor

    def make_config(self) -> Any:
        known = CONFIG_MAPPING[self.model_type]
        made = known(**self.parts)
        token = tokenizer().convert_tokens_to_ids(self.token)
        for part, values in ((made.get_text_config(), {"vocab_size": VOCABULARY, "pad_token_id": 0, **self.text}),
                             (made.vision_config, self.vision), (made, self.config)):  # fmt: skip
            for name, value in values.items():
                setattr(part, name, value)
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            if hasattr(made, name):
                setattr(made, name, token)
        return made


def squeezed(model_type: str, images: str, processor: str, **more: Any) -> Family:
    settings = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 100}}
    return Family(model_type, images, processor, **{"settings": settings} | more)


MROPE = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [22, 22, 20]}}
SQUARE = {"height": 112, "width": 112}
PIN = [[112, 112], [112, 224], [224, 112], [224, 224]]
RIM = [[117, 234], [234, 117], [234, 234]]
SIGLIP = {"image_size": 112, "patch_size": 14}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
CROP = {"size": {"shortest_edge": 112}, "crop_size": SQUARE}

# fmt: off
FAMILIES: dict[str, Family] = {
    family.model_type if name is None else name: family
    for name, family in [
        (None, squeezed("qwen2_vl", "Qwen2VLImageProcessor", "Qwen2VLProcessor", text=MROPE)),
        (None, squeezed("qwen2_5_vl", "Qwen2VLImageProcessor", "Qwen2_5_VLProcessor", text=MROPE)),
        *(
            (None, squeezed(model_type, "Qwen2VLImageProcessor", "Qwen3VLProcessor", cell=32,
                    settings={"size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 80}, "patch_size": 16}))
            for model_type in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
        ),
        (None, squeezed("glm4v", "Glm4vImageProcessor", "Glm4vProcessor", text=MROPE,
                settings={"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 200}})),
        (None, Family("kimi_k25", "Kimi_K25ImageProcessor", "Kimi_K25Processor",
                settings={"size": {"max_height": 16, "max_width": 16}, "max_patches": 256})),
        (None, squeezed("video_llama_3", "VideoLlama3ImageProcessor", "VideoLlama3Processor", vision={"patch_size": 14},
                settings={"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 100}, "merge_size": 2})),
        (None, squeezed("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessor", "Ernie4_5_VLMoeProcessor", text=MROPE)),
        (None, squeezed("paddleocr_vl", "PaddleOCRVLImageProcessor", "PaddleOCRVLProcessor", text=MROPE)),
        (None, Family("internvl", "GotOcr2ImageProcessor", "InternVLProcessor", {"size": SQUARE, "max_patches": 6},
                {"image_seq_length": 16}, {"image_seq_length": 16}, vision={"image_size": (112, 112)},
                token="<context_image_token>")),
        (None, Family("aya_vision", "GotOcr2ImageProcessor", "AyaVisionProcessor", {"size": SQUARE, "max_patches": 6},
                {"img_size": 112}, vision=SIGLIP, token="<|IMG_PATCH|>")),
        (None, Family("cohere2_vision", "Cohere2VisionImageProcessor", "Cohere2VisionProcessor",
                {"size": SQUARE, "max_patches": 6, "patch_size": 4}, vision=SIGLIP)),
        (None, Family("ovis2", "Ovis2ImageProcessor", "Ovis2Processor",
                {"size": SQUARE, "max_patches": 6, "crop_to_patches": True}, {"image_seq_length": 16},
                vision=SIGLIP | {"hidden_stride": 2, "vocab_size": 64}, token="<IMG_ATOM>")),
        *(
            (None, Family(model_type, f"{name}ImageProcessor", f"{name}Processor",
                    {"size": {"longest_edge": 336}, "max_image_size": {"longest_edge": 112}}, {"image_seq_len": 16},
                    vision=SIGLIP, token=token, blur=9))  # Lanczos, three times
            for model_type, name, token in (("idefics3", "Idefics3", "<image>"), ("smolvlm", "SmolVLM", IMAGE))
        ),
        (None, Family("llama4", "Llama4ImageProcessor", "Llama4Processor", {"size": SQUARE, "max_patches": 6},
                vision=SIGLIP, token="<|patch|>", since="5.23")),
        (None, Family("lfm2_vl", "Lfm2VlImageProcessor", "Lfm2VlProcessor",
                {"tile_size": 128, "max_tiles": 6, "min_image_tokens": 9, "max_image_tokens": 36}, cell=32)),
        (None, Family("minicpmv4_6", "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6Processor",
                {"scale_resolution": 168, "max_slice_nums": 4}, vision={"image_size": 168, "patch_size": 14},
                cell=56, since="5.23")),
        (None, Family("gemma3", "Gemma3ImageProcessor", "Gemma3Processor", {"size": SQUARE}, {"image_seq_length": 16},
                {"mm_tokens_per_image": 16}, vision=SIGLIP)),
        (None, Family("gemma4", "Gemma4ImageProcessor", "Gemma4Processor", {"max_soft_tokens": 70},
                parts={"vision_config": {"model_type": "gemma4_vision"}}, cell=48)),
        (None, Family("gemma4_unified", "Gemma4UnifiedImageProcessor", "Gemma4UnifiedProcessor",
                {"max_soft_tokens": 70}, parts={"vision_config": {"model_type": "gemma4_unified_vision"}}, cell=48)),
        (None, Family("paligemma", "SiglipImageProcessor", "PaliGemmaProcessor",
                {"size": SQUARE, "image_seq_length": 64}, vision=SIGLIP,
                cell=14)),
        (None, Family("mistral3", "PixtralImageProcessor", "PixtralProcessor", {"size": {"longest_edge": 280}},
                {"patch_size": 14, "spatial_merge_size": 2}, token="[IMG]")),
        (None, Family("lighton_ocr", "PixtralImageProcessor", "LightOnOcrProcessor",
                {"size": {"longest_edge": 280}, "patch_size": {"height": 28, "width": 28}})),
        ("pixtral", Family("llava", "PixtralImageProcessor", "PixtralProcessor", {"size": {"longest_edge": 128}},
                config={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
                parts={"vision_config": {"model_type": "pixtral", "patch_size": 16}}, token="[IMG]", cell=16)),
        (None, Family("llava", "CLIPImageProcessor", "LlavaProcessor", CROP, LLAVA, vision=SIGLIP, cell=14)),
        (None, Family("llava_next", "LlavaNextImageProcessor", "LlavaNextProcessor",
                CROP | {"image_grid_pinpoints": PIN}, LLAVA, {"image_grid_pinpoints": PIN}, vision=SIGLIP, cell=14)),
        (None, Family("llava_onevision", "LlavaOnevisionImageProcessor", "LlavaOnevisionProcessor",
                {"size": SQUARE, "image_grid_pinpoints": PIN},
                {"num_image_tokens": 64, "vision_feature_select_strategy": "full"},
                {"image_grid_pinpoints": PIN}, vision=SIGLIP, cell=14)),
        (None, Family("molmo2", "Molmo2ImageProcessor", "Molmo2Processor",
                {"size": {"height": 126, "width": 126}, "max_crops": 4, "overlap_margins": [1, 1]},
                vision={"image_size": [126, 126], "num_position_embeddings": 81}, token="<im_patch>", since="5.23")),
        (None, Family("deepseek_vl", "DeepseekVLImageProcessor", "DeepseekVLProcessor", {"size": SQUARE},
                {"num_image_tokens": 64}, vision=SIGLIP, cell=14)),
        # Other ways of the same processors.
        ("internvl, no tiles", Family("internvl", "GotOcr2ImageProcessor", "InternVLProcessor", {"size": SQUARE},
                {"image_seq_length": 16}, {"image_seq_length": 16}, vision={"image_size": (112, 112)},
                overrides={"crop_to_patches": False}, since="5.23", token="<context_image_token>")),
        ("idefics3, no tiles", Family("idefics3", "Idefics3ImageProcessor", "Idefics3Processor",
                {"size": {"longest_edge": 336}, "max_image_size": {"longest_edge": 112}, "do_image_splitting": False},
                {"image_seq_len": 16}, vision=SIGLIP, token="<image>", blur=9)),
        ("ovis2, by aspect ratio", Family("ovis2", "Ovis2ImageProcessor", "Ovis2Processor",
                {"size": SQUARE, "max_patches": 6, "crop_to_patches": True, "use_covering_area_grid": False},
                {"image_seq_length": 16}, vision=SIGLIP | {"hidden_stride": 2, "vocab_size": 64}, token="<IMG_ATOM>")),
        ("llama4, largest canvas", Family("llama4", "Llama4ImageProcessor", "Llama4Processor",
                {"size": SQUARE, "max_patches": 6, "resize_to_max_canvas": True}, vision=SIGLIP, token="<|patch|>",
                since="5.23")),
        ("minicpmv4_6, 4x", Family("minicpmv4_6", "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6Processor",
                {"scale_resolution": 168, "max_slice_nums": 4, "downsample_mode": "4x"},
                config={"downsample_mode": "4x"}, vision={"image_size": 168, "patch_size": 14}, since="5.23")),
        ("gemma3, pan and scan", Family("gemma3", "Gemma3ImageProcessor", "Gemma3Processor", {"size": SQUARE},
                {"image_seq_length": 16}, {"mm_tokens_per_image": 16}, vision=SIGLIP,
                overrides={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 32}, since="5.23")),
        ("llava, padded", Family("llava", "LlavaImageProcessor", "LlavaProcessor", CROP | {"do_pad": True}, LLAVA,
                vision=SIGLIP, cell=14)),
        ("llava, SigLIP", Family("llava", "SiglipImageProcessor", "LlavaProcessor",
                {"size": {"height": 124, "width": 124}}, {"patch_size": 14, "vision_feature_select_strategy": "full"},
                {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, cell=14,
                parts={"vision_config": {"model_type": "siglip_vision_model"}},
                vision={"image_size": 124, "patch_size": 14})),
        ("llava, with CLS", Family("llava", "CLIPImageProcessor", "LlavaProcessor", CROP,
                LLAVA | {"vision_feature_select_strategy": "full"}, {"vision_feature_select_strategy": "full"},
                vision=SIGLIP, cell=14)),
        ("llava_onevision, interpolated", Family("llava_onevision", "LlavaOnevisionImageProcessor",
                "LlavaOnevisionProcessor", {"size": SQUARE, "image_grid_pinpoints": PIN},
                {"num_image_tokens": 64, "vision_feature_select_strategy": "full",
                 "vision_aspect_ratio": "anyres_max_2"},
                {"image_grid_pinpoints": PIN, "vision_aspect_ratio": "anyres_max_2"}, vision=SIGLIP, cell=14, blur=15)),
        ("llava_onevision, patches leave a rim", Family("llava_onevision", "LlavaOnevisionImageProcessor",
                "LlavaOnevisionProcessor", {"size": {"height": 117, "width": 117}, "image_grid_pinpoints": RIM},
                {"num_image_tokens": 64, "vision_feature_select_strategy": "full"}, {"image_grid_pinpoints": RIM},
                vision={"image_size": 117, "patch_size": 14}, cell=14)),
    ]
}


# Settings of checkpoints, or the defaults of the class where nothing public states them. The grids of an image of 640 x
# 480 and of 1280 x 960 pixels, rows x columns, in the order of the tokens.
DEFAULTS = "class defaults"
TRANSFORMERS = "transformers, src/transformers/models"
PUBLISHED: list[tuple[str, dict[str, Any], str, tuple[str, str]]] = [
    ("qwen2_5_vl", {"settings": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}},
     "Qwen/Qwen2.5-VL-7B-Instruct, preprocessor_config.json", ("17x23", "34x46")),
    ("internvl", {"settings": {"size": {"height": 448, "width": 448}}, "options": {}},
     f"{TRANSFORMERS}/internvl/convert_internvl_weights_to_hf.py", ("48x64, 16x16", "48x64, 16x16")),
    ("smolvlm", {"settings": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
                 "options": {"image_seq_len": 64}},
     "HuggingFaceTB/SmolVLM-256M-Instruct, preprocessor_config.json", ("24x32, 8x8", "24x32, 8x8")),
    ("gemma3", {"settings": {"size": {"height": 896, "width": 896}}, "options": {}},
     f"{TRANSFORMERS}/gemma3/convert_gemma3_weights.py", ("16x16", "16x16")),
    ("qwen3_vl", {"settings": {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}},
     DEFAULTS, ("15x20", "30x40")),
    ("glm4v", {"settings": {}}, DEFAULTS, ("17x23", "34x46")),
    ("kimi_k25", {"settings": {}}, DEFAULTS, ("18x23", "35x46")),
    ("gemma4", {"settings": {}}, DEFAULTS, ("14x19", "14x19")),
    ("mistral3", {"settings": {"size": {"longest_edge": 1540}}}, DEFAULTS, ("18x23", "35x46")),
    ("pixtral", {"settings": {}}, DEFAULTS, ("30x40", "48x64")),
    ("lfm2_vl", {"settings": {}}, DEFAULTS, ("13x18", "32x48, 13x18")),
    ("molmo2", {"settings": {}}, DEFAULTS, ("14x14, 23x23", "14x14, 23x33")),
    ("llava", {"settings": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}},
     "its tower, openai/clip-vit-large-patch14-336", ("24x24", "24x24")),
    ("llava_next", {"settings": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}},
     "its tower, openai/clip-vit-large-patch14-336", ("24x24, 36x48", "24x24, 36x48")),
    ("deepseek_vl", {"settings": {}, "options": {}}, DEFAULTS, ("24x24", "24x24")),
]
# fmt: on


def save_tiny(name: str, folder: Path) -> Any:
    """Save a tiny model of a family with its processor, and return the model. Its table has a row for every token."""
    family = replace(FAMILIES[name], text=FAMILIES[name].text | {"vocab_size": 1300})  # PaliGemma adds 1,152 tokens
    model, processor = tiny_copy(family.make_config()), family.make_processor()
    if name == "ernie4_5_vl_moe":  # it would save a font with its processor
        processor.video_processor.draw_on_frames = False
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def checked(family: Family) -> str:
    """Whether every visual token looks where the layout says, in words."""
    if not family.is_installed:
        return f"needs transformers >= {family.since}"
    processor, model = family.make_processor(), tiny_copy(family.make_config())
    for size in SIZES:
        [layout] = layouts_of(processor, [size])
        found = impulse_test(model, processor, layout, family.cell, family.blur)
        if not found.passed:
            return f"FAILED at {size[0]} x {size[1]}: {found.missed} tokens missed, {found.foreign} foreign"
    return "passed"


def table() -> str:
    """Check all families, and return them as a table in Markdown."""
    grids = {name: (expected[0], source) for name, _, source, expected in PUBLISHED}
    lines = [
        f"transformers {transformers.__version__}",
        "",
        "| family (`model_type`) | image processor | tokens of 640 x 480 (rows x columns) | settings from | check |",
        "|---|---|---|---|---|",
    ]
    for name, family in tqdm(FAMILIES.items()):
        grid, source = grids.get(name, ("", ""))
        try:
            check = checked(family)
        except Exception as error:  # of one family; the others are checked all the same
            check = f"FAILED with {type(error).__name__}: {error}"
        lines.append(f"| {name} | {family.images} | {grid} | {source} | {check} |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--write", type=Path, help="a page whose table is replaced")
    page = flags.parse_args().write
    logging.set_verbosity_error()
    printed = table()
    print(printed)
    if page is not None:
        block = f"<!-- families -->\n{printed}\n<!-- end of families -->"
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub("<!-- families -->.*<!-- end of families -->", lambda _: block, text, flags=re.DOTALL))
