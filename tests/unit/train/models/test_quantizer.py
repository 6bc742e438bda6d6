"""Nearest codes, their gradients, and how dead codes come back."""

import pytest
import torch

from train.models import quantizer
from train.models.quantizer import Quantizer, counts_of, nearest, revival, usage


@pytest.fixture
def spread():
    """A quantizer of 12 codes of 3 channels, spread out."""
    quantize = Quantizer(12, 3)
    torch.nn.init.normal_(quantize.embedding.weight)
    return quantize


@pytest.mark.parametrize("at_once", [1, 100, 2**25])
def test_nearest_by_exhaustion(monkeypatch, at_once):
    monkeypatch.setattr(quantizer, "DISTANCES_AT_ONCE", at_once)
    vectors, codes = torch.randn(50, 4), torch.randn(30, 4)
    expected = (vectors[:, None].double() - codes.double()).square().sum(-1).argmin(1)
    assert torch.equal(nearest(vectors, codes), expected)


def test_near_codes_far_from_the_origin_of_the_vectors_are_told_apart():
    """The published initialisation, +-1/16384, against outputs of unit size: |v|^2 would swallow the difference."""
    codes, vectors = (torch.rand(16384, 4) * 2 - 1) / 16384, torch.randn(20, 4)
    distances = (codes.double().square().sum(1) - 2 * vectors.double() @ codes.double().T).gather
    got, best = nearest(vectors, codes), distances(1, nearest(vectors.double(), codes.double())[:, None])
    assert (distances(1, got[:, None]) - best).max() < 1e-10


def test_gradients_of_straight_through_codebook_and_commitment(spread):
    z, upstream = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    codes = spread.embedding.weight
    quantized = spread(z)
    e = codes[quantized.indices].permute(0, 3, 1, 2)
    assert torch.equal(quantized.z, e)
    assert torch.equal(torch.autograd.grad(quantized.z, z, upstream, retain_graph=True)[0], upstream)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(quantized.z.sum(), codes, retain_graph=True)
    expected = (z - e).square().mean((1, 2, 3))
    torch.testing.assert_close(quantized.codebook, expected)
    torch.testing.assert_close(quantized.commitment, expected)
    of_z, of_codes = torch.autograd.grad(quantized.commitment.sum(), (z, codes), allow_unused=True, retain_graph=True)
    assert of_codes is None
    torch.testing.assert_close(of_z, 2 * (z - e).detach() / (3 * 4 * 5))
    of_z, of_codes = torch.autograd.grad(quantized.codebook.sum(), (z, codes), allow_unused=True)
    assert of_z is None
    pulled = (e - z).detach().permute(0, 2, 3, 1).flatten(0, 2)
    summed = torch.zeros(12, 3).index_add_(0, quantized.indices.flatten(), pulled)
    torch.testing.assert_close(of_codes, 2 * summed / (3 * 4 * 5))


def test_bf16_latents_meet_fp32_distances(spread):
    z = torch.randn(2, 3, 4, 4).bfloat16()
    quantized = spread.bfloat16()(z)
    assert quantized.z.dtype == torch.bfloat16
    assert quantized.codebook.dtype == torch.float32
    codes = spread.embedding.weight
    assert torch.equal(quantized.z, codes[quantized.indices].permute(0, 3, 1, 2))
    expected = (z.permute(0, 2, 3, 1)[..., None, :].double() - codes.double()).square().sum(-1).argmin(-1)
    assert torch.equal(quantized.indices, expected)


def test_usage_and_perplexity():
    assert usage(counts_of(torch.tensor([[0, 1], [2, 3]]), 9)) == (4, pytest.approx(4))
    used, perplexity = usage(counts_of(torch.tensor([5, 5, 5, 7]), 9))
    assert used == 2
    assert float(perplexity) == pytest.approx(4 / 3**0.75)  # exp(-3/4 ln 3/4 - 1/4 ln 1/4)
    assert usage(counts_of(torch.full((6,), 8), 9)) == (1, pytest.approx(1))


def test_revival_pulls_unused_codes_only_and_to_encoder_outputs_of_their_own():
    vectors, anchors = torch.randn(400, 3) * torch.tensor([3.0, 1.0, 0.2]) + 5, torch.randn(12, 3)
    codes = torch.zeros(12, 3, requires_grad=True)
    indices = torch.tensor([2, 7]).repeat(200)
    loss = revival(vectors, codes, indices, anchors)
    gradient = torch.autograd.grad(loss, codes)[0]
    goals = vectors.mean(0) + vectors.std(0) * anchors
    targets = vectors[torch.cdist(goals, vectors).argmin(1)]
    unused = torch.ones(12, 1)
    unused[[2, 7]] = 0
    torch.testing.assert_close(gradient, -2 * targets * unused / (12 * 3))
    assert len(targets.unique(dim=0)) > 8
    torch.testing.assert_close(loss, (targets.square() * unused).sum() / (12 * 3))


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_dead_codes_come_back_and_stay(weight):
    """Of 32 codes 31 lie where no vector is: without revival for ever."""
    generator = torch.Generator().manual_seed(0)
    quantize, anchors = Quantizer(32, 2), torch.randn(32, 2, generator=generator)
    with torch.no_grad():
        quantize.embedding.weight[:] = torch.tensor([9.0, 9.0])
        quantize.embedding.weight[0] = 0.0
    optimizer = torch.optim.Adam(quantize.parameters(), lr=0.1)
    for _ in range(300):
        quantized = quantize(torch.randn(1, 2, 16, 16, generator=generator), anchors)
        optimizer.zero_grad()
        (quantized.codebook.mean() + weight * quantized.revival).backward()
        optimizer.step()
    indices = quantize(torch.randn(1, 2, 64, 64, generator=generator)).indices
    used, perplexity = usage(counts_of(indices, 32))
    assert used == (32 if weight else 1)
    assert perplexity > 20 * bool(weight)


def test_without_anchors_there_is_no_revival(spread):
    assert spread(torch.randn(1, 3, 2, 2)).revival is None
