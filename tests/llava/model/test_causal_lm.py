"""Properties of `forward` and `generate` that no recorded output can pin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.multimodal_merge import merge
from llava.plugin import AlignmentContext, AuxiliaryOutput, TrainingPlugin


@pytest.fixture
def model(golden_world: Path) -> LlavaLlamaForCausalLM:
    model = LlavaLlamaForCausalLM.from_pretrained("tiny-llava", dtype=torch.float32)
    model.get_vision_tower().load_model()
    return model.eval()


def prompts(lengths: list[int], images: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask of rows with the given numbers of words and images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(n + k for n, k in zip(lengths, images, strict=True)), dtype=torch.long)
    for row, (length, count) in enumerate(zip(lengths, images, strict=True)):
        words = torch.randint(5, 900, (length,), generator=generator)
        ids[row, : length + count] = torch.cat([words[:1], torch.full((count,), IMAGE_TOKEN_INDEX), words[1:]])
    return ids, ids != 0


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(7))


def test_answers_at_batch_8_equal_those_one_by_one(model: LlavaLlamaForCausalLM) -> None:
    images_per_row = [1, 0, 1, 2, 0, 1, 1, 0]
    ids, mask = prompts([3, 9, 14, 5, 2, 7, 11, 4], images_per_row)
    images = pixels(sum(images_per_row))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    together = model.generate(ids, images=images, attention_mask=mask, **options)
    alone, first = [], 0
    for row, count in enumerate(images_per_row):
        own = images[first : first + count] if count else None
        alone.append(model.generate(ids[row : row + 1, : int(mask[row].sum())], images=own, **options)[0])
        first += count
    assert together.tolist() == torch.stack(alone).tolist()


def test_a_misspelt_keyword_is_refused(model: LlavaLlamaForCausalLM) -> None:
    ids, _ = prompts([3], [1])
    with pytest.raises(TypeError, match="image_size"):
        model(ids, images=pixels(1), image_size=[(56, 56)])


def test_the_side_of_the_prompt_padding_is_free(model: LlavaLlamaForCausalLM) -> None:
    ids, mask = prompts([3, 9], [1, 1])
    left_ids, left_mask = ids.roll(-int(ids.shape[1]), 1).clone(), mask.clone()
    for row in range(2):
        shift = ids.shape[1] - int(mask[row].sum())
        left_ids[row], left_mask[row] = ids[row].roll(shift), mask[row].roll(shift)
    options: dict[str, Any] = {"images": pixels(2), "do_sample": False, "max_new_tokens": 6}
    right = model.generate(ids, attention_mask=mask, **options)
    left = model.generate(left_ids, attention_mask=left_mask, **options)
    assert right.tolist() == left.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_an_end_needs_no_mask(model: LlavaLlamaForCausalLM, side: str) -> None:
    ids, mask = prompts([3, 9], [1, 1])
    ids[~mask.bool()] = padding = 3
    ids[mask.bool() & (ids == padding)] = 4
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    options: dict[str, Any] = {"images": pixels(2), "do_sample": False, "max_new_tokens": 6, "pad_token_id": padding}
    expected = model.generate(ids, attention_mask=mask, **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_padding_that_may_be_text_is_warned_of(model: LlavaLlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    ids, _ = prompts([3, 3], [0, 0])
    model.generate(ids, max_new_tokens=1, pad_token_id=model.config.eos_token_id)
    assert "attention_mask" in caplog.text


def test_ids_that_are_no_batch_are_refused(model: LlavaLlamaForCausalLM) -> None:
    ids, _ = prompts([6], [1])
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        model.generate(ids[0], images=pixels(1), max_new_tokens=1)


def test_generate_returns_only_new_tokens_and_casts_images(model: LlavaLlamaForCausalLM) -> None:
    ids, _ = prompts([6], [1])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    full = model.generate(ids, images=pixels(1), **options)
    half = model.generate(ids, images=pixels(1).half().double(), **options)
    assert full.shape == half.shape == (1, 5)
    assert model.generate(ids[ids >= 0][None], **options).shape == (1, 5)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_wrong_number_of_images_is_refused(model: LlavaLlamaForCausalLM, images: int) -> None:
    ids, mask = prompts([4, 4], [1, 1])
    with pytest.raises(ValueError, match=f"2 <image> tokens but {images} images"):
        model.generate(ids, attention_mask=mask, images=pixels(images) if images else None, max_new_tokens=1)


def test_visual_tokens_go_to_the_device_of_the_word_embeddings() -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 2]])
    merged = merge(ids, [torch.ones(4, 8)], lambda words: torch.empty(len(words), 8, device="meta"))
    assert merged.inputs_embeds.device.type == "meta"
    assert merged.inputs_embeds.shape == (1, 6, 8)


def test_generate_refuses_embeddings(model: LlavaLlamaForCausalLM) -> None:
    with pytest.raises(NotImplementedError):
        model.generate(inputs_embeds=torch.zeros(1, 2, 64))


def training_batch() -> dict[str, Any]:
    ids, mask = prompts([8, 12, 10], [1, 0, 1])
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    labels[~mask] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels(2)}


def test_logits_at_supervised_positions_give_the_full_loss_and_gradients(golden_world: Path) -> None:
    model = LlavaLlamaForCausalLM.from_pretrained("tiny-llava", dtype=torch.float64)
    model.get_vision_tower().load_model()
    model.get_vision_tower().double()
    batch = training_batch()
    losses, gradients = [], []
    for training in (True, False):
        model.train(training).zero_grad()
        output = model(**batch)
        assert (output.logits is None) == training
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_a_batch_without_supervised_tokens_has_loss_zero_and_zero_gradients(model: LlavaLlamaForCausalLM) -> None:
    batch = training_batch()
    batch["labels"][:] = IGNORE_INDEX
    loss = model.train()(**batch).loss
    loss.backward()
    assert loss.item() == 0
    gradient = model.get_model().mm_projector[0].weight.grad
    assert gradient is not None and not gradient.any()


def test_a_text_only_training_batch_keeps_the_projector_in_the_graph(model: LlavaLlamaForCausalLM) -> None:
    ids, mask = prompts([8, 5], [0, 0])
    model.train().requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.where(mask, IGNORE_INDEX)).loss
    loss.backward()
    gradient = model.get_model().mm_projector[0].weight.grad
    assert loss.item() > 0
    assert gradient is not None and not gradient.any()


def test_training_stops_where_the_length_limit_cuts_an_image(model: LlavaLlamaForCausalLM) -> None:
    model.config.tokenizer_model_max_length = 12
    with pytest.raises(ValueError, match=r"in first, third\."):
        model.train()(**training_batch(), sample_ids=["first", "second", "third"])


@pytest.mark.parametrize("packs_samples", [False, True])
def test_supervised_tokens_beyond_the_cut_do_not_count(model: LlavaLlamaForCausalLM, packs_samples: bool) -> None:
    model.get_model().packs_samples = packs_samples
    batch = {
        "input_ids": torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6], [1, 5, 6, 7]]),
        "labels": torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, 6], [1, IGNORE_INDEX, 6, 7]]),
        "images": pixels(1),
    }
    for kept, counts in ((None, [2, 2]), (18, [1, 2]), (17, [0, 2])):  # the first position is predicted by none
        model.config.tokenizer_model_max_length = kept
        assert model.train()(**batch).supervised_tokens.tolist() == counts


class RecordingPlugin(TrainingPlugin):
    """Keeps what it is shown; its loss is the mean of the visual tokens."""

    context: AlignmentContext

    def auxiliary_losses(self, context: AlignmentContext, batch: Any) -> AuxiliaryOutput:
        self.context = context
        return AuxiliaryOutput({"mean": context.visual_tokens.mean()}, {"images": torch.tensor(2.0)})


def test_a_plugin_sees_the_projector_output_of_the_same_pass(model: LlavaLlamaForCausalLM) -> None:
    plugin, batch = RecordingPlugin(), training_batch()
    model.attach_plugin(plugin)
    output = model.train()(**batch, plugin_batch={})
    assert plugin.context.sample_of_image.tolist() == [0, 2]
    assert plugin.context.grid == (4, 4)
    torch.testing.assert_close(plugin.context.visual_tokens, model.encode_images(batch["images"]))
    assert output.auxiliary_losses["mean"].item() == pytest.approx(plugin.context.visual_tokens.mean().item())
    assert output.auxiliary_metrics["images"].item() == 2


def test_a_plugin_leaves_out_dummy_images(model: LlavaLlamaForCausalLM) -> None:
    plugin, batch = RecordingPlugin(), training_batch()
    model.attach_plugin(plugin)
    images = pixels(3)  # upstream's way: the text-only row in the middle comes with an image that nobody reads
    model.train()(**{**batch, "images": images}, plugin_batch={})
    torch.testing.assert_close(plugin.context.visual_tokens, model.encode_images(images[[0, 2]]))


def test_the_caption_loss_is_the_same_bit_for_bit_with_a_plugin(model: LlavaLlamaForCausalLM) -> None:
    batch = training_batch()
    plain = model.train()(**batch).loss
    model.attach_plugin(RecordingPlugin())
    assert torch.equal(plain, model(**batch, plugin_batch={}).loss)


def test_saved_tower_weights_carry_the_names_of_published_checkpoints(
    model: LlavaLlamaForCausalLM, goldens: Path
) -> None:
    model.save_pretrained("saved")
    assert load_file("saved/model.safetensors").keys() == load_file(goldens / "ckpt_stage2/model.safetensors").keys()
    model.load_state_dict(load_file("saved/model.safetensors"), strict=True)


def test_labels_in_eval_mode_give_loss_and_logits(model: LlavaLlamaForCausalLM) -> None:
    output = model(**training_batch())
    assert output.loss.item() > 0
    assert output.logits.shape[-1] == 1000


def test_an_answers_likelihood_as_lmms_eval_asks_for_it(model: LlavaLlamaForCausalLM) -> None:
    """Its call: no mask, labels as long as the ids, float16 images; it reads the output as a dict."""
    ids, _ = prompts([9], [1])
    labels = ids.clone()
    labels[:, :6] = IGNORE_INDEX
    images = pixels(1).half()
    with torch.inference_mode():
        output = model(input_ids=ids, labels=labels, images=images, use_cache=True, image_sizes=[[80, 40]])
        answer = ids[0, 6:]
        logits = model(input_ids=ids, images=images).logits[0, -len(answer) - 1 : -1]
    assert output["logits"].shape == (1, 9 + 16, 1000)
    likelihood = logits.double().log_softmax(-1)[range(len(answer)), answer].mean()
    assert output["loss"].item() == pytest.approx(-likelihood.item(), rel=1e-5)


def test_logits_to_keep_selects_the_last_positions(model: LlavaLlamaForCausalLM) -> None:
    batch = training_batch()
    full = model(batch["input_ids"], batch["attention_mask"], images=batch["images"]).logits
    last = model(batch["input_ids"], batch["attention_mask"], images=batch["images"], logits_to_keep=2).logits
    torch.testing.assert_close(last, full[:, -2:])


def test_rows_of_new_image_tokens_start_as_the_mean_of_the_others(model: LlavaLlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny-llava")
    before = model.get_input_embeddings().weight.detach().clone()
    arguments = SimpleNamespace(
        mm_use_im_patch_token=False, mm_use_im_start_end=True, tune_mm_mlp_adapter=True, pretrain_mm_mlp_adapter=None
    )
    model.initialize_vision_tokenizer(arguments, tokenizer)
    after = model.get_input_embeddings().weight
    assert len(after) == len(before) + 2
    torch.testing.assert_close(after[:-2], before)
    torch.testing.assert_close(after[-2:], before.mean(dim=0).expand(2, -1))
    assert after.requires_grad
    assert not model.get_output_embeddings().weight.requires_grad
