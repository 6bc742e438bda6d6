"""Samplers arrive where the closed form does, as fast as their order says, and step as diffusers' DDIM."""

import math
from itertools import pairwise

import pytest
import torch

from train.diffusion.denoiser import NetworkDenoiser
from train.diffusion.parameterization import Epsilon, Flow, Velocity
from train.diffusion.process import DiscreteVP, RectifiedFlow, like
from train.diffusion.samplers import sample_ddim, sample_euler, uniform_times

SAMPLERS = pytest.mark.parametrize("sample", [sample_euler, sample_ddim])
PROCESSES = pytest.mark.parametrize("process", [RectifiedFlow(), DiscreteVP()], ids=["flow", "vp"])


def no_noise(step):
    raise AssertionError("a deterministic sampler draws nothing")


def test_times_fall_from_end_to_start():
    assert uniform_times(RectifiedFlow(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_times(DiscreteVP(), 3).tolist() == [999.0, 666.0, 333.0, 0.0]


@SAMPLERS
@PROCESSES
def test_the_error_of_the_endpoint_shrinks_linearly(sample, process, data, quantiles):
    steps, errors = (32, 64, 128, 256), []
    for count in steps:
        times = uniform_times(process, count)
        x = sample(data.denoise(process), data.noised(process, times[0], quantiles), times, process, no_noise)
        errors.append(float((x - data.endpoint(process, times, quantiles)).square().mean().sqrt()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.8 < order < 1.3 for order in orders), (errors, orders)
    assert errors[-1] < 0.01


@SAMPLERS
@PROCESSES
def test_mean_and_spread_of_what_is_drawn(sample, process, data, quantiles):
    times = uniform_times(process, 400)
    x = sample(data.denoise(process), process.sigma(times[0]) * quantiles, times, process, no_noise)
    # From pure noise, as in use. The VP process still holds 7 % of the data at its end, which this start leaves out.
    missing = process.alpha(times[0]) * data.mean * data.std / data.scale(process, times[0])
    assert float(x.mean()) == pytest.approx(data.mean - float(missing), abs=5e-3)
    assert float(x.std()) == pytest.approx(data.std, rel=0.02)


@PROCESSES
def test_ancestral_ddim_draws_the_data_too(process, data):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(20_000, 1, 1, 1, generator=generator)
    drawn = []

    def noise(step):
        drawn.append(step)
        return torch.randn(z.shape, generator=generator)

    times = uniform_times(process, 500)
    x = sample_ddim(data.denoise(process), data.noised(process, times[0], z), times, process, noise, eta=1.0)
    assert float(x.mean()) == pytest.approx(data.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(data.std, rel=0.03)
    assert drawn == list(range(500))


@PROCESSES
def test_euler_is_ddim_without_noise(process):
    def denoise(x, t):
        return torch.tanh(1.3 * x.roll(1, -1) - 0.2 * process.sigma(t))

    x, times = torch.randn(2, 3, 4, 4), uniform_times(process, 20)
    euler = sample_euler(denoise, x, times, process, no_noise)
    torch.testing.assert_close(euler, sample_ddim(denoise, x, times, process, no_noise), rtol=1e-4, atol=1e-5)


@SAMPLERS
def test_steps_are_reported(sample, data):
    process, seen = RectifiedFlow(), []
    sample(
        data.denoise(process),
        torch.randn(1, 1, 2, 2),
        uniform_times(process, 5),
        process,
        no_noise,
        on_step=seen.append,
    )
    assert seen == [0, 1, 2, 3, 4]


def nonlinear_network(x, t, conditioning=None):
    """Fixed, smooth, and dependent on place, time and neighbours."""
    time = like(t / 1000, x)
    return torch.sin(2 * x) + 0.5 * torch.tanh(x.roll(1, -1) * x.roll(1, -2)) * (1 - time) + 0.3 * time


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    ("parameterization", "prediction_type"), [(Epsilon(), "epsilon"), (Velocity(), "v_prediction")]
)
def test_ddim_is_diffusers(parameterization, prediction_type, eta, relative_error):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    start = torch.randn(2, 4, 8, 8)
    noises = torch.randn(20, 2, 4, 8, 8)
    theirs = start
    for i, t in enumerate(scheduler.timesteps):
        prediction = nonlinear_network(theirs, t.float().expand(2))
        theirs = scheduler.step(prediction, t, theirs, eta=eta, variance_noise=noises[i]).prev_sample

    process = DiscreteVP()
    denoiser = NetworkDenoiser(nonlinear_network, process, parameterization)
    ours = sample_ddim(
        lambda x, t: denoiser(x, t, None), start, scheduler.timesteps.float(), process, lambda i: noises[i], eta=eta
    )
    assert relative_error(ours, theirs) < 1e-4


def test_euler_is_diffusers_on_rectified_flow(relative_error):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, process, start = FlowMatchEulerDiscreteScheduler(), RectifiedFlow(), torch.randn(2, 4, 8, 8)
    times = uniform_times(process, 16)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    theirs = start
    for t in scheduler.timesteps:
        theirs = scheduler.step(nonlinear_network(theirs, t.expand(2)), t, theirs).prev_sample
    denoiser = NetworkDenoiser(nonlinear_network, process, Flow())
    ours = sample_euler(lambda x, t: denoiser(x, t, None), start, times, process, no_noise)
    assert relative_error(ours, theirs) < 1e-4


@SAMPLERS
@pytest.mark.parametrize(
    ("process", "parameterization"),
    [(RectifiedFlow(), Flow()), (DiscreteVP(), Velocity()), (DiscreteVP(), Epsilon())],
    ids=["flow", "velocity", "epsilon"],
)
def test_every_parameterization_samples(sample, process, parameterization, data, quantiles):
    """A network that predicts the best target possible leads every sampler to the data."""
    per_time = process.network_time(torch.tensor(process.end)) / process.end

    def network(x, network_time, conditioning):
        t = like(network_time / per_time, x)
        x0 = data.denoise(process)(x, t)
        noise = (x - process.alpha(t) * x0) / process.sigma(t)
        return parameterization.target(x0, noise, process.alpha(t), process.sigma(t))

    denoiser, times = NetworkDenoiser(network, process, parameterization), uniform_times(process, 200)
    x = sample(lambda x, t: denoiser(x, t, None), data.noised(process, times[0], quantiles), times, process, no_noise)
    error = (x - data.endpoint(process, times, quantiles)).square().mean().sqrt()
    assert float(error) < 0.01
