"""Guidance: wraps a denoiser, and is itself a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train.diffusion.denoiser import Conditioned, Denoiser
from train.diffusion.process import DiffusionProcess


class ClassifierFreeGuidance:
    """s x0(c) + (1 - s) x0(null) (Ho & Salimans 2022, eq. 6, s = 1 + w), equivalent for eps, v and flow.

    One pass over both halves. At scale 1, or without a condition, the null is not evaluated, and the result equals the
    unguided one bit for bit. rescale phi: moves the result's standard deviation by phi towards the conditional one. Lin
    et al. 2024 (eq. 15-16) rescale the network's prediction, this class rescales x0: the same for Sample only; other
    parameterizations give another picture at the same phi (docs/maths.md says by how much).
    interval: fractions of the process, from data to noise, where guidance is active (Kynkäänniemi et al. 2024).
    """

    def __init__(
        self,
        denoise: Denoiser,
        scale: float,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        process: DiffusionProcess | None = None,  # needed for an interval
    ) -> None:
        assert process is not None or tuple(interval) == (0.0, 1.0), "an interval needs a process"
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

    Not applied where alpha is 0, since x_t then has no information on x0. Costs a backward pass of the classifier.
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
