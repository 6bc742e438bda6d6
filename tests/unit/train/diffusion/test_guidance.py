"""Classifier-free guidance: both of its written forms, at every parameterization, at the price of one pass."""

import itertools

import pytest
import torch

from train.diffusion.denoiser import NetworkDenoiser
from train.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from train.diffusion.parameterization import Epsilon, Flow, Sample, Velocity
from train.diffusion.process import DiscreteVP, RectifiedFlow
from train.models.conditioning import Conditioning, Parts


@pytest.fixture
def conditioning():
    return Conditioning(Parts(torch.randn(3, 5, 4)), Parts(torch.randn(1, 5, 4)))


@pytest.fixture
def network():
    """A network that reads its conditioning, and the sizes of the batches that it was run on."""
    sizes = []

    def run(x, t, conditioning):
        sizes.append(len(x))
        return torch.sin(x + conditioning.given.context.mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)

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


def test_rescale_moves_the_spread_to_the_conditionals(conditioning, network):
    x, t = torch.randn(3, 2, 4, 4), torch.tensor(600.0)
    denoiser = NetworkDenoiser(network, DiscreteVP(), Velocity())
    conditional = denoiser(x, t, conditioning)
    plain = ClassifierFreeGuidance(denoiser, 5.0)(x, t, conditioning)
    whole = ClassifierFreeGuidance(denoiser, 5.0, rescale=1.0)(x, t, conditioning)
    torch.testing.assert_close(whole.std((1, 2, 3)), conditional.std((1, 2, 3)))
    ratio = (conditional.std((1, 2, 3)) / plain.std((1, 2, 3))).view(-1, 1, 1, 1)
    torch.testing.assert_close(whole, plain * ratio)
    half = ClassifierFreeGuidance(denoiser, 5.0, rescale=0.25)(x, t, conditioning)
    torch.testing.assert_close(half, 0.25 * whole + 0.75 * plain)


def gaussian_denoiser(process):
    """Exact for pixels from N(concat, vector^2)."""

    def denoise(x, t, conditioning):
        mean, variance = conditioning.given.concat, conditioning.given.vector.view(-1, 1, 1, 1) ** 2
        alpha, sigma = process.alpha(t), process.sigma(t)
        return mean + variance * alpha / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    return denoise


@pytest.mark.parametrize(
    ("process", "parameterization", "least", "most"),
    [
        (DiscreteVP(), Sample(), 0.0, 0.0),
        (DiscreteVP(), Epsilon(), 0.20, 0.57),
        (DiscreteVP(), Velocity(), 0.03, 0.46),
        (RectifiedFlow(), Flow(), 0.01, 0.41),
    ],
    ids=["sample", "epsilon", "velocity", "flow"],
)
def test_how_far_rescaling_x0_is_from_rescaling_the_prediction(process, parameterization, least, most):
    """Lin et al. 2024, eq. 15-16, written out on the prediction; the figures are those of docs/maths.md."""
    means, gaps = torch.randn(8, 4, 16, 16) * 0.75**0.5, []
    given = Parts(vector=torch.full((8, 1), 0.5), concat=means)
    conditioning = Conditioning(given, Parts(vector=torch.ones(1, 1), concat=torch.zeros(1, 4, 16, 16)))
    denoise, phi = gaussian_denoiser(process), 0.7
    for scale, fraction in itertools.product((3.0, 7.5), (0.1, 0.3, 0.5, 0.7, 0.9)):
        t = process.at(torch.tensor(fraction))
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = alpha * (means + 0.5 * torch.randn_like(means)) + sigma * torch.randn_like(means)
        ours = ClassifierFreeGuidance(denoise, scale, rescale=phi)(x, t, conditioning)
        conditional, guided = (
            parameterization.target(x0, (x - alpha * x0) / sigma, alpha, sigma)
            for x0 in (ClassifierFreeGuidance(denoise, s)(x, t, conditioning) for s in (1.0, scale))
        )
        matched = guided * (conditional.std((1, 2, 3)) / guided.std((1, 2, 3))).view(-1, 1, 1, 1)
        theirs = parameterization.x0(x, phi * matched + (1 - phi) * guided, alpha, sigma)
        gaps.append(float((ours - theirs).norm() / theirs.norm()))
    assert min(gaps) == pytest.approx(least, abs=0.01)
    assert max(gaps) == pytest.approx(most, abs=0.02)


@pytest.mark.parametrize("process", [DiscreteVP(), RectifiedFlow()])
def test_guidance_acts_within_its_interval_only(process, conditioning, network):
    x, denoiser = torch.randn(3, 2, 4, 4), NetworkDenoiser(network, process, Velocity())
    guided = ClassifierFreeGuidance(denoiser, 4.0, interval=(0.2, 0.7), process=process)
    everywhere = ClassifierFreeGuidance(denoiser, 4.0)
    for fraction, acts in ((0.1, False), (0.3, True), (0.65, True), (0.9, False)):
        t = process.at(torch.tensor(fraction))
        network.sizes.clear()
        got = guided(x, t, conditioning)
        assert network.sizes == [6 if acts else 3]
        assert torch.equal(got, (everywhere if acts else denoiser)(x, t, conditioning))


@pytest.mark.parametrize("process", [DiscreteVP(), RectifiedFlow()])
def test_classifier_guidance_is_the_posterior_given_the_class(process, data):
    """x0 ~ N(m, s^2) and y = x0 + N(0, r^2): guided at scale 1, the denoiser of x0 is that of x0 given y."""
    r, y, t = 0.4, 1.3, process.at(torch.tensor(0.4)).double()
    alpha, sigma, x = process.alpha(t), process.sigma(t), torch.linspace(-1, 2, 20).double().view(-1, 1, 1, 1)
    precision = 1 / data.std**2 + (alpha / sigma) ** 2  # of x0 given x_t
    denoise = data.denoise(process)

    def log_prob(x, times):  # y given x_t is Gaussian around E[x0 | x_t]
        mean = denoise(x, times.view(-1, 1, 1, 1)).flatten()
        return -0.5 * (y - mean) ** 2 / (r**2 + 1 / precision)

    guided = ClassifierGuidance(lambda x, t, c: denoise(x, t), log_prob, 1.0, process)
    with torch.no_grad():
        got = guided(x, t, None)
    both = (data.mean / data.std**2 + alpha / sigma**2 * x + y / r**2) / (precision + 1 / r**2)
    torch.testing.assert_close(got, both)


def test_an_interval_needs_its_process(network):
    with pytest.raises(AssertionError, match="an interval needs a process"):
        ClassifierFreeGuidance(network, 4.0, interval=(0.2, 0.7))


def test_guidances_stack(conditioning, network):
    """A classifier beside the null: what each adds to x0 adds up."""
    process, x, t = DiscreteVP(), torch.randn(3, 2, 4, 4), torch.tensor(600.0)
    denoiser = NetworkDenoiser(network, process, Velocity())
    free = ClassifierFreeGuidance(denoiser, 3.0)

    def log_prob(x, times):
        return -0.5 * x.square().sum((1, 2, 3))

    alone = ClassifierGuidance(denoiser, log_prob, 2.0, process)(x, t, conditioning) - denoiser(x, t, conditioning)
    both = ClassifierGuidance(free, log_prob, 2.0, process)(x, t, conditioning)
    torch.testing.assert_close(both, free(x, t, conditioning) + alone)
    torch.testing.assert_close(alone, -2.0 * process.sigma(t) ** 2 / process.alpha(t) * x)


def test_classifier_guidance_where_there_is_no_signal_or_no_scale(data):
    def unasked(x, t):
        raise AssertionError("the classifier is not run")

    process, x = RectifiedFlow(), torch.randn(3, 1, 2, 2)
    denoise = data.denoise(process)
    for scale, t in ((1.0, 1.0), (0.0, 0.5)):
        guided = ClassifierGuidance(lambda x, t, c: denoise(x, t), unasked, scale, process)
        assert torch.equal(guided(x, torch.tensor(t), None), denoise(x, torch.tensor(t)))


def test_where_nothing_is_given_nothing_is_evaluated_twice(network):
    calls = []

    def denoise(x, t, conditioning):
        calls.append(len(x))
        return x

    ClassifierFreeGuidance(denoise, 5.0)(torch.randn(3, 2, 4, 4), torch.tensor(0.5), Conditioning(Parts(), Parts()))
    assert calls == [3]
