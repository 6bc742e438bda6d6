"""What the network predicts, and the x0 that its prediction stands for. Coefficients come from a process; no network.

Each: target(x0, eps) -> what to regress on; x0(x_t, prediction) with x_t = alpha x0 + sigma eps; and fits(alpha,
sigma), whether the two undo one another at such coefficients.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Parameterization(Protocol):
    """alpha and sigma broadcast against x."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool: ...
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class Epsilon:
    """The noise itself (Ho et al. 2020, eq. 14). x0 is undefined where alpha is 0."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return bool((alpha > 0).all())

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / alpha


class Velocity:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, eq. 13); needs alpha^2 + sigma^2 = 1."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return torch.allclose(alpha.square() + sigma.square(), torch.ones_like(alpha), atol=1e-4)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x_t - sigma * prediction


class Flow:
    """dx/dt = eps - x0 on the straight path (Liu et al. 2022, eq. 1); needs alpha + sigma = 1."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return torch.allclose(alpha + sigma, torch.ones_like(alpha), atol=1e-4)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t - sigma * prediction  # alpha x0 + sigma eps - sigma (eps - x0) = (alpha + sigma) x0
