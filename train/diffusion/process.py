"""Noising processes x_t = alpha(t) x0 + sigma(t) eps: the schedules, independent of networks.

t is a float tensor from `start`, the data itself (alpha 1, sigma 0), to `end`, the noise. `first` is the least noisy
time used in training. `network_time(t)` is the input of the U-Net's time embedding, in thousandths of the process like
Stable Diffusion's timesteps.
"""

from __future__ import annotations

from math import pi
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.common.errors import UserError


class DiffusionProcess(Protocol):
    """alpha(t) and sigma(t), both of the shape of t."""

    start: float
    first: float
    end: float

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def network_time(self, t: Tensor) -> Tensor: ...
    def at(self, fraction: Tensor) -> Tensor: ...


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), in x's dtype."""
    return coefficient.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def add_noise(process: DiffusionProcess, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) eps (Ho et al. 2020, eq. 4)."""
    return like(process.alpha(t), x0) * x0 + like(process.sigma(t), x0) * noise


class Continuous:
    """A process with real-valued t from 0 to 1."""

    start, first, end = 0.0, 0.0, 1.0

    def network_time(self, t: Tensor) -> Tensor:
        return 1000.0 * t

    def at(self, fraction: Tensor) -> Tensor:
        """Fractions of the process in [0, 1], from data to noise -> t."""
        return fraction


class RectifiedFlow(Continuous):
    """alpha = 1 - t, sigma = t: straight paths (Liu et al. 2022; Lipman et al. 2022).

    shift s > 1 maps more of the fractions close to the noise, as larger pictures need: t' = s t / (1 + (s - 1) t)
    (Esser et al. 2024, eq. 23). Training times and sampling steps both use `at`.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise UserError(f"process.shift={shift} must be above 0: use 1 for no shift, or 3 for large pictures.")
        self.shift = shift

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def at(self, fraction: Tensor) -> Tensor:
        """Fractions of the process in [0, 1], from data to noise -> t, shifted."""
        return fraction if self.shift == 1.0 else self.shift * fraction / (1.0 + (self.shift - 1.0) * fraction)


class CosineVP(Continuous):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the cosine schedule without its offset (Nichol & Dhariwal 2021)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.where(t >= 1, 0.0, torch.cos(0.5 * pi * t))  # cos(pi / 2) is 6e-17 or -4e-8, not 0

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * pi * t)


class ContinuousVP(Continuous):
    """The variance-preserving SDE with beta(t) linear from beta_min to beta_max (Song et al. 2021, eq. 33)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2.0 * self._log_alpha(t))).sqrt()


SCHEDULES = ("linear", "scaled_linear", "cosine")


def betas_of(schedule: str, beta_start: float, beta_end: float, steps: int) -> Tensor:
    """Variance added by each step, (steps,) float64.

    "linear" (Ho et al. 2020); "scaled_linear": linear in the square roots, as in latent diffusion; "cosine" (Nichol &
    Dhariwal 2021, eq. 17), which uses neither beta_start nor beta_end.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"process.schedule={schedule} is unknown: use one of {', '.join(SCHEDULES)}.")
    if schedule == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        signal = torch.cos((t + 0.008) / 1.008 * pi / 2).square()
        return (1.0 - signal[1:] / signal[:-1]).clamp(max=0.999)
    power = 2.0 if schedule == "scaled_linear" else 1.0
    return torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), steps, dtype=torch.float64) ** power


def with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shifts and scales the signal to 0 at the last step, keeping the first step (Lin et al. 2024, alg. 1);
    (T,) -> (T,)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


class DiscreteVP:
    """Variance preserving, from a table of betas (Ho et al. 2020). t is a timestep 0..T-1, -1 is the data itself;
    alpha^2 is interpolated between timesteps."""

    start, first = -1.0, 0.0

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps: int = 1000,
        schedule: str = "scaled_linear",
        zero_terminal_snr: bool = False,
    ) -> None:
        signal = torch.cumprod(1.0 - betas_of(schedule, beta_start, beta_end, steps), 0)
        self.alphas_cumprod = with_zero_terminal_snr(signal) if zero_terminal_snr else signal  # (T,) float64
        self.end, self.steps = float(steps - 1), steps
        self._table = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])

    def _alpha_squared(self, t: Tensor) -> Tensor:
        """Computed in float64: near the data 1 - alpha^2 would have few digits in float32."""
        table, place = self._table.to(t.device), (t.double() + 1.0).clamp(0, self.steps)
        below = place.floor().clamp(max=self.steps - 1).long()
        return torch.lerp(table[below], table[below + 1], place - below)

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_squared(t).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1.0 - self._alpha_squared(t)).sqrt().to(t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        return t * (1000.0 / self.steps)

    def at(self, fraction: Tensor) -> Tensor:
        """Fractions in [0, 1] -> whole timesteps; a uniform fraction gives each of the T with equal probability."""
        return (fraction * self.steps).floor().clamp(max=self.end)


def half_log_snr(process: DiffusionProcess, t: Tensor) -> Tensor:
    """lambda(t) = log(alpha / sigma), half the log of the SNR (Lu et al. 2022); infinite where alpha or sigma is 0."""
    return process.alpha(t).log() - process.sigma(t).log()


def time_at_noise(process: DiffusionProcess, ratio: Tensor, precision: int = 60) -> Tensor:
    """t at which sigma / alpha equals `ratio`, (N,) float64. By bisection, as sigma / alpha grows with t in all
    processes here."""
    low = torch.full_like(ratio, process.start, dtype=torch.float64)
    high = torch.full_like(low, process.end)
    for _ in range(precision):
        middle = (low + high) / 2
        above = process.sigma(middle) > ratio * process.alpha(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def largest_noise(process: DiffusionProcess, limit: float = 200.0) -> float:
    """sigma / alpha at the end, at most `limit`; `limit` also stands for an end of pure noise, without signal."""
    end = torch.tensor(process.end, dtype=torch.float64)
    alpha, sigma = float(process.alpha(end)), float(process.sigma(end))
    return sigma / alpha if sigma < limit * alpha else limit
