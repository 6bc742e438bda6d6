"""Processes, parameterizations and how times are drawn."""

import pytest
import torch

from data_pipeline.errors import UserError
from train.diffusion.parameterization import Epsilon, Flow, Velocity
from train.diffusion.process import DiscreteVP, RectifiedFlow, add_noise
from train.diffusion.time_sampling import LogitNormal, evenly_spaced, uniform
from train.objectives.latent_diffusion import refuse_unfit

FITTING = [
    (RectifiedFlow, Flow),
    (DiscreteVP, Epsilon),
    (DiscreteVP, Velocity),
    (lambda: DiscreteVP(1e-4, 0.02, schedule="linear"), Velocity),
]


@pytest.mark.parametrize(("process", "parameterization"), FITTING)
def test_the_target_stands_for_x0(process, parameterization):
    process, parameterization = process(), parameterization()
    t = process.at(torch.linspace(0.001, 0.999, 64))
    x0, noise = torch.randn(64, 4, 3, 3), torch.randn(64, 4, 3, 3)
    x_t = add_noise(process, x0, noise, t)
    alpha, sigma = process.alpha(t).view(-1, 1, 1, 1), process.sigma(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
    target = parameterization.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(parameterization.x0(x_t, target, alpha, sigma), x0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_the_table_is_diffusers(schedule):
    from diffusers import DDIMScheduler

    process = DiscreteVP(0.00085, 0.012, 1000, schedule)
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule).alphas_cumprod
    t = torch.arange(1000.0)
    torch.testing.assert_close(process.alpha(t) ** 2, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones(1000))
    assert torch.equal(process.network_time(t), t)


def test_the_default_is_stable_diffusions():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(DiscreteVP().alphas_cumprod, theirs, rtol=1e-5, atol=1e-7)


def test_between_timesteps_the_table_is_interpolated():
    process = DiscreteVP()
    middle = process.alpha(torch.tensor([10.25])) ** 2
    torch.testing.assert_close(middle, 0.75 * process.alphas_cumprod[10:11] + 0.25 * process.alphas_cumprod[11:12])


def test_velocity_is_the_derivative_by_the_angle():
    process = DiscreteVP()
    t = torch.arange(1000.0)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x0, noise = torch.randn(1000), torch.randn(1000)
    angle = torch.atan2(sigma.double(), alpha.double())  # x_t = cos(angle) x0 + sin(angle) noise
    derivative = (
        (angle + 1e-6).cos() * x0
        + (angle + 1e-6).sin() * noise
        - (angle - 1e-6).cos() * x0
        - (angle - 1e-6).sin() * noise
    ) / 2e-6
    torch.testing.assert_close(Velocity().target(x0, noise, alpha, sigma).double(), derivative, rtol=1e-4, atol=1e-4)


def test_flow_is_the_derivative_by_time():
    process, t = RectifiedFlow(), torch.tensor([0.25, 0.5], dtype=torch.float64)
    x0, noise = torch.randn(2, 4, 2, 2).double(), torch.randn(2, 4, 2, 2).double()
    slope = (add_noise(process, x0, noise, t + 1e-3) - add_noise(process, x0, noise, t - 1e-3)) / 2e-3
    torch.testing.assert_close(Flow().target(x0, noise, process.alpha(t), process.sigma(t)), slope)
    assert torch.equal(process.network_time(t), 1000 * t)


def test_processes_go_from_data_to_noise():
    for process, left in ((RectifiedFlow(), 0.0), (DiscreteVP(), 0.0692)):
        ends = torch.tensor([process.start, process.end])
        torch.testing.assert_close(process.alpha(ends), torch.tensor([1.0, left]), rtol=0, atol=2e-3)
        fractions = torch.linspace(0, 1, 200)
        assert (process.alpha(process.at(fractions)).diff() <= 0).all()
        assert (process.sigma(process.at(fractions)).diff() >= 0).all()


def test_discrete_times_are_whole_and_equally_likely():
    times = DiscreteVP(steps=10).at((torch.arange(1000) + 0.5) / 1000)
    assert torch.equal(
        times.bincount() if times.dtype == torch.long else times.long().bincount(), torch.full((10,), 100)
    )
    assert torch.equal(DiscreteVP().at(torch.tensor([0.0, 0.9999999, 1.0])), torch.tensor([0.0, 999.0, 999.0]))


@pytest.mark.parametrize(
    ("process", "parameterization"),
    [(RectifiedFlow, Velocity), (DiscreteVP, Flow), (RectifiedFlow, Epsilon)],
)
def test_a_pair_that_does_not_fit_is_refused(process, parameterization):
    with pytest.raises(UserError, match=r"does not belong to .*: use parameterization="):
        refuse_unfit(process(), parameterization())


@pytest.mark.parametrize(("process", "parameterization"), FITTING)
def test_a_pair_that_fits_is_taken(process, parameterization):
    refuse_unfit(process(), parameterization())


def test_time_sampling():
    u = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.equal(uniform(u), u)
    t = LogitNormal(0.5, 0.8)(u)
    normal = torch.distributions.Normal(0.5, 0.8)
    torch.testing.assert_close(torch.logit(t.double()).mean().item(), 0.5, rtol=0, atol=1e-3)
    torch.testing.assert_close(normal.cdf(torch.logit(t)), u, rtol=0, atol=1e-4)
    assert torch.isfinite(LogitNormal()(torch.tensor([0.0, 1.0 - 2**-24]))).all()
    torch.testing.assert_close(evenly_spaced(4), torch.tensor([0.125, 0.375, 0.625, 0.875]))
