"""Errors and weightings against their published forms."""

import pytest
import torch
from torch.nn import functional as F

from train.diffusion.losses import L1, L2, Huber, MinSnr, TruncatedSnr, Uniform
from train.diffusion.parameterization import Epsilon, Flow, Sample, Velocity
from train.diffusion.process import CosineVP, DiscreteVP, RectifiedFlow

T = torch.tensor([0.0, 1.0, 100.0, 400.0, 800.0, 999.0])


def test_errors():
    a, b = torch.randn(100) * 3, torch.randn(100)
    torch.testing.assert_close(L2()(a, b).mean(), F.mse_loss(a, b))
    torch.testing.assert_close(L1()(a, b).mean(), F.l1_loss(a, b))
    small = (a - b).abs() < 0.5
    huber = Huber(0.5)(a, b)
    torch.testing.assert_close(huber[small], 0.5 * (a - b)[small] ** 2)
    torch.testing.assert_close(huber[~small], 0.5 * ((a - b)[~small].abs() - 0.25))


def snr_of(process, t):
    return (process.alpha(t) / process.sigma(t)) ** 2


def test_uniform_is_one_for_each_prediction():
    process = DiscreteVP()
    for kind in (Epsilon(), Velocity(), Sample()):
        assert torch.equal(Uniform()(process.alpha(T), process.sigma(T), kind), torch.ones(6))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize(
    ("kind", "divisor"), [(Epsilon(), lambda s: s), (Velocity(), lambda s: s + 1), (Sample(), torch.ones_like)]
)
def test_min_snr(kind, divisor, gamma):
    """Hang et al. 2023, sec. 3.4: min(SNR, gamma) for x0, over SNR for eps, over SNR + 1 for v."""
    process = DiscreteVP()
    snr = snr_of(process, T)
    got = MinSnr(gamma)(process.alpha(T), process.sigma(T), kind)
    torch.testing.assert_close(got, snr.clamp(max=gamma) / divisor(snr), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "divisor"), [(Epsilon(), lambda s: s), (Velocity(), lambda s: s + 1), (Sample(), torch.ones_like)]
)
def test_truncated_snr(kind, divisor):
    process = DiscreteVP()
    snr = snr_of(process, T)
    expected = snr.clamp(min=1) / divisor(snr)
    got = TruncatedSnr()(process.alpha(T), process.sigma(T), kind)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    got = TruncatedSnr(100.0)(process.alpha(T), process.sigma(T), kind)
    torch.testing.assert_close(got, expected.clamp(max=100.0), rtol=1e-4, atol=1e-6)


def test_a_weighting_of_flow_is_that_of_the_x0_it_stands_for():
    process, t = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(
        MinSnr()(process.alpha(t), process.sigma(t), Flow()), snr_of(process, t).clamp(max=5) * t**2
    )


def test_weights_at_the_ends_are_what_they_tend_to():
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])  # noise, data
    for kind, at_ends in ((Epsilon(), [1.0, 0.0]), (Velocity(), [0.0, 0.0]), (Sample(), [0.0, 5.0])):
        torch.testing.assert_close(MinSnr()(alpha, sigma, kind), torch.tensor(at_ends), rtol=0, atol=1e-6)
    for kind, at_ends in ((Epsilon(), [1e4, 1.0]), (Velocity(), [1.0, 1.0]), (Sample(), [1.0, 1e4])):
        torch.testing.assert_close(TruncatedSnr()(alpha, sigma, kind), torch.tensor(at_ends))


@pytest.mark.parametrize("weighting", [Uniform(), MinSnr(), TruncatedSnr()])
@pytest.mark.parametrize(
    ("process", "kind"),
    [(CosineVP(), Velocity()), (CosineVP(), Sample()), (RectifiedFlow(), Flow()), (RectifiedFlow(), Sample()),
     (DiscreteVP(zero_terminal_snr=True), Velocity()), (DiscreteVP(), Epsilon())],
)  # fmt: skip
def test_weights_are_finite_from_end_to_end(weighting, process, kind):
    t = torch.linspace(process.start, process.end, 101)
    weights = weighting(process.alpha(t), process.sigma(t), kind)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert float(weights.max()) > 0
