"""What the network predicts: targets, and x0 and eps from a prediction. Coefficients come from a process.

With x_t = alpha x0 + sigma eps, x_t and a prediction of any kind determine x0 and eps, so each kind can be converted
to any other (`converted`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.common.errors import UserError


class Parameterization(Protocol):
    """alpha and sigma must broadcast to x. `fits`: whether `x0` inverts `target` at these coefficients."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool: ...
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def epsilon(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...
    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor: ...


class FromX0:
    """Base of all kinds."""

    def from_x0(self, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The prediction that corresponds to x0. sigma must be > 0, except for Sample."""
        return self.target(x0, (x_t - alpha * x0) / sigma, alpha, sigma)


class Epsilon(FromX0):
    """The noise itself (Ho et al. 2020, eq. 14). x0 is undefined where alpha is 0."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return bool((alpha > 0).all())

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / alpha

    def epsilon(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return prediction

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """|d x0 / d prediction|: the factor from an error of the prediction to an error of x0."""
        return sigma / alpha


class Sample(FromX0):
    """x0 itself. eps is undefined where sigma is 0."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return True

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return prediction

    def epsilon(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - alpha * prediction) / sigma

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class Velocity(FromX0):
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, eq. 13); needs alpha^2 + sigma^2 = 1."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return torch.allclose(alpha.square() + sigma.square(), torch.ones_like(alpha), atol=1e-4)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x_t - sigma * prediction

    def epsilon(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma * x_t + alpha * prediction

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class Flow(FromX0):
    """dx/dt = eps - x0 on the straight path (Liu et al. 2022, eq. 1); needs alpha + sigma = 1."""

    def fits(self, alpha: Tensor, sigma: Tensor) -> bool:
        return torch.allclose(alpha + sigma, torch.ones_like(alpha), atol=1e-4)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def x0(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t - sigma * prediction  # alpha x0 + sigma eps - sigma (eps - x0) = (alpha + sigma) x0

    def epsilon(self, x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t + alpha * prediction  # alpha x0 + sigma eps + alpha (eps - x0)

    def x0_error_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


def converted(
    prediction: Tensor, x_t: Tensor, source: Parameterization, to: Parameterization, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Converts a prediction of kind `source` to kind `to`; UserError where it does not determine what `to` needs.

    Velocity and flow determine x0 and eps at every time. Costs a host sync.
    """
    if type(source) is type(to):
        return prediction
    if not source.fits(alpha, sigma) or (isinstance(source, Sample) and bool((sigma == 0).any())):
        names = f"{type(source).__name__} into {type(to).__name__}"
        raise UserError(
            f"a prediction can't be converted from {names} at these times: exclude pure data (sigma 0) for sample and "
            "pure noise (alpha 0) for epsilon, and use velocity and flow only with their own processes."
        )
    noise = source.epsilon(x_t, prediction, alpha, sigma)
    return to.target(source.x0(x_t, prediction, alpha, sigma), noise, alpha, sigma)
