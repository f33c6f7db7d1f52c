"""The patch loss against a literal loop over images and regions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from patch_aligned.loss import (
    contrast_and_retrieval,
    contrastive_loss,
    cosine_table,
    patch_loss,
    region_cosines,
    region_embeddings,
)

N, S, D = 4, 9, 5


def make_batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with 3, 0, 1 and 2 regions, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    visual_tokens = torch.randn(N, S, D, generator=generator, dtype=torch.float64).to(dtype)
    region_image = torch.tensor([3, 0, 2, 0, 3, 0])
    region_tokens = torch.rand(6, S, generator=generator) < 0.4
    region_tokens[:, 4] = True
    embeddings = torch.randn(6, D, generator=generator, dtype=torch.float64).to(dtype)
    return visual_tokens, region_image, region_tokens, embeddings


def loss_by_loop(visual_tokens: Tensor, region_image: Tensor, region_tokens: Tensor, embeddings: Tensor) -> Tensor:
    losses = []
    for image in range(len(visual_tokens)):
        cosines = []
        for region in range(len(region_image)):
            if region_image[region] == image:
                covered = [token for token in range(region_tokens.shape[1]) if region_tokens[region, token]]
                v = sum(visual_tokens[image, token] for token in covered) / len(covered)
                t = embeddings[region]
                cosines.append((v @ t) / (v.norm() * t.norm()))
        if cosines:
            losses.append(1 - sum(cosines) / len(cosines))
    return sum(losses) / len(losses)


def loss_of(visual_tokens: Tensor, region_image: Tensor, region_tokens: Tensor, embeddings: Tensor) -> Tensor:
    cosines = region_cosines(region_embeddings(visual_tokens, region_image, region_tokens), embeddings)
    return patch_loss(cosines, region_image, len(visual_tokens))


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_the_loop(seed: int):
    batch = make_batch(seed)
    visual_tokens = batch[0].requires_grad_()
    (expected,) = torch.autograd.grad(loss_by_loop(*batch), visual_tokens)
    (found,) = torch.autograd.grad(loss_of(*batch), visual_tokens)
    torch.testing.assert_close(loss_of(*batch), loss_by_loop(*batch), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_gradient_is_the_numerical_one():
    visual_tokens, *rest = make_batch(0)
    assert torch.autograd.gradcheck(lambda tokens: loss_of(tokens, *rest), visual_tokens.requires_grad_())


def test_images_weigh_the_same_whatever_their_number_of_regions():
    """An image with cosines 1 and -1 (loss 1) and one with cosine 1 (loss 0)."""
    cosines = torch.tensor([1.0, -1.0, 1.0])
    assert patch_loss(cosines, torch.tensor([0, 0, 2]), images=3).item() == 0.5


@pytest.mark.parametrize("images", [0, 3])
def test_without_regions_the_loss_is_zero_and_connected(images: int):
    visual_tokens = torch.randn(images, S, D, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, S, dtype=torch.bool), torch.zeros(0, D)
    loss = loss_of(visual_tokens, *nothing)
    assert loss.item() == 0
    loss.backward()
    assert visual_tokens.grad is not None and not visual_tokens.grad.any()


def test_no_gradient_reaches_the_label_embeddings():
    visual_tokens, region_image, region_tokens, embeddings = make_batch(0)
    embeddings.requires_grad_()
    loss = loss_of(visual_tokens.requires_grad_(), region_image, region_tokens, embeddings)
    loss.backward()
    assert embeddings.grad is None


def test_bfloat16_tokens_are_computed_in_float32():
    visual_tokens, region_image, region_tokens, embeddings = make_batch(0, torch.bfloat16)
    expected = loss_by_loop(visual_tokens.double(), region_image, region_tokens, embeddings.double())
    found = loss_of(visual_tokens, region_image, region_tokens, embeddings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_autocast_does_not_lower_the_precision():
    visual_tokens, region_image, region_tokens, embeddings = make_batch(0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(visual_tokens, region_image, region_tokens, embeddings)
    assert torch.equal(found, loss_of(visual_tokens, region_image, region_tokens, embeddings))


def test_a_region_without_tokens_has_a_zero_embedding():
    visual_tokens, region_image, region_tokens, _ = make_batch(0)
    region_tokens[2] = False
    assert not region_embeddings(visual_tokens, region_image, region_tokens)[2].any()


def test_shapes_that_do_not_fit_are_named():
    visual_tokens, region_image, region_tokens, _ = make_batch(0)
    with pytest.raises(ValueError, match=r"found shape \(6, 8\), expected \[6 regions, 9 visual tokens\]"):
        region_embeddings(visual_tokens, region_image, region_tokens[:, :8])


def test_no_array_of_regions_times_tokens_times_width_is_kept_for_backward():
    regions, tokens, width = 40, 64, 128
    visual_tokens = torch.randn(2, tokens, width, requires_grad=True)
    region_tokens = torch.rand(regions, tokens) < 0.5
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(visual_tokens, torch.arange(regions) % 2, region_tokens, torch.randn(regions, width))
    assert max(kept) <= 2 * regions * tokens  # [R, N * S], not [R, S, D] nor [N, S, D]


def test_infonce_is_its_closed_form_and_leaves_synonyms_out():
    """Two images of two regions and one, three labels; labels 0 and 2 are synonyms, no negatives of each other."""
    label_cosines = torch.tensor([[0.9, 0.1, 0.7], [0.3, 0.5, 0.2], [0.6, -0.2, 0.8]], dtype=torch.float64)
    region_label, region_image, tau = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 0.5
    negatives = torch.tensor([[False, True, False], [True, False, True], [False, True, False]])
    first = math.log(1 + math.exp((0.1 - 0.9) / tau))
    second = math.log(1 + math.exp((0.3 - 0.5) / tau) + math.exp((0.2 - 0.5) / tau))
    third = math.log(1 + math.exp((-0.2 - 0.8) / tau))
    found = contrastive_loss(label_cosines, region_label, negatives, region_image, images=3, temperature=tau)
    assert found.item() == pytest.approx(((first + second) / 2 + third) / 2, rel=1e-12)


def test_infonce_of_one_label_or_of_no_region_is_zero_and_connected():
    for regions, labels in ((2, 1), (0, 0)):
        means = torch.randn(regions, D, requires_grad=True)
        table = cosine_table(means, torch.randn(labels, D))
        where = torch.zeros(regions, dtype=torch.int64)
        loss = contrastive_loss(table, where, torch.ones(labels, labels) > 0, where, images=1, temperature=0.07)
        assert loss.item() == 0
        loss.backward()
        assert means.grad is not None and not means.grad.any()


def test_infonce_s_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(0)
    means, labels = (torch.randn(count, D, generator=generator, dtype=torch.float64) for count in (4, 3))
    region_label, region_image = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 1, 1])
    negatives = ~torch.eye(3, dtype=torch.bool)
    negatives[0, 2] = False

    def loss_of_means(means: Tensor) -> Tensor:
        return contrastive_loss(cosine_table(means, labels), region_label, negatives, region_image, 2, 0.3)

    assert torch.autograd.gradcheck(loss_of_means, means.requires_grad_())


def test_contrast_and_retrieval_are_their_closed_forms():
    label_cosines = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.7]], dtype=torch.float64)
    contrast, retrieval = contrast_and_retrieval(label_cosines, torch.tensor([0, 1]))
    assert contrast.item() == pytest.approx(((0.9 - 0.3) + (0.3 - 0.45)) / 2, rel=1e-12)
    assert retrieval.item() == 0.5
    assert all(value.isnan() for value in contrast_and_retrieval(label_cosines[:, :1], torch.tensor([0, 0])))
