"""Samplers against diffusers' schedulers, and against Gaussian data, where the exact answer is known."""

import itertools
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from covering import covering
from hydra.utils import instantiate
from omegaconf import OmegaConf

import train.models.torchvision_patch  # noqa: F401  (before diffusers imports torchvision)
from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from train.diffusion import samplers
from train.diffusion.parameterization import Epsilon, Flow, Velocity
from train.diffusion.process import ContinuousVP, CosineVP, DiscreteVP, RectifiedFlow, half_log_snr, time_at_noise
from train.diffusion.samplers import karras_times, trailing_times, uniform_times

ODE = {
    "euler": samplers.sample_euler,
    "ddim": samplers.sample_ddim,
    "heun": samplers.sample_heun,
    "dpmpp_2m": samplers.sample_dpmpp_2m,
    "unipc": samplers.sample_unipc,
}
PROCESSES = {
    "scaled_linear": DiscreteVP(),
    "linear": DiscreteVP(1e-4, 0.02, schedule="linear"),
    "cosine": DiscreteVP(schedule="cosine"),
    "zero_terminal_snr": DiscreteVP(zero_terminal_snr=True),
    "continuous_vp": ContinuousVP(),
    "continuous_cosine": CosineVP(),
    "rectified_flow": RectifiedFlow(),
    "shifted_flow": RectifiedFlow(3.0),
}
SPACINGS = {"uniform": uniform_times, "trailing": trailing_times, "karras": karras_times}


def never(step):
    raise AssertionError("a deterministic sampler asks for no noise")


# Against diffusers. A network of fixed random weights that depends on x and t alike.


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.Conv2d(16, 4, 3, padding=1)

    @torch.no_grad()
    def predict(x, t):
        return second(torch.tanh(first(x) + torch.as_tensor(t).float().reshape(-1, 1, 1, 1) / 500))

    return predict


def scheduler_of(name, prediction, spacing):
    """Theirs, configured as ours: nothing clipped, the last step to the data itself (`set_alpha_to_one`,
    `final_sigmas_type="zero"`, which makes multistep solvers end at first order), DDPM's posterior variance
    ("fixed_small"), DPM-Solver++ of order 2 by midpoint and UniPC of order 2 with "bh2" (their defaults).
    Our uniform_times is their "linspace", trailing_times their "trailing", karras_times their `use_karras_sigmas`."""
    import diffusers

    kind, options = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
        "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "heun": (diffusers.HeunDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
        "unipc": (diffusers.UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
    }[name]
    if spacing == "karras":
        options, spacing = {**options, "use_karras_sigmas": True}, "linspace"
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
                timestep_spacing={"uniform": "linspace"}.get(spacing, spacing), **options)  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        *[(name, spacing) for name in ("ddim", "ddpm", "euler", "dpmpp_2m", "unipc") for spacing in ("trailing",)],
        *[(name, "uniform") for name in ("euler", "heun", "dpmpp_2m", "unipc")],  # DDIM's steps miss its own linspace
        *[(name, "karras") for name in ("euler", "heun", "dpmpp_2m", "unipc")],
    ],
)
def test_against_diffusers_after_25_steps(name, spacing, prediction, network, relative_error):
    process, kind = DiscreteVP(), {"epsilon": Epsilon(), "v_prediction": Velocity()}[prediction]
    scheduler = scheduler_of(name, prediction, spacing)
    scheduler.set_timesteps(25)
    asked = dict.fromkeys(np.asarray(scheduler.timesteps).tolist())  # Heun lists its inner times twice
    if spacing == "karras":
        times = karras_times(process, 25)
    else:
        times = torch.tensor([*asked, process.start], dtype=torch.float64)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(times[:-1].numpy(), list(asked), atol=0.6)  # they look Karras' up in log sigma
    if spacing == "trailing":
        assert trailing_times(process, 25).tolist() == times.tolist()
    elif name in ("euler", "heun"):  # the others' linspace leaves 0 out, which is trailing again
        assert SPACINGS[spacing](process, 25).round().tolist() == times.round().tolist()

    def denoise(x, t):
        # Theirs sees rounded or otherwise interpolated times on Karras' spacing: both networks are asked at theirs.
        near = min(asked, key=lambda other: abs(other - float(t)))
        alpha, sigma = process.alpha(t), process.sigma(t)
        return kind.x0(x, network(x, near), alpha, sigma)

    fresh = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(100 + i)) for i in range(25)]
    function = {**ODE, "ddpm": samplers.sample_ddpm}[name]
    ours = function(denoise, process.sigma(times[0]) * start, times, process, fresh.__getitem__)
    theirs = diffusers_loop(scheduler, network, start, float(process.sigma(times[0])), fresh)
    assert relative_error(ours, theirs) < 1e-4


def diffusers_loop(scheduler, network, start, sigma, fresh):
    """Their loop from the same start: those that keep x / alpha start at init_noise_sigma, which is sigma / alpha."""
    scaled = scheduler.init_noise_sigma != 1.0
    first = float(scheduler.sigmas[0]) if hasattr(scheduler, "sigmas") else None
    x = start * first if scaled else start * sigma
    for i, t in enumerate(scheduler.timesteps):
        prediction = network(scheduler.scale_model_input(x, t), t)
        if type(scheduler).__name__ == "DDPMScheduler":
            x = ddpm_step(scheduler, prediction, t, x, fresh[i])
        else:
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


def ddpm_step(scheduler, prediction, t, x, noise):
    """Its own step, with the noise handed in in the place of its generator's."""
    from unittest import mock

    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=noise):
        return scheduler.step(prediction, t, x, return_dict=False)[0]


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_flow_against_diffusers(name, network, relative_error):
    import diffusers

    scheduler = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    }[name](shift=3.0)
    scheduler.set_timesteps(25)
    process, kind = RectifiedFlow(3.0), Flow()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = list(dict.fromkeys(scheduler.sigmas.tolist()))  # theirs ends a little before 0, then at 0
    times = torch.tensor(sigmas)

    def denoise(x, t):
        return kind.x0(x, network(x, 1000 * t), process.alpha(t), process.sigma(t))

    ours = ODE[name](denoise, x, times, process, never)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t), t, theirs, return_dict=False)[0]
    assert relative_error(ours, theirs) < 1e-4


# Against Gaussian data.


def error_of(function, process, data, steps, end, last):
    """Distance from the exact ODE map at `last`, over quantiles, in float64; times at equal distances."""
    z = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64).view(-1, 1, 1, 1)
    times = torch.linspace(end, last, steps + 1, dtype=torch.float64)
    x = function(data.denoise(process), data.noised(process, times[0], z), times, process, never)
    return float((x - data.endpoint(process, times, z)).abs().max())


@pytest.mark.parametrize(("process", "end", "last"), [(ContinuousVP(), 1.0, 0.05), (RectifiedFlow(), 0.95, 0.02)],
                         ids=["vp", "flow"])  # fmt: skip
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_order_of_convergence(name, order, process, end, last, data):
    errors = [error_of(ODE[name], process, data, steps, end, last) for steps in (40, 80, 160)]
    measured = [float(np.log2(coarse / fine)) for coarse, fine in pairwise(errors)]
    if name == "unipc":  # predictor of order 2 and corrector: order 3
        assert measured[-1] > 1.8
    else:
        assert measured[-1] == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("process", [RectifiedFlow(), CosineVP()], ids=["flow", "cosine"])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_order_from_the_end_without_signal(name, order, process, data):
    """From alpha 0, where lambda is -inf and x / alpha has a pole: a first step of its own must not cost the order."""
    errors = [error_of(ODE[name], process, data, steps, 1.0, 0.05) for steps in (80, 160, 320)]
    measured = [float(np.log2(coarse / fine)) for coarse, fine in pairwise(errors)]
    assert measured[-1] > order - 0.25


@pytest.mark.parametrize(("process", "name", "spacing"), covering(PROCESSES, ODE, SPACINGS))
def test_deterministic_samplers_reach_the_data(process, name, spacing, data, quantiles):
    """Mean and standard deviation, on every process and spacing."""
    process = PROCESSES[process]
    times = SPACINGS[spacing](process, 200)
    x = ODE[name](data.denoise(process), data.noised(process, times[0], quantiles), times, process, never)
    assert torch.isfinite(x).all()
    first_order = name in ("euler", "ddim")
    assert float(x.mean()) == pytest.approx(data.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(data.std, rel=0.04 if first_order else 0.025)


STOCHASTIC = {"ddpm": samplers.sample_ddpm, "ddim_0.5": lambda *a: samplers.sample_ddim(*a, eta=0.5)}
KINDS = ("scaled_linear", "zero_terminal_snr", "continuous_cosine", "shifted_flow")  # one of each kind of process


@pytest.mark.parametrize(
    ("process", "name"),
    [
        pytest.param(process, name, marks=() if name == "ddpm" or process in KINDS else pytest.mark.exhaustive)
        for process, name in itertools.product(PROCESSES, STOCHASTIC)
    ],
)
def test_stochastic_samplers_have_the_datas_mean_and_variance(process, name, data):
    process, count = PROCESSES[process], 20_000
    random = torch.Generator().manual_seed(0)
    shape = (count, 1, 1, 1)
    times = trailing_times(process, 1000)
    x = data.noised(process, times[0], torch.randn(shape, generator=random))
    x = STOCHASTIC[name](data.denoise(process), x, times, process, lambda i: torch.randn(shape, generator=random))
    assert float(x.mean()) == pytest.approx(data.mean, abs=5 * data.std / count**0.5 + 0.01)
    assert float(x.std()) == pytest.approx(data.std, rel=0.02)


def test_an_ancestral_step_is_the_posterior():
    """One step of DDPM from known x_t and x0: mean and variance of q(x_s | x_t, x0) (Ho et al. 2020, eq. 7)."""
    process, times = DiscreteVP(), torch.tensor([600.0, 599.0])
    x_t, x0, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    got = samplers.sample_ddpm(lambda x, t: x0, x_t, times, process, lambda i: noise)
    signal, before = process.alphas_cumprod[600], process.alphas_cumprod[599]
    beta = 1 - signal / before
    mean = before.sqrt() * beta / (1 - signal) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - signal) * x_t
    variance = (1 - before) / (1 - signal) * beta
    torch.testing.assert_close(got, (mean + variance.sqrt() * noise).float())


@pytest.mark.parametrize("steps", [2, 7, 15, 16, 20, 25, 27, 30, 32, 50, 64, 100, 250, 1000])
def test_spacings_are_diffusers(steps):
    from diffusers import DDIMScheduler

    for function, theirs in ((uniform_times, "linspace"), (trailing_times, "trailing")):
        scheduler = DDIMScheduler(timestep_spacing=theirs)
        scheduler.set_timesteps(steps)
        assert function(DiscreteVP(), steps)[:-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("process", [DiscreteVP(steps=50), RectifiedFlow()])
def test_steps_that_lead_nowhere_are_refused(spacing, process):
    with pytest.raises(UserError, match="must be at least 1"):
        SPACINGS[spacing](process, 0)
    if spacing != "karras" and isinstance(process, DiscreteVP):
        with pytest.raises(UserError, match="use at most 50"):
            SPACINGS[spacing](process, 51)
    else:
        assert (SPACINGS[spacing](process, 51).diff() < 0).all()


@pytest.mark.parametrize("path", sorted(Path(CONF, "sampler").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_configured_sampler_reaches_the_data(path, data, quantiles):
    """As it stands in conf/, with its own number of steps."""
    sampler, process = instantiate(OmegaConf.load(path)), RectifiedFlow()
    random, times = torch.Generator().manual_seed(0), sampler.times(process, sampler.steps)
    x = data.noised(process, times[0], quantiles)
    x = sampler.function(data.denoise(process), x, times, process, lambda i: torch.randn(x.shape, generator=random))
    assert float(x.mean()) == pytest.approx(data.mean, abs=0.05)
    assert float(x.std()) == pytest.approx(data.std, rel=0.12)


def test_times_are_as_published():
    process = DiscreteVP()
    # Lin et al. 2024, table 2: ten steps, trailing.
    assert trailing_times(process, 10).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    assert uniform_times(process, 4).tolist() == [999, 666, 333, 0, -1]
    assert uniform_times(RectifiedFlow(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_times(RectifiedFlow(3.0), 2).tolist() == [1.0, 0.75, 0.0]
    times = karras_times(process, 10)
    ratio = (process.sigma(times) / process.alpha(times))[:-1] ** (1 / 7)
    torch.testing.assert_close(ratio, torch.linspace(float(ratio[0]), float(ratio[-1]), 10), rtol=1e-3, atol=1e-4)
    assert float(times[0]) == pytest.approx(999, abs=1e-3)
    assert float(times[-2]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_spacing_falls_from_end_to_data(process, spacing, steps):
    process = PROCESSES[process]
    times = SPACINGS[spacing](process, steps)
    assert times.shape == (steps + 1,)
    assert (times.diff() < 0).all()
    assert float(times[-1]) == process.start
    assert float(times[0]) <= process.end
    assert float(process.sigma(times[-1])) == 0
    assert float(process.alpha(times[-1])) == 1


@pytest.mark.parametrize("process", PROCESSES)
def test_time_is_found_by_its_noise(process):
    process = PROCESSES[process]
    t = torch.linspace(process.first + 0.02, process.end * 0.98, 30, dtype=torch.float64)
    found = time_at_noise(process, process.sigma(t) / process.alpha(t))
    torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-6)
    assert (half_log_snr(process, t).diff() < 0).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_heun_is_better_than_euler_at_few_steps_on_every_process(process, data, quantiles):
    """Above all where hardly any signal is left at the end, as on the cosine table (sigma / alpha = 20,291)."""
    process = PROCESSES[process]
    times = uniform_times(process, 15)
    start, exact = data.noised(process, times[0], quantiles), data.noised(process, times[-1], quantiles)
    errors = {
        name: float((ODE[name](data.denoise(process), start, times, process, never) - exact).abs().max())
        for name in ("euler", "heun")
    }
    assert errors["heun"] < 0.5 * errors["euler"]


@pytest.mark.parametrize("process", PROCESSES)
def test_heun_at_karras_times_is_k_diffusions(process, data):
    """Its formula in x / alpha and sigma / alpha, in float64, wherever the process' end is cut at 200 (cosine ones) and
    where it is not: which of Heun's two forms is used must not hang on the rounding of the first time."""
    process, denoise = PROCESSES[process], data.denoise(PROCESSES[process])
    times = karras_times(process, 10).double()
    start = process.sigma(times[0]) * torch.linspace(-2, 2, 9, dtype=torch.float64)
    alphas, sigmas = process.alpha(times), process.sigma(times)
    x, noise = start / alphas[0], sigmas / alphas
    for i in range(10):
        slope = (x - denoise(alphas[i] * x, times[i])) / noise[i]
        ahead = x + (noise[i + 1] - noise[i]) * slope
        if noise[i + 1] > 0:
            there = (ahead - denoise(alphas[i + 1] * ahead, times[i + 1])) / noise[i + 1]
            ahead = x + (noise[i + 1] - noise[i]) * (slope + there) / 2
        x = ahead
    torch.testing.assert_close(samplers.sample_heun(denoise, start, times, process, never), x, rtol=1e-6, atol=1e-6)
