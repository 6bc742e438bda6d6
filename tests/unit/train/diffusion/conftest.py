"""Gaussian data, whose best denoiser is known in closed form."""

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, std^2), so x_t ~ N(alpha mean, alpha^2 std^2 + sigma^2)."""

    mean: float = 0.7
    std: float = 0.5

    def scale(self, process, t):
        return (process.alpha(t) ** 2 * self.std**2 + process.sigma(t) ** 2).sqrt()

    def denoise(self, process):
        """(x_t, t) -> E[x0 | x_t]."""

        def x0(x, t):
            alpha, variance = process.alpha(t), self.scale(process, t) ** 2
            return self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)

        return x0

    def noised(self, process, t, z):
        """z ~ N(0, 1) -> x_t."""
        return process.alpha(t) * self.mean + self.scale(process, t) * z

    def endpoint(self, process, times, z):
        """Where the probability-flow ODE leads from noised(times[0], z): the same quantile of each marginal."""
        return self.noised(process, times[-1], z)


@pytest.fixture
def data():
    return GaussianData()


@pytest.fixture
def quantiles():
    """1,000 evenly spaced quantiles of a standard normal as (1000, 1, 1, 1)."""
    return torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).float().view(-1, 1, 1, 1)
