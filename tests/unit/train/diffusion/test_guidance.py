"""Classifier-free guidance: both of its written forms, at every parameterization, at the price of one pass."""

import pytest
import torch

from train.diffusion.denoiser import NetworkDenoiser
from train.diffusion.guidance import ClassifierFreeGuidance
from train.diffusion.parameterization import Epsilon, Flow, Velocity
from train.diffusion.process import DiscreteVP, RectifiedFlow
from train.models.conditioning import Conditioning


@pytest.fixture
def conditioning():
    return Conditioning(torch.randn(3, 5, 4), None, torch.randn(5, 4), None)


@pytest.fixture
def network():
    """A network that reads its conditioning, and the sizes of the batches that it was run on."""
    sizes = []

    def run(x, t, conditioning):
        sizes.append(len(x))
        return torch.sin(x + conditioning.context.mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)

    run.sizes = sizes
    return run


PAIRS = pytest.mark.parametrize(
    ("process", "parameterization"),
    [(RectifiedFlow(), Flow()), (DiscreteVP(), Velocity()), (DiscreteVP(), Epsilon())],
    ids=["flow", "velocity", "epsilon"],
)


@PAIRS
@pytest.mark.parametrize("w", [-1.0, -0.5, 2.0, 6.5])
def test_guided_by_both_formulas(process, parameterization, conditioning, network, w):
    x, t = torch.randn(3, 2, 4, 4), process.at(torch.tensor(0.6))
    denoiser, s = NetworkDenoiser(network, process, parameterization), 1 + w
    c = denoiser(x, t, conditioning)
    u = denoiser(x, t, conditioning.dropped(torch.ones(3, dtype=torch.bool)))
    guided = ClassifierFreeGuidance(denoiser, s)(x, t, conditioning)
    torch.testing.assert_close(guided, (1 + w) * c - w * u, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided, u + s * (c - u), rtol=1e-4, atol=1e-4)
    assert network.sizes == [3, 3, 6]  # guided: one pass over both halves

    # Guiding what the network predicts, as most write it, is guiding x0.
    times, alpha, sigma = t.expand(3), process.alpha(t), process.sigma(t)
    predicted_c = network(x, process.network_time(times), conditioning)
    predicted_u = network(x, process.network_time(times), conditioning.dropped(torch.ones(3, dtype=torch.bool)))
    mixed = s * predicted_c + (1 - s) * predicted_u
    torch.testing.assert_close(guided, parameterization.x0(x, mixed, alpha, sigma), rtol=1e-3, atol=1e-3)


@PAIRS
def test_scale_1_is_unguided_bit_for_bit_and_runs_once(process, parameterization, conditioning, network):
    x, t = torch.randn(3, 2, 4, 4), process.at(torch.tensor(0.6))
    denoiser = NetworkDenoiser(network, process, parameterization)
    unguided = denoiser(x, t, conditioning)
    assert torch.equal(ClassifierFreeGuidance(denoiser, 1.0)(x, t, conditioning), unguided)
    assert network.sizes == [3, 3]


def test_guidance_moves_away_from_the_null(conditioning, network):
    x, t = torch.randn(3, 2, 4, 4), torch.tensor(600.0)
    denoiser = NetworkDenoiser(network, DiscreteVP(), Velocity())
    null = conditioning.dropped(torch.ones(3, dtype=torch.bool))
    results = [ClassifierFreeGuidance(denoiser, s)(x, t, conditioning) for s in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(results[0], denoiser(x, t, null))
    away = [float((result - results[0]).norm()) for result in results]
    assert away[2] == pytest.approx(3 * away[1], rel=1e-4)
