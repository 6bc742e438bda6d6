"""Samplers: functions of a denoiser (x_t, t) -> x0, a starting point and a falling list of times.

`times` (N + 1,) falls from the process' end to its start; x at times[0] is alpha x0 + sigma eps with x0 unknown, that
is, sigma(times[0]) * noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from train.diffusion.process import DiffusionProcess

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]  # step -> fresh standard normal noise shaped as x
OnStep = Callable[[int], None]


def uniform_times(process: DiffusionProcess, steps: int) -> Tensor:
    """`steps` + 1 times at equal distances from the process' end to its start, both included."""
    return torch.linspace(process.end, process.start, steps + 1)


def sample_euler(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    process: DiffusionProcess,
    noise: Noise,
    on_step: OnStep = lambda i: None,
) -> Tensor:
    """Euler's method on the probability-flow ODE dx = alpha' x0 + sigma' eps (Karras et al. 2022, alg. 1, no churn).

    With its slopes taken as differences it is Euler on d(x/alpha) / d(sigma/alpha) = eps, with no pole at alpha 0.
    """
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = denoise(x, t)
        eps = (x - process.alpha(t) * x0) / process.sigma(t)
        x = x + (process.alpha(s) - process.alpha(t)) * x0 + (process.sigma(s) - process.sigma(t)) * eps
        on_step(i)
    return _finish(denoise, x, times, process)


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    process: DiffusionProcess,
    noise: Noise,
    on_step: OnStep = lambda i: None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta 0 is deterministic, eta 1 ancestral."""
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = denoise(x, t)
        alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        eps = (x - alpha_t * x0) / sigma_t
        fresh = torch.zeros(())
        if eta > 0:  # sigma of eq. 16, in terms of signal and noise levels
            fresh = eta * sigma_s * (1.0 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2).clamp(min=0).sqrt()
        x = alpha_s * x0 + (sigma_s**2 - fresh**2).clamp(min=0).sqrt() * eps
        if eta > 0:
            x = x + fresh * noise(i)
        on_step(i)
    return _finish(denoise, x, times, process)


def _finish(denoise: Denoise, x: Tensor, times: Tensor, process: DiffusionProcess) -> Tensor:
    """A process that still holds noise at its start (discrete VP: sigma(0) = 0.03) is denoised once more."""
    return denoise(x, times[-1]) if process.sigma(times[-1]) > 0 else x
