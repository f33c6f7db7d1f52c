"""A converted folder is the same model: same pixels, ids, logits and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, Qwen2Config

from llava.convert import to_hf as to_hf_module
from llava.convert.to_hf import to_hf
from llava.model.language_model.families import llava_config, llava_model_class
from tests.folders import save_tower, set_config

SHAPES = {"square": 0, "wide": 1, "tall": 2, "very wide": 6}
QUESTIONS = [
    "What is this?", "What is in the picture?", "How many are there?", "Where is the cat?", "Describe the image.",
    "Which colours do you see?", "Is it day or night?", "Who is there?", "What happens next?", "Answer with one word.",
    "Read the text.", "What is left of the tree?", "Why?", "Is there a dog?", "Name three things.",
    " Begins with a space.", "Ends with a space. ", "Two\nlines?", "Numbers 12 and 345?", "Ümlauts and émojis 🙂?",
]  # fmt: skip


def picture(number: int) -> Image.Image:
    return Image.open(f"images/im{number}.png").convert("RGB")


@pytest.mark.golden
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_logits_and_pixels_equal(aspect_ratio: str, convert: Callable[..., Any]) -> None:
    pair = convert(image_aspect_ratio=aspect_ratio)
    for number in SHAPES.values():
        ours, theirs = pair.our_inputs(picture(number), "What is this?"), pair.their_inputs(picture(number), "x")
        assert torch.equal(ours["images"], theirs["pixel_values"])
        our_logits, their_logits = pair.logits(picture(number), "What is this?")
        vocabulary = our_logits.shape[-1]
        torch.testing.assert_close(their_logits[..., :vocabulary], our_logits, rtol=1e-5, atol=1e-5)
    assert pair.theirs.config.image_token_id == vocabulary == 1000
    assert their_logits.shape[-1] == 1024  # with rows that never win
    mean = their_logits[..., :1000].mean(dim=-1, keepdim=True)
    torch.testing.assert_close(their_logits[..., 1000:], mean.expand(-1, -1, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.golden
def test_text_generated_for_20_prompts_is_equal(convert: Callable[..., Any]) -> None:
    pair = convert()
    answers = set()
    for number, question in enumerate(QUESTIONS):
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
        ours = pair.ours.generate(**pair.our_inputs(picture(number % 7), question), **options)
        inputs = pair.their_inputs(picture(number % 7), question)
        theirs = pair.theirs.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        expected = pair.tokenizer.batch_decode(ours, skip_special_tokens=True)
        assert pair.processor.batch_decode(theirs, skip_special_tokens=True) == expected
        answers.add(expected[0])
    assert len(answers) > 10


@pytest.mark.golden
def test_prompts_in_a_batch_are_answered_as_one_by_one(convert: Callable[..., Any]) -> None:
    pair = convert()
    dialogues = [
        [{"role": "user", "content": [{"type": "image", "image": picture(i)}, {"type": "text", "text": QUESTIONS[i]}]}]
        for i in range(4)
    ]
    inputs = pair.processor.apply_chat_template(
        dialogues,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    together = pair.theirs.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)[:, -8:]
    for row in range(4):
        inputs = pair.our_inputs(picture(row), QUESTIONS[row])
        alone = pair.ours.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        assert together[row].tolist() == alone[0].tolist()


def test_rendering_and_tokenising_in_two_steps_gives_one_bos(convert: Callable[..., Any]) -> None:
    pair = convert()
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = pair.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = pair.processor(text=text, images=[picture(0)]).input_ids[0]
    bos = pair.tokenizer.bos_token_id
    assert (ids[0], list(ids).count(bos)) == (bos, 1)
    assert ids == pair.their_inputs(picture(0), "What is this?").input_ids[0].tolist()


def test_rows_to_spare_are_used_before_new_ones_are_made(convert: Callable[..., Any]) -> None:
    weights = load_file("tiny-llava/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:8] * 2])
    save_file(weights, "tiny-llava/model.safetensors", metadata={"format": "pt"})
    pair = convert(vocab_size=1008)
    ours, theirs = pair.logits(picture(0), "What is this?")
    assert ours.shape == theirs.shape
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("folder", ["ckpt_stage1", "ckpt_lora"])
def test_a_projector_or_an_adapter_brings_its_base_along(
    folder: str, convert: Callable[..., Any], goldens: Path
) -> None:
    shutil.copytree(goldens / folder, folder)
    ours, theirs = convert(folder, base="tiny-vicuna").logits(picture(1), "What is this?")
    torch.testing.assert_close(theirs[..., : ours.shape[-1]], ours, rtol=1e-5, atol=1e-5)
    card = Path("hf/README.md").read_text()
    assert "tiny-vicuna" in card
    assert ("the projector alone" if folder == "ckpt_stage1" else "by LoRA") in card


def write_llava(folder: str, config: Any, tower: str, **values: Any) -> None:
    """A LLaVA of another make, with random weights and the tokenizer of tiny-llava."""
    torch.manual_seed(0)
    config = llava_config(config)
    defaults = {"mm_vision_tower": tower, "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True,
                "mm_vision_select_layer": -2, "mm_use_im_patch_token": False}  # fmt: skip
    for key, value in (defaults | values).items():
        setattr(config, key, value)
    llava_model_class(config)(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained("tiny-llava").save_pretrained(folder)


def tower_of(kind: str) -> str:
    return "tiny-clip" if kind == "clip" else save_tower(kind, Path(kind))


SIZE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


@pytest.mark.parametrize(
    ("kind", "feature"),
    [("clip", "patch"), ("clip", "cls_patch"), ("dinov2", "patch"), ("dinov2", "cls_patch"), ("siglip", "patch")],
)
def test_each_tower_gives_the_same_features(kind: str, feature: str, convert: Callable[..., Any]) -> None:
    write_llava("other", LlamaConfig(**SIZE), tower_of(kind), mm_vision_select_feature=feature)
    for ratio in ("pad", "square"):
        shutil.rmtree("hf", ignore_errors=True)
        pair = convert("other", image_aspect_ratio=ratio)
        for number in (0, 1, 2):
            ours, theirs = pair.logits(picture(number), "What is this?")
            torch.testing.assert_close(theirs[..., :1000], ours, rtol=1e-5, atol=1e-5)
        assert pair.theirs.config.image_seq_length == pair.their_inputs(picture(0), "x")["input_ids"].eq(1000).sum()


@pytest.mark.parametrize("tied", [False, True])
def test_another_family_with_tied_and_untied_words(tied: bool, convert: Callable[..., Any]) -> None:
    config = Qwen2Config(**SIZE, num_key_value_heads=2, tie_word_embeddings=tied)
    write_llava("other", config, tower_of("clip"))
    pair = convert("other", image_aspect_ratio="pad")
    assert type(pair.theirs.config.text_config) is Qwen2Config
    ours, theirs = pair.logits(picture(1), "What is this?")
    torch.testing.assert_close(theirs[..., :1000], ours, rtol=1e-5, atol=1e-5)
    assert ("language_model.lm_head.weight" in load_file("hf/model.safetensors")) is not tied


def test_readers_of_published_folders_find_names_shards_and_settings_and_no_path_of_the_checkpoint(
    golden_world: Path,
) -> None:
    set_config("tiny-llava", mm_vision_tower="tiny-clip")
    to_hf(str(golden_world / "tiny-llava"), "hf", max_shard_size="300KB")
    names = json.loads(Path("hf/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) > 2
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    } < names.keys()
    settings = json.loads(Path("hf/preprocessor_config.json").read_text())
    assert (settings["image_processor_type"], settings["do_pad"]) == ("LlavaImageProcessor", True)
    assert Path("hf/tokenizer.model").read_bytes() == Path("tiny-llava/tokenizer.model").read_bytes()
    assert AutoProcessor.from_pretrained("hf").tokenizer.padding_side == "left"
    texts = [path.read_text() for path in Path("hf").iterdir() if path.suffix in (".json", ".md", ".jinja")]
    assert not [text for text in texts if str(golden_world) in text]


def test_a_patch_loss_in_the_training_log_is_on_the_card(golden_world: Path, goldens: Path) -> None:
    shutil.copytree(goldens / "ckpt_stage1", "stage1")
    Path("stage1/trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss/patch": 0.4}]}))
    to_hf("stage1", "hf", base="tiny-vicuna")
    assert "| patch-aligned | yes" in Path("hf/README.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_projector_type", "cabstractor"),
        ("mm_projector_type", "identity"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("image_aspect_ratio", "anyres"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(key: str, value: str, golden_world: Path) -> None:
    set_config("tiny-llava", **{key: value})
    with pytest.raises(ValueError, match=f"{key} is `{value}`"):
        to_hf("tiny-llava", "hf")
    assert not Path("hf").exists()


def test_towers_with_registers_are_refused_by_name(golden_world: Path) -> None:
    set_config("tiny-llava", mm_vision_tower=tower_of("dinov2_with_registers"))
    with pytest.raises(ValueError, match="of model type `dinov2_with_registers`"):
        to_hf("tiny-llava", "hf")


def test_a_plain_llm_is_refused(golden_world: Path) -> None:
    with pytest.raises(ValueError, match="no `mm_vision_tower`"):
        to_hf("tiny-vicuna", "hf")


def test_a_folder_with_files_in_it_is_left_alone(golden_world: Path) -> None:
    with pytest.raises(FileExistsError, match="tiny-clip is not empty"):
        to_hf("tiny-llava", "tiny-clip")
    with pytest.raises(FileExistsError, match=r"im0\.png is a file"):
        to_hf("tiny-llava", "images/im0.png")


def test_a_template_without_a_counterpart_is_refused_before_anything_is_written(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> str:
        raise ValueError("The conversation template has no counterpart")

    monkeypatch.setattr(to_hf_module, "chat_template", refuse)
    with pytest.raises(ValueError, match="no counterpart"):
        to_hf("tiny-llava", "hf")
    assert not Path("hf").exists()


def test_a_template_that_is_guessed_is_said(golden_world: Path, caplog: pytest.LogCaptureFixture) -> None:
    to_hf("tiny-llava", "hf")
    assert "tiny-llava records no template: `llava_v0`" in caplog.text
    caplog.clear()
    to_hf("tiny-llava", "said", conv_mode="v1")
    assert not caplog.text
