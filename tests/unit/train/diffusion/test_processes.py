"""Processes, parameterizations and how times are drawn."""

import pytest
import torch

from data_pipeline.common.errors import UserError
from train.diffusion.parameterization import Epsilon, Flow, Sample, Velocity, converted
from train.diffusion.process import ContinuousVP, CosineVP, DiscreteVP, RectifiedFlow, add_noise, betas_of
from train.diffusion.time_sampling import LogitNormal, evenly_spaced, stratified, uniform
from train.objectives.latent_diffusion import refuse_unfit

FITTING = [
    (RectifiedFlow, Flow),
    (DiscreteVP, Epsilon),
    (DiscreteVP, Velocity),
    (lambda: DiscreteVP(1e-4, 0.02, schedule="linear"), Velocity),
    (lambda: DiscreteVP(schedule="cosine"), Velocity),
    (lambda: DiscreteVP(zero_terminal_snr=True), Velocity),
    (lambda: DiscreteVP(zero_terminal_snr=True), Sample),
    (ContinuousVP, Epsilon),
    (CosineVP, Velocity),
    (RectifiedFlow, Sample),
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


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine"])
def test_the_table_is_diffusers(schedule, zero_terminal_snr):
    from diffusers import DDPMScheduler

    process = DiscreteVP(0.00085, 0.012, 1000, schedule, zero_terminal_snr)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_terminal_snr,
        beta_schedule={"cosine": "squaredcos_cap_v2"}.get(schedule, schedule),
    )  # fmt: skip
    theirs = scheduler.alphas_cumprod
    if zero_terminal_snr:
        assert float(process.alpha(torch.tensor(999.0))) == 0
    else:
        betas = betas_of(schedule, 0.00085, 0.012, 1000).float()
        torch.testing.assert_close(betas, scheduler.betas, rtol=1e-5, atol=1e-8)
    t = torch.arange(1000.0)
    torch.testing.assert_close(process.alpha(t) ** 2, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones(1000))
    assert torch.equal(process.network_time(t), t)


def test_the_default_is_stable_diffusions():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(DiscreteVP().alphas_cumprod.float(), theirs, rtol=1e-5, atol=1e-7)


def test_between_timesteps_the_table_is_interpolated():
    process = DiscreteVP()
    middle = process.alpha(torch.tensor([10.25])) ** 2
    expected = 0.75 * process.alphas_cumprod[10:11] + 0.25 * process.alphas_cumprod[11:12]
    torch.testing.assert_close(middle, expected.float())


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
    ends_with = {RectifiedFlow(): 0.0, RectifiedFlow(3.0): 0.0, DiscreteVP(): 0.0683, CosineVP(): 0.0}
    for process, left in {**ends_with, ContinuousVP(): 0.00657, DiscreteVP(zero_terminal_snr=True): 0.0}.items():
        ends = torch.tensor([process.start, process.end])
        torch.testing.assert_close(process.alpha(ends), torch.tensor([1.0, left]), rtol=0, atol=1e-4)
        assert float(process.sigma(ends)[0]) == 0
        fractions = torch.linspace(0, 1, 200)
        assert (process.alpha(process.at(fractions)).diff() <= 0).all()
        assert (process.sigma(process.at(fractions)).diff() >= 0).all()


def test_discrete_times_are_whole_and_equally_likely():
    times = DiscreteVP(steps=10).at((torch.arange(1000) + 0.5) / 1000)
    assert torch.equal(times.long().bincount(), torch.full((10,), 100))
    assert torch.equal(DiscreteVP().at(torch.tensor([0.0, 0.9999999, 1.0])), torch.tensor([0.0, 999.0, 999.0]))


@pytest.mark.parametrize(
    ("process", "parameterization"),
    [
        (RectifiedFlow, Velocity), (DiscreteVP, Flow), (RectifiedFlow, Epsilon), (CosineVP, Epsilon), (CosineVP, Flow),
        (lambda: DiscreteVP(zero_terminal_snr=True), Epsilon),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit_is_refused(process, parameterization):
    with pytest.raises(UserError, match=r"can't be used with .*: use parameterization="):
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


def test_stratified_times_use_each_part_once_and_are_uniform():
    u, strata = torch.rand(1000), torch.randperm(1000)
    times = stratified(u, strata, 1000)
    assert torch.equal((times * 1000).floor().long().sort().values, torch.arange(1000))
    assert torch.equal((times * 1000).floor().long(), strata)
    torch.testing.assert_close(times * 1000 - strata, u, rtol=0, atol=1e-3)


def test_the_shift_is_esser_et_als():
    u = torch.linspace(0, 1, 11)
    torch.testing.assert_close(RectifiedFlow(3.0).at(u), 3 * u / (1 + 2 * u))
    assert torch.equal(RectifiedFlow().at(u), u)


def test_the_continuous_process_is_the_limit_of_ddpms():
    """beta(t) from 0.1 to 20 over [0, 1] is DDPM's 1e-4 to 0.02 over 1,000 steps (Song et al. 2021, app. C)."""
    t = torch.linspace(0.05, 1, 50)
    ddpm = DiscreteVP(1e-4, 0.02, schedule="linear").alpha(1000 * t - 1)
    torch.testing.assert_close(ContinuousVP().alpha(t).log(), ddpm.log(), rtol=0.02, atol=0)


def test_a_shift_to_nowhere_gets_a_sentence():
    with pytest.raises(UserError, match="use 1 for no shift"):
        RectifiedFlow(0.0)


def test_an_unknown_schedule_gets_a_sentence():
    with pytest.raises(UserError, match="use one of linear, scaled_linear, cosine"):
        DiscreteVP(schedule="sigmoid")


KINDS = {"epsilon": Epsilon(), "velocity": Velocity(), "sample": Sample()}


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_every_kind_converts_to_every_other_and_back(source, to):
    process, t = DiscreteVP(), torch.tensor([50.0, 400.0, 990.0], dtype=torch.float64)
    alpha, sigma = process.alpha(t).view(-1, 1), process.sigma(t).view(-1, 1)
    x0, noise = torch.randn(3, 9).double(), torch.randn(3, 9).double()
    x_t = alpha * x0 + sigma * noise
    given, wanted = (KINDS[kind].target(x0, noise, alpha, sigma) for kind in (source, to))
    torch.testing.assert_close(converted(given, x_t, KINDS[source], KINDS[to], alpha, sigma), wanted)
    wrong = given + torch.randn_like(given)  # a network's prediction is not the target
    there = converted(wrong, x_t, KINDS[source], KINDS[to], alpha, sigma)
    torch.testing.assert_close(converted(there, x_t, KINDS[to], KINDS[source], alpha, sigma), wrong)


def test_flow_converts_to_the_noise_and_back():
    process, t = RectifiedFlow(), torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    x0, noise = torch.randn(3, 9).double(), torch.randn(3, 9).double()
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_t = alpha * x0 + sigma * noise
    torch.testing.assert_close(converted(noise - x0, x_t, Flow(), Epsilon(), alpha, sigma), noise)
    torch.testing.assert_close(converted(noise, x_t, Epsilon(), Flow(), alpha, sigma), noise - x0)


@pytest.mark.parametrize(
    ("process", "kind"),
    [(CosineVP(), Epsilon()), (CosineVP(), Velocity()), (CosineVP(), Sample()), (RectifiedFlow(), Flow())],
)
def test_a_prediction_stands_for_x0_and_the_noise_and_comes_from_x0(process, kind):
    t = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x0, noise = torch.randn(3, 9).double(), torch.randn(3, 9).double()
    x_t = alpha * x0 + sigma * noise
    target = kind.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(kind.x0(x_t, target, alpha, sigma), x0)
    torch.testing.assert_close(kind.epsilon(x_t, target, alpha, sigma), noise)
    torch.testing.assert_close(kind.from_x0(x_t, x0, alpha, sigma), target)


@pytest.mark.parametrize(("process", "kind"), [(CosineVP(), Velocity()), (RectifiedFlow(), Flow())])
def test_velocity_and_flow_convert_at_both_ends(process, kind):
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    x0, noise = torch.randn(2, 9).double(), torch.randn(2, 9).double()
    x_t, target = alpha * x0 + sigma * noise, kind.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(converted(target, x_t, kind, Epsilon(), alpha, sigma), noise)
    torch.testing.assert_close(converted(target, x_t, kind, Sample(), alpha, sigma), x0)


@pytest.mark.parametrize(
    ("source", "process", "t"),
    [(Sample(), CosineVP(), 0.0), (Epsilon(), CosineVP(), 1.0), (Flow(), CosineVP(), 0.5)],
)
def test_what_a_prediction_does_not_say_is_not_converted(source, process, t):
    t, x = torch.tensor([t, 0.4]).view(2, 1), torch.randn(2, 9)
    with pytest.raises(UserError, match="can't be converted from"):
        converted(x, x, source, Velocity(), process.alpha(t), process.sigma(t))


@pytest.mark.parametrize("kind", [Epsilon(), Velocity(), Sample()])
def test_how_much_an_error_of_the_prediction_counts_in_x0(kind):
    process, t = DiscreteVP(), torch.tensor([50.0, 400.0, 990.0], dtype=torch.float64)
    alpha, sigma, x_t = process.alpha(t), process.sigma(t), torch.randn(3).double()
    slope = kind.x0(x_t, torch.ones(3).double(), alpha, sigma) - kind.x0(x_t, torch.zeros(3).double(), alpha, sigma)
    torch.testing.assert_close(kind.x0_error_scale(alpha, sigma), slope.abs())
