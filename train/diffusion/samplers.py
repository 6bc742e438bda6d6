"""Samplers: functions of a denoiser (x_t, t) -> x0, a starting point and decreasing times.

`times` (N + 1,) go from the process' end to its start, the data: N evaluations, except for Heun's 2 N - 1. x at
times[0] is alpha x0 + sigma eps with x0 unknown, that is, sigma(times[0]) * noise. Letters as in the papers:
lambda = log(alpha / sigma), h its increase in a step from t to s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import expm1, inf, isinf, log
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.errors import UserError
from train.diffusion.process import DiffusionProcess, largest_noise, time_at_noise

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]  # step -> fresh standard normal noise shaped as x
Times = Callable[[DiffusionProcess, int], Tensor]


# If a process ends above this sigma / alpha, Heun's method doesn't average slopes in it. No schedule starts near it:
# karras_times starts at 200 or below, and processes that end without signal (in betas or continuous) at 1e4 or above.
MUCH_NOISE = 1000.0


class Level(NamedTuple):
    """Signal and noise levels at a time, in double precision."""

    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma)."""
        if self.alpha == 0 or self.sigma == 0:
            return -inf if self.alpha == 0 else inf
        return log(self.alpha / self.sigma)


def levels_at(process: DiffusionProcess, times: Tensor) -> list[Level]:
    """The level of each time."""
    wide = times.double()
    return [Level(*pair) for pair in zip(process.alpha(wide).tolist(), process.sigma(wide).tolist(), strict=True)]


def uniform_times(process: DiffusionProcess, steps: int) -> Tensor:
    """Equally spaced from the end to the least noisy time used in training; then the data."""
    _refuse_steps(process, steps)
    if process.first == process.start:
        return process.at(torch.linspace(1.0, 0.0, steps + 1))
    times = torch.linspace(process.end, process.first, steps, dtype=torch.float64).round()
    return torch.cat([times, torch.tensor([process.start])]).float()


def trailing_times(process: DiffusionProcess, steps: int) -> Tensor:
    """Equally spaced from the end to the data (Lin et al. 2024, table 2); in whole timesteps if it has them."""
    if process.first == process.start:
        return uniform_times(process, steps)
    _refuse_steps(process, steps)
    count = process.end - process.start  # rounded as in the paper, where timesteps count from 1
    return (torch.linspace(count, 0.0, steps + 1, dtype=torch.float64).round() + process.start).float()


def karras_times(process: DiffusionProcess, steps: int, rho: float = 7.0, smallest: float = 0.002) -> Tensor:
    """Equally spaced in (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5); then the data.

    From the process' largest noise (at most 200) to that of the least noisy time used in training, or `smallest` if
    that is 0.
    """
    _refuse_steps(process, steps, whole=False)
    first = levels_at(process, torch.tensor([process.first]))[0]
    high, low = largest_noise(process) ** (1 / rho), (first.sigma / first.alpha or smallest) ** (1 / rho)
    ratios = torch.linspace(high, low, steps, dtype=torch.float64) ** rho
    times = time_at_noise(process, ratios).clamp(process.first, process.end)
    return torch.cat([times, torch.tensor([process.start])]).float()


def _refuse_steps(process: DiffusionProcess, steps: int, whole: bool = True) -> None:
    """UserError for fewer than one step, or more steps than whole timesteps: some would not change the time."""
    if steps < 1:
        raise UserError(f"sampler.steps={steps} must be at least 1.")
    most = int(process.end - process.start)
    if whole and process.first != process.start and steps > most:
        raise UserError(f"sampler.steps={steps} is more than the {most} timesteps of the process: use at most {most}.")


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    process: DiffusionProcess,
    noise: Noise,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta 0 is deterministic, eta 1 ancestral."""
    for i, (now, then) in enumerate(pairwise(levels_at(process, times))):
        x0 = denoise(x, times[i])
        eps = (x - now.alpha * x0) / now.sigma
        # sigma of eq. 16, expressed by signal and noise levels
        kept = now.alpha * then.sigma / (then.alpha * now.sigma)
        fresh = eta * then.sigma * max(1.0 - kept**2, 0.0) ** 0.5
        x = then.alpha * x0 + max(then.sigma**2 - fresh**2, 0.0) ** 0.5 * eps
        if fresh > 0:
            x = x + fresh * noise(i)
    return x


def sample_euler(denoise: Denoise, x: Tensor, times: Tensor, process: DiffusionProcess, noise: Noise) -> Tensor:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, alg. 1, no churn).

    A step in d(x/alpha) / d(sigma/alpha) = eps equals a DDIM step at eta 0, which has no pole at alpha 0.
    """
    return sample_ddim(denoise, x, times, process, noise)


def sample_heun(denoise: Denoise, x: Tensor, times: Tensor, process: DiffusionProcess, noise: Noise) -> Tensor:
    """Heun's method (Karras et al. 2022, alg. 1, no churn): averages the slopes at both ends; 2 N - 1 evaluations.

    Solves d(x/alpha) / d(sigma/alpha) = eps. If the process ends with hardly any signal, this has a pole; slopes are
    then averaged in dx = x0 d alpha + eps d sigma. The step to the data is Euler's, as there is no slope at sigma 0.
    """
    levels = levels_at(process, times)
    pole = levels[0].sigma > MUCH_NOISE * levels[0].alpha
    for i, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, times[i])
        eps = (x - now.alpha * x0) / now.sigma
        ahead = then.alpha * x0 + then.sigma * eps
        if then.sigma > 0:
            x0_ahead = denoise(ahead, times[i + 1])
            mean_eps = (eps + (ahead - then.alpha * x0_ahead) / then.sigma) / 2
            if pole:
                mean_x0 = (x0 + x0_ahead) / 2
                ahead = x + (then.alpha - now.alpha) * mean_x0 + (then.sigma - now.sigma) * mean_eps
            else:
                ratio = then.alpha / now.alpha
                ahead = ratio * x + (then.sigma - ratio * now.sigma) * mean_eps
        x = ahead
    return x


def sample_ddpm(denoise: Denoise, x: Tensor, times: Tensor, process: DiffusionProcess, noise: Noise) -> Tensor:
    """Ancestral sampling from q(x_s | x_t, x0) (Ho et al. 2020, eq. 7, alg. 2), which is DDIM at eta 1."""
    return sample_ddim(denoise, x, times, process, noise, eta=1.0)


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, process: DiffusionProcess, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2): extrapolates x0 in lambda from the previous step.

    First order at the first step, at the last (to the data), and after a time without signal, where lambda is infinite.
    """
    levels = levels_at(process, times)
    x0_before: Tensor | None = None
    for i, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, times[i])
        mean_x0 = x0
        if x0_before is not None and then.sigma > 0 and levels[i - 1].alpha > 0:
            h, h_before = then.half_log_snr - now.half_log_snr, now.half_log_snr - levels[i - 1].half_log_snr
            mean_x0 = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = _exponential_step(x, mean_x0, now, then)
        x0_before = x0
    return x


def _exponential_step(x: Tensor, x0: Tensor, now: Level, then: Level) -> Tensor:
    """The exact solution where x0 is constant: sigma_s / sigma_t x + alpha_s (1 - e^-h) x0 (Lu et al. 2022b, eq. 9)."""
    ratio = then.sigma / now.sigma
    return ratio * x + (then.alpha - ratio * now.alpha) * x0


def sample_unipc(denoise: Denoise, x: Tensor, times: Tensor, process: DiffusionProcess, noise: Noise) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 for x0 prediction (Zhao et al. 2023, alg. 5-8). The x0 evaluated at each x
    also corrects that x, at no extra evaluation."""
    levels = levels_at(process, times)
    known: list[tuple[Level, Tensor]] = []  # the latest two levels, each with the x0 evaluated there
    x_before, order = x, 0
    for i, now in enumerate(levels[:-1]):
        x0 = denoise(x, times[i])
        if order:
            x = _unipc_step(x_before, known, now, order, x0)
        known = [*known, (now, x0)][-2:]
        finite = sum(not isinf(level.half_log_snr) for level, _ in known)
        order = max(min(2, finite), 1) if levels[i + 1].sigma > 0 else 1
        x_before = x
        x = _unipc_step(x, known, levels[i + 1], order)
    return x


def _unipc_step(
    x: Tensor, known: Sequence[tuple[Level, Tensor]], then: Level, order: int, x0_then: Tensor | None = None
) -> Tensor:
    """Step from the latest known level to `then`: predictor, or corrector if x0 at `then` is given (eq. 4 and 8)."""
    now, x0 = known[-1]
    h = then.half_log_snr - now.half_log_snr
    step = _exponential_step(x, x0, now, then)
    differences, places = [], []  # (x0 - x0_now) / r at r = (lambda - lambda_now) / h
    if order == 2:
        before, x0_before = known[-2]
        places.append((before.half_log_snr - now.half_log_snr) / h)
        differences.append((x0_before - x0) / places[0])
    if x0_then is not None:
        places.append(1.0)
        differences.append(x0_then - x0)
    bh = then.alpha * -expm1(-h)  # alpha B(h); expm1(-inf) is -1
    for weight, difference in zip(_unipc_weights(h, places, x0_then is not None), differences, strict=True):
        step = step + bh * weight * difference
    return step


def _unipc_weights(h: float, places: Sequence[float], corrects: bool) -> Sequence[float]:
    """rho of eq. 5 for up to two differences; a single difference has weight 1/2, as in the paper's code."""
    if len(places) < 2:
        return [0.5] * len(places)
    # sum_k rho_k r_k^(n-1) = b_n, with b_n = n! phi_{n+1}(h) h^n / B(h) of eq. 5.
    first = expm1(-h) / -h - 1.0
    b1, b2 = first / expm1(-h), 2.0 * (first / -h - 0.5) / expm1(-h)
    rho = (b1 - b2) / (places[1] - places[0])
    return [rho, b1 - rho]
