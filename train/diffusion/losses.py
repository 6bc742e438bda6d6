"""Error functions between prediction and target, and loss weights per time.

Errors: (prediction, target) -> elementwise. Weightings: (alpha (B,), sigma (B,), parameterization) -> (B,): the weight
of the prediction's squared error. Papers state it for x0: take that weight and multiply it by error_scale.square(),
where error_scale = |d x0 / d prediction| comes with the SNR = alpha^2 / sigma^2 from `_snr`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from train.diffusion.parameterization import Parameterization


class L2:
    """(prediction - target)^2 (Ho et al. 2020, eq. 14)."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()


class L1:
    """|prediction - target|."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs()


class Huber:
    """Half the square up to `delta`, linear beyond, so outliers weigh less (Huber 1964)."""

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = delta

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(prediction, target, reduction="none", delta=self.delta)


class Uniform:
    """Weight 1 for the prediction in any parameterization: L_simple (Ho et al. 2020)."""

    def __call__(self, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:
        return torch.ones_like(alpha)


class MinSnr:
    """min(SNR, gamma) for x0 (Hang et al. 2023, eq. 8), that is, min(SNR, gamma) / SNR for eps, / (SNR + 1) for v."""

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:
        snr, error_scale = _snr(alpha, sigma, parameterization)
        return snr.clamp(max=self.gamma) * error_scale.square()


class TruncatedSnr:
    """max(SNR, 1) for x0 (Salimans & Ho 2022, sec. 4), so that both noise and picture have weight: max(1 / SNR, 1) for
    eps, max(alpha^2, sigma^2) for v and flow. For x0 it equals SNR near the data; the weight is at most `limit`."""

    def __init__(self, limit: float = 1e4) -> None:
        self.limit = limit

    def __call__(self, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:
        snr, error_scale = _snr(alpha, sigma, parameterization)
        return (snr.clamp(min=1.0) * error_scale.square()).clamp(max=self.limit)


def _snr(alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> tuple[Tensor, Tensor]:
    """SNR and |d x0 / d prediction|. alpha and sigma are clamped above 0, so that the product takes its limit there."""
    alpha, sigma = alpha.clamp(min=1e-6), sigma.clamp(min=1e-6)
    return (alpha / sigma).square(), parameterization.x0_error_scale(alpha, sigma)
