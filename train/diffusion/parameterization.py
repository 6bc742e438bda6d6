"""What the network predicts, and what its prediction stands for. Coefficients come from a process; no network.

With x_t = alpha x0 + sigma eps, each kind of prediction is a linear function of x_t and x0: so any goes over into any
other through x0 (`converted`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Parameterization(Protocol):
    """alpha and sigma broadcast against x. `fits`: whether target and x0 undo one another at such coefficients."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool: ...
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def x0_per_prediction(self, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class Epsilon:
    """The noise itself (Ho et al. 2020, eq. 14). x0 is undefined where alpha is 0."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return bool((alpha > 0).all())

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / alpha

    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * x0) / sigma

    def x0_per_prediction(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """|d x0 / d prediction|: by what an error of the prediction counts in x0."""
        return sigma / alpha


class Sample:
    """x0 itself."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return True

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return prediction

    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0_per_prediction(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class Velocity:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, eq. 13); needs alpha^2 + sigma^2 = 1."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return torch.allclose(alpha.square() + sigma.square(), torch.ones_like(alpha), atol=1e-4)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x_t - sigma * prediction

    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - x0) / sigma

    def x0_per_prediction(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class Flow:
    """dx/dt = eps - x0 on the straight path (Liu et al. 2022, eq. 1); needs alpha + sigma = 1."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return torch.allclose(alpha + sigma, torch.ones_like(alpha), atol=1e-4)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t - sigma * prediction  # alpha x0 + sigma eps - sigma (eps - x0) = (alpha + sigma) x0

    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - x0) / sigma

    def x0_per_prediction(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


def converted(
    prediction: Tensor, x_t: Tensor, source: Parameterization, to: Parameterization, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """What a network of kind `source` predicts, as kind `to`. Not at sigma 0, where noise can't be told from x0."""
    return to.from_x0(x_t, source.x0(x_t, prediction, alpha, sigma), alpha, sigma)
