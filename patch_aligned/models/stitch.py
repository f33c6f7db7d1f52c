"""Stitch a vision encoder and an LLM to a model of transformers whose projector is untrained: where stage 1 begins.

Only classes of transformers are used, so `AutoModelForImageTextToText` and `AutoProcessor` load the result.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoImageProcessor

from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.tokens import PROJECTORS

_WITH_IMAGES = (Path(__file__).parent / "with_images.jinja").read_text(encoding="utf-8")
# For an LLM without a template: texts one after another, answers closed. It is what LLaVA calls `plain`.
_PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


@dataclass(frozen=True)
class Architecture:
    """How the models of one `model_type` are put together.

    `make` gets the encoder's source, encoder, LLM and tokenizer, and returns a processor, and the encoder as the
    architecture has it.
    """

    make: Callable[[str, Any, Any, Any], tuple[Any, Any]]
    encoder: str  # its name in the base model
    tokens: Mapping[str, str]  # special tokens of the processor, by their names as attributes of the tokenizer
    image: str  # what the chat template writes for an image
    encoders: tuple[str, ...]  # model types that its classes can hold
    why: str  # they hold no others
    llms: tuple[str, ...] = ()  # model types that its classes can hold; none: any
    rotary_share: int = 0  # sixteenths of a head's rotary frequencies that tell a token's row, and as many its column


@torch.random.fork_rng(devices=[])
@torch.no_grad()
def stitch(vision: str, llm: str, like: str, output: Path, seed: int = 0) -> Any:
    """Write a model with the weights of an encoder and of an LLM, and with an untrained projector. Returns it.

    Args:
        vision: folder or hub name of a vision encoder, or of a vision-language model whose encoder is taken.
        llm: folder or hub name of a causal LLM. Its dtype is that of the result.
        like: the architecture, a key of `ARCHITECTURES`.
        output: a new folder.
        seed: of the projector, which the architecture's own classes initialise.

    Raises:
        FileExistsError: `output` holds files.
        ValueError: the classes of the architecture cannot hold one of the parts; the message says why.
    """
    if like not in ARCHITECTURES:
        raise ValueError(f"--like: found {like!r}, expected one of {', '.join(ARCHITECTURES)}")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"--output {output}: the folder holds files. Name a new one.")
    architecture = ARCHITECTURES[like]
    for option, name, expected in (("--vision", vision, architecture.encoders), ("--llm", llm, architecture.llms)):
        config = AutoConfig.from_pretrained(name)
        found = f"found model_type {getattr(config, 'vision_config', config).model_type}"
        if expected and found.split()[-1] not in expected:
            raise ValueError(f"{option} {name}: {found}, expected {' or '.join(expected)}. {architecture.why}")
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        llm, model_specific_special_tokens=dict(architecture.tokens), padding_side="left"
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    template = tokenizer.get_chat_template() if tokenizer.chat_template else _PLAIN
    tokenizer.chat_template = _WITH_IMAGES.replace("IMAGE", json.dumps(architecture.image)) + template
    language_model = transformers.AutoModelForCausalLM.from_pretrained(llm).eval()
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    encoder = transformers.AutoModel.from_pretrained(vision, dtype=language_model.dtype).eval()
    if hasattr(encoder.config, "vision_config"):
        encoder = encoder.get_encoder(modality="image")
    processor, encoder = architecture.make(vision, encoder, language_model, tokenizer)
    processor.chat_template = tokenizer.chat_template
    [layout] = layouts_of(processor, [(640, 480)])  # refuses an image processor whose tokens have no known place
    token_ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in architecture.tokens.items()}
    # What processor and config both have, has the same name in both.
    settings = {**token_ids, "image_seq_length": layout.length, **vars(processor)}
    model = _assemble(encoder, language_model, like, settings)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return model


def _assemble(encoder: Any, llm: Any, like: str, settings: Mapping[str, Any]) -> Any:
    """Build the model; check that each weight has its place, and that the LLM computes what it did."""
    architecture = ARCHITECTURES[like]
    default: Any = CONFIG_MAPPING[like]()
    text_config = copy.deepcopy(llm.config)  # a model changes the config that it is made with
    if architecture.llms:
        text_config = _own_text_config(default.text_config, text_config, architecture.rotary_share)
    config: Any = type(default)(
        vision_config=copy.deepcopy(encoder.config),
        text_config=text_config,
        tie_word_embeddings=llm.config.tie_word_embeddings,
        **{name: value for name, value in settings.items() if hasattr(default, name)},
    )
    head = llm.get_output_embeddings()
    parts = {f"model.{architecture.encoder}": encoder, "model.language_model": llm.base_model, "lm_head": head}
    weights = {f"{part}.{name}": weight for part, of in parts.items() for name, weight in of.state_dict().items()}
    projector = tuple(f"model.{name}." for name in PROJECTORS[like])
    weights = {name: weight for name, weight in weights.items() if not name.startswith(projector)}
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=llm.dtype, output_loading_info=True
    )
    missing = {name for name in report["missing_keys"] if not name.startswith(projector)}
    if wrong := sorted(report["unexpected_keys"] | missing):
        raise ValueError(f"{type(model).__name__} cannot hold the weights of this encoder and LLM, such as {wrong[0]}.")
    model.generation_config = llm.generation_config
    ids = torch.arange(8)[None]  # [1, L]
    expected, found = llm(ids).logits, model.eval()(input_ids=ids).logits  # [1, L, M]
    if (found - expected).norm() > 0.01 * expected.norm():
        raise ValueError(
            f"{type(model).__name__} gives a text other logits than {type(llm).__name__}, which may scale or cap them. "
            "Choose another --llm or --like."
        )
    return model


def _own_text_config(default: Any, config: Any, rotary_share: int) -> Any:
    """Return the config of an architecture's own text model, whose positions have a time, a row and a column."""
    known = default.to_dict().keys() - {"model_type", "architectures"}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    frequencies = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
    side = frequencies * rotary_share // 16
    rotary = {"mrope_section": [frequencies - 2 * side, side, side], "mrope_interleaved": rotary_share == 5}
    return type(default)(**values | {"rope_parameters": {**config.rope_parameters, **rotary}})


def _llava(source: str, encoder: Any, llm: Any, tokenizer: Any) -> tuple[Any, Any]:
    """An encoder with a grid of patches, and its own image processor."""
    own, images = encoder.config, AutoImageProcessor.from_pretrained(source)
    has_cls = own.model_type != "siglip_vision_model"
    select = "default" if has_cls else "full"  # `default` drops the first
    before = has_cls + getattr(own, "num_register_tokens", 0)
    return transformers.LlavaProcessor(
        images, tokenizer, own.patch_size, select, num_additional_image_tokens=before
    ), encoder


def _internvl(source: str, encoder: Any, llm: Any, tokenizer: Any) -> tuple[Any, Any]:
    """InternVL's own encoder, or DINOv2."""
    if encoder.config.model_type == "internvl_vision":
        return _with_own_encoder(source, encoder, llm, tokenizer)
    if encoder.config.use_swiglu_ffn:
        raise ValueError(f"--vision {source}: found use_swiglu_ffn, which InternVL's encoder lacks.")
    images = AutoImageProcessor.from_pretrained(source)
    side, cells = images.crop_size["height"], images.crop_size["height"] // encoder.config.patch_size
    if cells % 2:
        raise ValueError(
            f"--vision {source}: found {cells} x {cells} patches, expected an even number, as InternVL merges 2 x 2. "
            "Set another crop_size in its preprocessor_config.json."
        )
    size, colours = {"height": side, "width": side}, {"image_mean": images.image_mean, "image_std": images.image_std}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, resample=images.resample, **colours)
    length, videos = (cells // 2) ** 2, transformers.InternVLVideoProcessor()
    processor = transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=length)
    return processor, _dinov2_as_internvl(encoder, side)


def _dinov2_as_internvl(encoder: Any, side: int) -> Any:
    """Return InternVL's encoder with the weights of a DINOv2, whose features of images of `side` pixels it computes."""
    own, weights = encoder.config, encoder.state_dict()
    same = "hidden_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps patch_size"
    config = transformers.InternVLVisionConfig(
        **{name: getattr(own, name) for name in same.split()},
        intermediate_size=int(own.hidden_size * own.mlp_ratio),
        attention_bias=own.qkv_bias,
        image_size=side,
        use_mean_pooling=False,  # so that a layer norm is at the end
    )
    weights.pop("embeddings.mask_token", None)  # of DINOv2's own training
    tokens = torch.empty(1, (side // own.patch_size) ** 2 + 1, own.hidden_size)  # only its shape is read
    weights["embeddings.position_embeddings"] = encoder.embeddings.interpolate_pos_encoding(tokens, side, side)
    for pattern, name in _NAMES_FROM_DINOV2.items():
        weights = {re.sub(pattern, name, old): weight for old, weight in weights.items()}
    made = transformers.AutoModel.from_config(config, dtype=encoder.dtype).eval()
    made.load_state_dict(weights)
    return made


_NAMES_FROM_DINOV2 = {
    r"attention\.attention\.(q|k|v)\w+\.": r"attention.\1_proj.",  # in earlier releases of transformers
    r"attention\.(o_proj|output\.dense)": "attention.projection_layer",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"layer_scale(\d)\.lambda1": r"lambda_\1",
}


def _with_own_encoder(source: str, encoder: Any, llm: Any, tokenizer: Any) -> tuple[Any, Any]:
    """An encoder of the same architecture, with its processor. Qwen's has the projector inside."""
    own = transformers.AutoProcessor.from_pretrained(source)
    if hasattr(encoder.config, "out_hidden_size"):
        encoder.config.out_hidden_size = llm.config.hidden_size
    length = {"image_seq_length": own.image_seq_length} if hasattr(own, "image_seq_length") else {}
    return type(own)(own.image_processor, tokenizer, own.video_processor, **length), encoder


_QWEN: Mapping[str, Any] = {
    "make": _with_own_encoder,
    "encoder": "visual",
    "tokens": {f"{name}_token": f"<|{name}|>" for name in ("vision_start", "vision_end")}
    | {f"{name}_token": f"<|{name}_pad|>" for name in ("image", "video")},
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "why": "Its classes build their own encoder, projector inside, and their own LLM, whatever the config says.",
}
_INTERNVL = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        make=_llava,
        encoder="vision_tower",
        tokens={"image_token": "<image>"},
        image="<image>\n",
        encoders=("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"),
        why="It reads one square grid of patches, with at most a CLS token and registers before them.",
    ),
    "internvl": Architecture(
        make=_internvl,
        encoder="vision_tower",
        tokens={f"{name}_token": token for name, token in _INTERNVL.items()},
        image="<IMG_CONTEXT>\n",
        encoders=("internvl_vision", "dinov2"),
        why="Its class builds InternVL's encoder, whatever the config says. Of others, DINOv2 has the same layers.",
    ),
    "qwen2_5_vl": Architecture(encoders=("qwen2_5_vl_vision",), llms=("qwen2",), rotary_share=6, **_QWEN),
    "qwen3_vl": Architecture(encoders=("qwen3_vl_vision",), llms=("qwen3",), rotary_share=5, **_QWEN),
}
"""Registry of architectures, by `model_type`."""
