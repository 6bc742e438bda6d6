"""Noising processes x_t = alpha(t) x0 + sigma(t) eps: the schedules, and nothing of networks.

t is a float tensor from 0 (data) to `end` (noise). `network_time(t)` is what the U-Net's time embedding sees, in
thousandths of the process, as Stable Diffusion's timesteps are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class DiffusionProcess(Protocol):
    """alpha(t), sigma(t), both shaped as t."""

    start: float
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


class RectifiedFlow:
    """alpha = 1 - t, sigma = t, t in [0, 1]: straight paths (Liu et al. 2022; Lipman et al. 2022)."""

    start, end = 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def network_time(self, t: Tensor) -> Tensor:
        return 1000.0 * t

    def at(self, fraction: Tensor) -> Tensor:
        """Fractions in [0, 1] of the way to noise -> t."""
        return fraction


class DiscreteVP:
    """Variance preserving, by a table of betas (Ho et al. 2020): t is an index 0..T-1, between them interpolated.

    schedule "scaled_linear" is linear in sqrt(beta), as latent diffusion trains; "linear" is DDPM's.
    """

    start = 0.0

    def __init__(
        self, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, schedule: str = "scaled_linear"
    ) -> None:
        power = {"linear": 1.0, "scaled_linear": 2.0}[schedule]
        betas = torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), steps, dtype=torch.float32) ** power
        self.alphas_cumprod = torch.cumprod(1.0 - betas, 0)
        self.end = float(steps - 1)

    def _alpha_squared(self, t: Tensor) -> Tensor:
        table = self.alphas_cumprod.to(t.device)
        below = t.floor().clamp(0, len(table) - 1).long()
        above = (below + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[below], table[above], t - below)

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_squared(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1.0 - self._alpha_squared(t)).sqrt()

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def at(self, fraction: Tensor) -> Tensor:
        """Fractions in [0, 1] -> whole timesteps; each of the T is as likely under a uniform fraction."""
        return (fraction * (self.end + 1)).floor().clamp(max=self.end)
