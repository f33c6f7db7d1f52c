"""A stitched model is a plain model of transformers with the weights of its parts, and only its projector is new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessor,
    CohereConfig,
    Dinov2Config,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)
from typer.testing import CliRunner

from patch_aligned import layouts_of
from patch_aligned.cli import app
from patch_aligned.models.stitch import ARCHITECTURES, stitch
from patch_aligned.models.tiny import tiny_config
from patch_aligned.models.tokens import PROJECTORS, VisualTokenHook, image_inputs, visual_tokens

GOLDENS = Path(__file__).parents[2] / "goldens" / "llava"
CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
LLMS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**TEXT, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": lambda: Qwen3Config(**TEXT, tie_word_embeddings=True),
    "cohere": lambda: CohereConfig(**TEXT, logit_scale=0.0625),
}
CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
QWEN_PIXELS = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 100}}
PAIRINGS = [
    ("llava", "clip", "vicuna"),
    ("llava", "siglip", "qwen2"),
    ("llava", "dinov2", "llama"),
    ("internvl", "dinov2", "llama"),
    ("internvl", "internvl", "qwen2"),
    ("qwen2_5_vl", "qwen2_5_vl", "qwen2"),
    ("qwen3_vl", "qwen3_vl", "qwen3"),
]


def tokenizer() -> Any:
    """Byte-level BPE with the special tokens of ChatML."""
    return AutoTokenizer.from_pretrained(
        GOLDENS / "tiny-tok-mpt", extra_special_tokens=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"
    )


def save_vision_language_model(name: str, folder: Path) -> None:
    config = tiny_config(CONFIG_MAPPING[name]())
    config.text_config.vocab_size = 1000
    tokens = dict(ARCHITECTURES[name].tokens)
    own = AutoTokenizer.from_pretrained(GOLDENS / "tiny-tok-mpt", model_specific_special_tokens=tokens)
    if name == "internvl":
        config.vision_config.image_size = (56, 56)
        images = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
        processor: Any = InternVLProcessor(images, own, InternVLVideoProcessor(), image_seq_length=4)
    elif name == "qwen2_5_vl":
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**QWEN_PIXELS), own, Qwen2VLVideoProcessor())
    else:
        images = Qwen2VLImageProcessor(**QWEN_PIXELS, patch_size=16)
        processor = Qwen3VLProcessor(images, own, Qwen3VLVideoProcessor())
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_encoder(config: Any, image_processor: Any, folder: Path) -> None:
    AutoModel.from_config(config).save_pretrained(folder)
    image_processor.save_pretrained(folder)


ENCODERS: dict[str, Callable[[Path], None]] = {
    "clip": lambda folder: shutil.copytree(GOLDENS / "tiny-clip", folder),
    "siglip": lambda folder: save_encoder(
        SiglipVisionConfig(**VISION), SiglipImageProcessor(size={"height": 56, "width": 56}), folder
    ),
    "dinov2": lambda folder: save_encoder(  # positions of another size than its images
        Dinov2Config(**VISION | {"image_size": 70}, mlp_ratio=2, layerscale_value=0.5),
        BitImageProcessor(**CROP),
        folder,
    ),
    **{name: partial(save_vision_language_model, name) for name in ("internvl", "qwen2_5_vl", "qwen3_vl")},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes a tiny random part once, and returns its folder."""
    root = tmp_path_factory.mktemp("parts")

    def write(name: str) -> str:
        folder = root / name
        if name == "vicuna":  # it has no chat template
            return str(GOLDENS / "tiny-vicuna")
        if not folder.exists():
            torch.manual_seed(0)
            if name in LLMS and name not in ENCODERS:
                AutoModelForCausalLM.from_config(LLMS[name]()).save_pretrained(folder)
                own = tokenizer()
                own.chat_template = CHAT_ML
                own.save_pretrained(folder)
            else:
                ENCODERS[name](folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def stitched(source: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Stitches a pairing once, and returns its folder."""
    root = tmp_path_factory.mktemp("stitched")

    def write(like: str, vision: str, llm: str) -> Path:
        folder = root / f"{like}-{vision}-{llm}"
        if not folder.exists():
            stitch(source(vision), source(llm), like, folder)
        return folder

    return write


def load(folder: Path) -> tuple[Any, Any]:
    """Load a model as any user of transformers does."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def is_projector(name: str, like: str) -> bool:
    return name.startswith(tuple(f"model.{module}." for module in PROJECTORS[like]))


@pytest.mark.parametrize(("like", "vision", "llm"), PAIRINGS)
def test_the_llm_reads_the_features_of_the_images_in_the_numbers_of_the_layouts(
    stitched: Callable[..., Path], like: str, vision: str, llm: str
):
    model, processor = load(stitched(like, vision, llm))
    samples = [[noise(300, 200), noise(97, 60)], [noise(201, 333)]]
    inputs = image_inputs(processor, samples)
    lengths = [sum(layout.length for layout in layouts_of(processor, images)) for images in samples]
    assert (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == lengths
    with VisualTokenHook(model) as hook, torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(hook.tokens, visual_tokens(model.model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("like", "vision", "llm"), PAIRINGS)
def test_encoder_and_llm_are_their_sources_and_the_projector_is_random(
    stitched: Callable[..., Path], source: Callable[[str], str], like: str, vision: str, llm: str
):
    model, processor = load(stitched(like, vision, llm))
    own = AutoModelForCausalLM.from_pretrained(source(llm)).eval()
    rows = own.config.vocab_size
    ours = model.model.language_model.state_dict() | {"lm_head.weight": model.lm_head.weight}
    for name, weight in (own.model.state_dict() | {"lm_head.weight": own.lm_head.weight}).items():
        found = ours.pop(name)
        assert torch.equal(found[:rows] if len(weight) == rows else found, weight), name
    assert not ours
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == own.config.tie_word_embeddings
    assert len(processor.tokenizer) <= len(model.lm_head.weight) == model.config.text_config.vocab_size
    ids = torch.randint(4, 900, (2, 16), generator=torch.manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :rows], own(ids).logits, rtol=1e-5, atol=1e-5)

    if vision in ("clip", "siglip", "dinov2"):
        encoder = AutoModel.from_pretrained(source(vision)).eval()
        pixels = torch.rand(1, 3, 56, 56, generator=torch.manual_seed(0))
        with torch.no_grad():
            expected, features = (tower(pixels).last_hidden_state for tower in (encoder, model.model.vision_tower))
        assert torch.equal(features, expected)
    else:
        encoder = AutoModelForImageTextToText.from_pretrained(source(vision))
        for name, weight in encoder.get_encoder(modality="image").state_dict().items():
            prefixed = f"model.{ARCHITECTURES[like].encoder}.{name}"
            assert is_projector(prefixed, like) or torch.equal(model.state_dict()[prefixed], weight), name
    fresh = {name: weight for name, weight in model.named_parameters() if is_projector(name, like)}
    assert fresh
    assert all(weight.std() > 0 for weight in fresh.values() if weight.ndim > 1)


@pytest.mark.parametrize(("like", "vision", "llm"), PAIRINGS)
def test_ten_steps_change_the_projector_alone_and_survive_saving(
    stitched: Callable[..., Path], tmp_path: Path, like: str, vision: str, llm: str
):
    model, processor = load(stitched(like, vision, llm))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_projector(name, like))
    texts = [f"An image {processor.image_token} of a cat", f"{processor.image_token} A lake."]
    images = [[noise(97, 60)], [noise(120, 80)]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if is_projector(name, like)}

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load(tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = again(**processor_again(text=texts, images=images, padding=True, return_tensors="pt")).logits
    assert torch.equal(found, expected)


def test_the_seed_decides_the_projector(source: Callable[[str], str], tmp_path: Path):
    parts = source("dinov2"), source("llama"), "internvl"
    state = torch.get_rng_state()
    first, same, other = (
        stitch(*parts, tmp_path / str(number), seed).model.multi_modal_projector.linear_1.weight
        for number, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("like", "image"),
    [
        ("llava", "<image>\n"),
        ("internvl", "<IMG_CONTEXT>\n"),
        ("qwen2_5_vl", "<|vision_start|><|image_pad|><|vision_end|>"),
    ],
)
def test_the_chat_template_is_the_llms_with_images_in_their_places(
    stitched: Callable[..., Path], source: Callable[[str], str], like: str, image: str
):
    vision, llm = {"llava": ("siglip", "qwen2"), "internvl": ("dinov2", "llama"), "qwen2_5_vl": (like, "qwen2")}[like]
    processor = AutoProcessor.from_pretrained(stitched(like, vision, llm))
    text = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'A "cat"?'}]
    expected = AutoTokenizer.from_pretrained(source(llm)).apply_chat_template(
        text, tokenize=False, add_generation_prompt=True
    )
    assert processor.apply_chat_template(text, add_generation_prompt=True) == expected
    parts = [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": "second"}]
    with_image = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    rendered = f"<|im_start|>user\nFirst {image}second<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert processor.apply_chat_template(with_image) == rendered
    assert processor.tokenizer.apply_chat_template(with_image, tokenize=False) == rendered


def test_an_llm_without_chat_template_reads_texts_one_after_another(stitched: Callable[..., Path]):
    processor = AutoProcessor.from_pretrained(stitched("llava", "clip", "vicuna"))
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a lake"}]},
    ]
    assert processor.apply_chat_template(messages) == "<image>\na lake</s>"


def test_special_tokens_of_the_llm_stay_special(stitched: Callable[..., Path]):
    own = AutoProcessor.from_pretrained(stitched("internvl", "dinov2", "llama")).tokenizer
    ids = own("<|im_start|>a<IMG_CONTEXT><|im_end|>").input_ids
    assert own.decode(ids, skip_special_tokens=True) == "a"
    assert own.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("like", "vision", "llm", "reason"),
    [
        ("internvl", "clip", "llama", "found model_type clip_vision_model, expected internvl_vision or dinov2"),
        ("qwen2_5_vl", "dinov2", "qwen2", "found model_type dinov2, expected qwen2_5_vl_vision"),
        ("qwen2_5_vl", "qwen2_5_vl", "llama", "found model_type llama, expected qwen2"),
        ("qwen3_vl", "qwen3_vl", "qwen2", "found model_type qwen2, expected qwen3"),
        ("llava", "clip", "cohere", "may scale"),
        ("llava", "qwen2_5_vl", "llama", "expected clip_vision_model or siglip"),
        ("gemma3", "siglip", "llama", "found 'gemma3', expected one of llava"),
    ],
)
def test_what_the_classes_cannot_hold_is_refused(
    source: Callable[[str], str], tmp_path: Path, like: str, vision: str, llm: str, reason: str
):
    with pytest.raises(ValueError, match=reason):
        stitch(source(vision), source(llm), like, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_odd_number_of_patches_is_refused_for_internvl(source: Callable[[str], str], tmp_path: Path):
    """As SigLIP's 384 px of 14: InternVL merges 2 x 2 patches."""
    odd = tmp_path / "odd"
    save_encoder(Dinov2Config(**VISION, mlp_ratio=2), BitImageProcessor(size={"shortest_edge": 70}, crop_size=70), odd)
    with pytest.raises(ValueError, match="found 5 x 5 patches"):
        stitch(str(odd), source("llama"), "internvl", tmp_path / "out")


def test_a_dinov2_with_other_layers_is_refused_for_internvl(source: Callable[[str], str], tmp_path: Path):
    """DINOv2-giant has another feed-forward layer than InternVL's encoder."""
    giant = tmp_path / "giant"
    save_encoder(Dinov2Config(**VISION, mlp_ratio=2, use_swiglu_ffn=True), BitImageProcessor(**CROP), giant)
    with pytest.raises(ValueError, match="found use_swiglu_ffn"):
        stitch(str(giant), source("llama"), "internvl", tmp_path / "out")


def test_the_command_writes_model_and_record_into_a_new_folder(source: Callable[[str], str], tmp_path: Path):
    output = tmp_path / "stitched"
    words = ["stitch", "--vision", source("dinov2"), "--llm", source("llama"), "--like", "internvl", "--output"]
    result = CliRunner().invoke(app, [*words, str(output)])
    assert result.exit_code == 0, result.output
    assert json.loads((output / "run.json").read_text())["flags"]["like"] == "internvl"
    assert type(load(output)[0]).__name__ == "InternVLForConditionalGeneration"
    result = CliRunner().invoke(app, [*words, str(output)])
    assert result.exit_code == 2
    assert "holds files" in result.output
