"""Guidance wraps a denoiser and is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train.diffusion.denoiser import Conditioned, Denoiser
from train.diffusion.process import DiffusionProcess


class ClassifierFreeGuidance:
    """s x0(c) + (1 - s) x0(null) (Ho & Salimans 2022, eq. 6, s = 1 + w), the same for eps, v and flow.

    One pass over both halves. At scale 1, or where nothing is given, the null is not evaluated: the result is the
    unguided one, bit for bit. rescale phi: the result's standard deviation moved by phi towards the conditional's. Lin
    et al. 2024 (eq. 15-16) do so to the network's prediction, here it is done to x0: the same for Sample only, and
    another picture at the same phi for the others (docs/maths.md says by how much).
    interval: fractions of the process, from data to noise, in which guidance acts (Kynkäänniemi et al. 2024).
    """

    def __init__(
        self,
        denoise: Denoiser,
        scale: float,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        process: DiffusionProcess | None = None,  # needed by an interval
    ) -> None:
        assert process is not None or tuple(interval) == (0.0, 1.0), "an interval is one of a process"
        self.denoise, self.scale, self.rescale = denoise, scale, rescale
        self.interval, self.process = tuple(interval), process

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioned) -> Tensor:
        if self.scale == 1.0 or conditioning.is_empty or not self._acts_at(t):
            return self.denoise(x_t, t, conditioning)
        both = self.denoise(torch.cat([x_t, x_t]), t, conditioning.for_guidance())
        conditional, unconditional = both.chunk(2)
        guided = self.scale * conditional + (1.0 - self.scale) * unconditional
        if self.rescale == 0.0:
            return guided
        matched = guided * (_spread(conditional) / _spread(guided))
        return self.rescale * matched + (1.0 - self.rescale) * guided

    def _acts_at(self, t: Tensor) -> bool:
        if self.interval == (0.0, 1.0):
            return True
        low, high = self.process.at(torch.tensor(self.interval)).tolist()
        return low <= float(t) <= high


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each picture, (B, 1, 1, 1)."""
    return x.std((1, 2, 3), keepdim=True).clamp(min=1e-8)


LogProb = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, h, w), t (B,) -> log p(y | x_t) (B,)


class ClassifierGuidance:
    """x0 + s sigma^2 / alpha * d log p(y | x_t) / d x_t (Dhariwal & Nichol 2021, alg. 2, with eps written as x0).

    Where alpha is 0, x_t says nothing of x0 and there is nothing to guide by. Costs a backward pass of the classifier.
    """

    def __init__(self, denoise: Denoiser, log_prob: LogProb, scale: float, process: DiffusionProcess) -> None:
        self.denoise, self.log_prob, self.scale, self.process = denoise, log_prob, scale, process

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioned) -> Tensor:
        x0 = self.denoise(x_t, t, conditioning)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if self.scale == 0.0 or float(alpha) == 0.0:
            return x0
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            gradient = torch.autograd.grad(self.log_prob(x, t.expand(len(x))).sum(), x)[0]
        return x0 + self.scale * sigma**2 / alpha * gradient
